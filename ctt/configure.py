"""Settings in layers: defaults, a recipe or a resumed run, a file, and what is given over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctt import methods, recipes
from ctt.errors import UserError
from ctt.settings import Settings, update

WEIGHTS = "labeled.class_weights"


@dataclass(frozen=True)
class Given:
    """What must be known before the other settings are read, where the command line gives it."""

    recipe: str | None = None
    config: str | None = None
    dataset: str | None = None
    resume: Path | None = None
    voc_set: str | None = None
    method: str | None = None
    network: str | None = None
    backbone: str | None = None
    device: str | None = None


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

        settings = run.read_settings(run.find(given.resume))
    if given.method or "method" in values:
        settings = settings.with_method(given.method or str(values["method"]))
    if recipe := recipes_of(values, source, given):
        settings = update(settings, recipes.load_all(recipe), f"recipe {' '.join(recipe)}")
        model = _group(values, "model")
        network = given.network or model.get("name", settings.model.name)
        if network != settings.model.name and not (given.backbone or "backbone" in model):
            # the recipe's backbone belongs to the recipe's network
            own = {"model": {"backbone": [], "output_stride": 0}}
            settings = update(settings, own, f"recipe {' '.join(recipe)}")
    values = {name: value for name, value in values.items() if name != "recipe"}
    settings = update(settings, values, source)
    if given.method:
        settings = settings.with_method(given.method)
    return settings


def recipes_of(values: dict[str, Any], source: str, given: Given) -> list[str]:
    """Return the names of the recipes: those that are given, or that of the dataset.

    Args:
        values: settings, nested as in a file, and `recipe`, a name or a list of names.
        source: where they come from, for the message.
        given: what wins over them; with a resumed run there is no recipe but a given one.

    Raises:
        UserError: `recipe` holds no names.
    """
    named = values.get("recipe", [])
    if not isinstance(named, str | list):
        raise UserError(f"{source}: recipe must be a name or a list of names, got {named}.")
    names = [named] if isinstance(named, str) else list(map(str, named))
    names = [given.recipe] if given.recipe else list(filter(None, names))
    if names or given.resume is not None:
        return names
    defaults = Settings()
    name = recipes.default(
        given.dataset or str(values.get("dataset", defaults.dataset)),
        given.voc_set or _group(values, "data").get("voc_set", defaults.data.voc_set),
        given.device or _group(values, "train").get("device", defaults.train.device),
    )
    return [name] if name else []


def _group(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the settings of a group in a file; none if it holds what `update` refuses."""
    group = values.get(name)
    if not isinstance(group, dict):
        return {}
    return {str(key).replace("-", "_"): value for key, value in group.items()}


def named_in(values: dict[str, Any]) -> list[str]:
    """Return the settings that a file or a call names, such as `loss.hc`.

    Of a file that holds every setting and group, as the config.yaml of a run does, none: what
    changes nothing there was not chosen.
    """
    if all(field.name in values for field in dataclasses.fields(Settings)):
        return []
    names = [
        f"{group}.{name}" if isinstance(value, dict) else str(group)
        for group, value in values.items()
        for name in (value if isinstance(value, dict) else [""])
    ]
    return [name.replace("-", "_") for name in names]


def without_effect(s: Settings) -> Iterator[tuple[str, str]]:
    """Yield settings that the value of another one makes idle, and this value, as messages do."""
    labeled, optim, protocol = s.labeled, s.optim, s.eval.protocol
    windows = protocol in ("sliding", "center-crop")
    for name, value, counts, names in (
        ("model.name", " ".join(s.model.names), "small" in s.model.names, ["model.width"]),
        (WEIGHTS, labeled.class_weights, labeled.class_weights == "none", ["labeled.weights"]),
        (WEIGHTS, labeled.class_weights, labeled.class_weights == "effective", ["labeled.beta"]),
        ("labeled.ohem", labeled.ohem, labeled.ohem > 0, ["labeled.ohem_kept"]),
        ("optim.name", optim.name, optim.name == "sgd", ["optim.momentum", "optim.nesterov"]),
        ("optim.name", optim.name, optim.name == "adamw", ["optim.betas"]),
        ("optim.schedule", optim.schedule, optim.schedule == "poly", ["optim.power"]),
        ("optim.pair_lr", listed(optim.pair_lr), not optim.pair_lr, ["optim.lr"]),
        (
            "optim.pair_head_lr_factor",
            listed(optim.pair_head_lr_factor),
            not optim.pair_head_lr_factor,
            ["optim.head_lr_factor"],
        ),
        ("model.pair_name", listed(s.model.pair_name), not s.model.pair_name, ["model.name"]),
        ("bank.random_choice", "False", s.bank.random_choice, ["bank.top_k"]),
        ("views.blur_probability", "0", s.views.blur_probability > 0, ["views.blur_sigma"]),
        ("eval.protocol", protocol, windows, ["eval.window"]),
        ("eval.protocol", protocol, protocol == "sliding", ["eval.stride"]),
        ("dataset", s.dataset, s.dataset == "voc", ["data.voc_set"]),
        ("dataset", s.dataset, s.dataset == "digits", ["data.labeled_pool", "data.eval_images"]),
    ):
        if not counts:
            yield from ((each, f"`{name}` {value}") for each in names)


def listed(values: Iterable[object]) -> str:
    """Return values as an option takes them."""
    return " ".join(map(str, values))


def refuse_unused(settings: Settings, names: list[str]) -> None:
    """Refuse settings that the user names and that would change nothing.

    Raises:
        UserError: names the setting and what ignores it.
    """
    method = methods.get(settings.method)
    pairs = settings.pairs or method.pairs
    what = f"`method` {settings.method} with {pairs} pair{'s' * (pairs > 1)}"
    unused = dict.fromkeys(method.unused(pairs), what)
    unused |= dict(without_effect(settings))
    for name in names:
        by = unused.get(name) or unused.get(name.partition(".")[0])
        if by is not None:
            instead = f"Leave it out, or choose another {by.split()[0]}."
            if ".pair_" in by:
                instead = "Leave one of the two out."
            raise UserError(f"`{name}` changes nothing with {by}. {instead}")
        group, _, option = name.partition(".")
        masks = settings.masks
        # None of a folder leaves it out of a run that is resumed
        if group != "masks" or getattr(masks, option) is None:
            continue
        if masks.folder is None:
            raise UserError(
                f"`{name}` changes nothing without `masks.folder`, the folder of the masks."
            )
        if option == "threshold" and masks.confidence is None:
            raise UserError(
                f"`{name}` changes nothing without `masks.confidence`, the folder of their "
                f"confidence: every pixel counts as sure."
            )
