"""Published and tried settings by name: one YAML file each, put over the defaults."""

from importlib import resources
from pathlib import Path
from typing import Any

from ctt.errors import UserError


def names() -> list[str]:
    """The recipes that come with the package."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load(name: str) -> dict[str, Any]:
    """The settings of a recipe; one that names another under `recipe` is put over that.

    Raises:
        UserError: there is no recipe of that name.
    """
    if name not in names():
        raise UserError(f"--recipe {name}: no such recipe. Recipes: {', '.join(names())}.")
    values: dict[str, Any] = parse(
        (resources.files(__name__) / f"{name}.yaml").read_text("utf-8"), name
    )
    base = values.pop("recipe", "")
    return merge(load(str(base)), values) if base else values


def merge(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with others put over them."""
    merged = dict(values)
    for name, value in over.items():
        below = merged.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            value = merge(below, value)
        merged[name] = value
    return merged


def load_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        UserError: it cannot be read or holds no settings.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the settings file cannot be read ({error}).") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: this is no valid YAML ({error}).") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{source}: settings must be `name: value` lines, got {values!r}.")
    return values
