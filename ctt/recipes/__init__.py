"""Published and tried settings by name: one YAML file each, put over the defaults."""

from importlib import resources
from pathlib import Path
from typing import Any

from ctt.errors import UserError
from ctt.text import brief, from_yaml


def names() -> list[str]:
    """Return the recipes that come with the package."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def default(dataset: str, voc_set: str, device: str = "auto") -> str:
    """Return the recipe that belongs to a dataset, empty where there is none.

    Args:
        device: the setting `train.device`; own images have a recipe for machines without a GPU.
    """
    if dataset == "folder" and not has_gpu(device):
        return "folder-small"
    if dataset == "voc":
        return "voc-classic-deeplabv3plus" if voc_set == "classic" else "voc-aug-deeplabv2"
    own = {
        "cityscapes": "cityscapes-deeplabv2",
        "ade20k": "ade20k-dinov2-cross-teacher",
        "coco": "coco-dinov2-cross-teacher",
    }
    named = own | {name: name for name in ("digits", "earth", "folder")}
    return named.get(dataset, "")


def has_gpu(device: str) -> bool:
    """Return whether a run with this setting `train.device` uses a GPU."""
    if device != "auto":
        return not str(device).startswith("cpu")  # which may be a number that is refused later
    import torch  # takes a second, so only where it counts

    return torch.cuda.is_available()


def load(name: str) -> dict[str, Any]:
    """Return the settings of a recipe; the recipes that it names under `recipe` come first.

    Raises:
        UserError: there is no recipe of that name.
    """
    if name not in names():
        raise UserError(f"`recipe` {name}: no such recipe. Recipes: {', '.join(names())}.")
    values: dict[str, Any] = parse(
        (resources.files(__name__) / f"{name}.yaml").read_text("utf-8"), name
    )
    return merge(load_all(values.pop("recipe", [])), values)


def load_all(names: str | list[str]) -> dict[str, Any]:
    """Return the settings of one recipe, or of several put over each other, the last on top.

    Raises:
        UserError: there is no recipe of such a name.
    """
    values: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        values = merge(values, load(name))
    return values


def merge(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings with others put over them."""
    merged = dict(values)
    for name, value in over.items():
        below = merged.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            value = merge(below, value)
        merged[name] = value
    return merged


def load_file(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML file.

    Raises:
        UserError: it cannot be read or holds no settings.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the settings file cannot be read ({error}).") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> dict[str, Any]:
    """Return the settings in a YAML text; none if it is empty. `source` names it in messages."""
    values = from_yaml(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{source}: settings must be `name: value` lines, got {brief(values)}.")
    return values
