"""Settings in layers: defaults, a recipe or a resumed run, a file, and what is given over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctt import methods, recipes
from ctt.errors import UserError
from ctt.settings import Settings, update


@dataclass(frozen=True)
class Given:
    """What must be known before the other settings are read, where the command line gives it."""

    recipe: str | None = None
    config: str | None = None
    dataset: str | None = None
    resume: str | None = None
    voc_set: str | None = None
    method: str | None = None
    network: str | None = None
    backbone: str | None = None


def layered(values: dict[str, Any], source: str, given: Given) -> Settings:
    """Return the defaults, with the recipe or the resumed run and then `values` over them.

    Args:
        values: settings, nested as in a file, and `recipe`, a name or a list of names.
        source: where they come from, for the message.
        given: what wins over them.

    Raises:
        UserError: a recipe or run that cannot be read, or a value that is no setting.
    """
    settings = Settings()
    if given.resume is not None:
        from ctt import run

        settings = run.read_settings(run.find(Path(given.resume)))
    values = dict(values)
    if given.method or "method" in values:
        settings = settings.with_method(given.method or str(values["method"]))
    recipe = values.pop("recipe", [])
    if not isinstance(recipe, str | list):
        raise UserError(f"{source}: recipe must be a name or a list of names, got {recipe}.")
    recipe = given.recipe or recipe
    dataset = given.dataset or str(values.get("dataset", settings.dataset))
    if not recipe and given.resume is None:
        in_file = values.get("data")
        voc_set = in_file.get("voc_set") if isinstance(in_file, dict) else None
        recipe = recipes.default(dataset, given.voc_set or voc_set or settings.data.voc_set)
    if recipe:
        settings = update(settings, recipes.load_all(recipe), f"recipe {recipe}")
        in_file = values.get("model")
        model = in_file if isinstance(in_file, dict) else {}
        network = given.network or model.get("name", settings.model.name)
        if network != settings.model.name and not (given.backbone or "backbone" in model):
            # the recipe's backbone belongs to the recipe's network
            own = {"model": {"backbone": [], "output_stride": 0}}
            settings = update(settings, own, f"recipe {recipe}")
    settings = update(settings, values, source)
    if given.method:
        settings = settings.with_method(given.method)
    return settings


def refuse_unused(settings: Settings, names: list[str]) -> None:
    """Refuse settings that the user names and that would change nothing.

    Raises:
        UserError: names the setting and what ignores it.
    """
    method = methods.get(settings.method)
    pairs = settings.pairs or method.pairs
    what = f"--method {settings.method} with {pairs} pair{'s' * (pairs > 1)}"
    unused = dict.fromkeys(method.unused(pairs), what)
    if "small" not in settings.model.names:
        unused["model.width"] = f"--model.name {' '.join(settings.model.names)}"
    if settings.labeled.class_weights != "none":
        unused["labeled.weights"] = f"--labeled.class-weights {settings.labeled.class_weights}"
    for name in names:
        by = unused.get(name) or unused.get(name.partition(".")[0])
        if by is not None:
            raise UserError(
                f"--{name.replace('_', '-')} changes nothing with {by}. Leave it out, or choose "
                f"another {by.split()[0]}."
            )
        if name.startswith("masks.") and settings.masks.folder is None:
            raise UserError(
                f"--{name.replace('_', '-')} changes nothing without --masks.folder, the folder of "
                f"the masks."
            )
