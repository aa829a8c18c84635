"""ctt-train: train a segmentation network from few labelled and many unlabelled images."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ctt import data, methods, recipes
from ctt.cli.common import INTERRUPTED, run_program
from ctt.configure import Given, layered, named_in, recipes_of, refuse_unused
from ctt.errors import AlreadyReportedError, UserError
from ctt.processes import rank
from ctt.ranges import ranges_of
from ctt.settings import Settings, validate
from ctt.text import say

METHODS_CAPTION = (
    "cost: time of a step as a multiple of mean-teacher's. `ctt-train --method NAME --help` shows "
    "the settings of a method."
)
SMALL = "folder-small"


@dataclass(frozen=True)
class Arguments(Settings):
    """Train a segmentation network from few labelled and many unlabelled images.

    Without any argument: cross-teacher training on the embedded digits, in minutes on two cores.
    """

    recipe: str = ""
    """Settings by name, see ctt/recipes; by default the recipe of the dataset."""
    config: Path | None = None
    """YAML file of settings, put over the recipe, or the list of recipes, that it names under
    `recipe`; the command line wins over both."""
    out: Path | None = None
    """New folder for the run; by default a numbered one in runs/."""
    resume: Path | None = None
    """Go on with the stopped run in this folder, with its settings."""
    auto_resume: bool = False
    """Go on with the run in --out if there is one, and begin it otherwise: for jobs that are
    started again with the same command."""
    list_methods: bool = False
    """Print the training methods and end."""
    dry_run: bool = False
    """Check settings, data, weights and folders, tell how much memory and time the run takes, and
    write nothing."""
    card: str = ""
    """With --dry-run: GPU whose hours are estimated, such as rtx4090, a100 or h100; by default all
    that are known."""
    cards: int = 0
    """With --dry-run: how many of them, beside one; by default as many as there are processes."""


def main() -> None:
    """Run the program."""
    run_program("ctt-train", lambda: _main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    if "--list-methods" in arguments:
        if first_process():
            list_methods()
        return 0
    try:
        parsed, settings = read(arguments)
    except UserError:
        if first_process():
            raise
        raise AlreadyReportedError from None
    named = parsed.config or any(text.startswith("--recipe") for text in arguments)
    if parsed.recipe == SMALL and not named and first_process():
        say(f"There is no GPU here, so the recipe is {SMALL}; --recipe folder takes a larger one.")
    from ctt.train.dry_run import dry_run
    from ctt.train.loop import Stopped, train

    if parsed.dry_run:
        if first_process():
            out, resume = parsed.out, parsed.resume
            dry_run(settings, out=out, resume=resume, card=parsed.card, cards=parsed.cards)
        return 0
    try:
        train(settings, out=parsed.out, resume=parsed.resume)
    except Stopped as stopped:
        if stopped.is_main:
            say(
                f"Stopped after iteration {stopped.iteration}; a checkpoint is written. "
                f"Go on with: ctt-train --resume {shlex.quote(str(stopped.folder))}"
            )
        return INTERRUPTED
    return 0


def list_methods() -> None:
    """Print a table of the training methods."""
    from rich.table import Table

    from ctt.console import plain_console

    table = Table(title="training methods", caption=METHODS_CAPTION)
    for column in ("method", "paper", "students", "beside students and teachers", "cost"):
        right = column in ("students", "cost")
        table.add_column(column, justify="right" if right else "left", no_wrap=column == "method")
    for name in [*methods.names(), *methods.installed()]:
        about = methods.get(name)
        cost = f"{about.cost:.1f}" if about.cost else ""
        table.add_row(name, about.paper, str(about.pairs), about.extra, cost)
    plain_console().print(table)


def first_process() -> bool:
    """Return whether this is the process to tell what is wrong with the arguments of all."""
    return rank() == 0


def read(arguments: list[str]) -> tuple[Arguments, Settings]:
    """Return the arguments, and the settings among them, checked.

    Raises:
        UserError: values that cannot work, or that the resumed run does not fit.
        SystemExit: usage, with exit code 2.
    """
    parsed = parse(arguments)
    settings = Settings(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(Settings)})
    validate(settings)
    refuse_unused(settings, given(arguments, parsed.config))
    if parsed.resume is not None and parsed.out is not None:
        raise UserError("--out and --resume exclude each other: a resumed run stays in its folder.")
    if (parsed.card or parsed.cards) and not parsed.dry_run:
        raise UserError(
            "--card and --cards need --dry-run, which estimates the hours. Add --dry-run."
        )
    if parsed.resume is not None:
        from ctt import run

        run.check_resumable(run.read_settings(run.find(parsed.resume)), settings)
    return parsed, settings


def given(arguments: list[str], config: Path | None) -> list[str]:
    """Return the settings that the user names, such as `loss.hc`: on the command line or in a file.

    Those of recipes are not among them, because a recipe serves several methods.
    """
    names = [text.partition("=")[0][2:].replace("-", "_") for text in arguments if text[:2] == "--"]
    names = [name.replace(".no_", ".") for name in names]
    return names + (named_in(recipes.load_file(config)) if config is not None else [])


def parse(arguments: list[str]) -> Arguments:
    """Return defaults, recipe or resumed run, file and command line, put over each other.

    Raises:
        UserError: a recipe or file that cannot be read. SystemExit: usage, with exit code 2.
    """
    import tyro

    early = argparse.ArgumentParser("ctt-train", add_help=False, allow_abbrev=False)
    for option in ("--recipe", "--config", "--dataset"):
        early.add_argument(option)
    for option in ("--out", "--resume"):
        early.add_argument(option, type=Path)
    early.add_argument("--auto-resume", action=argparse.BooleanOptionalAction)
    early.add_argument("--data.voc-set", "--data.voc_set", dest="voc_set")
    early.add_argument("--train.device", dest="device")
    early.add_argument("--method")
    early.add_argument("--model.name", dest="network")
    early.add_argument("--model.backbone", dest="backbone")
    given, _ = early.parse_known_args(arguments)
    out, resume, automatic = (vars(given).pop(n) for n in ("out", "resume", "auto_resume"))
    help_asked = bool({"-h", "--help"} & set(arguments))
    if automatic and not help_asked:
        from ctt import run

        out, resume = run.new_or_begun(out, resume)
    values = recipes.load_file(Path(given.config)) if given.config is not None else {}
    chosen = Given(**vars(given), resume=resume)
    settings = layered(values, str(given.config), chosen)
    shown = shown_class(settings, help_asked=help_asked)
    recipe = " ".join(recipes_of(values, str(given.config), chosen))
    parsed = tyro.cli(
        shown,
        prog="ctt-train",
        args=arguments,
        default=dataclasses.replace(remade(shown, settings), recipe=recipe),
        console_outputs=first_process(),
    )
    if automatic:
        parsed = dataclasses.replace(parsed, out=out, resume=resume)
    return remade(Arguments, parsed)


def lists_of_names() -> list[tuple[str, str]]:
    """Return the options that take a name, and for each a help text with all the names."""
    texts = {
        "dataset": ("One of", data.names()),
        "method": (
            "How to train; `--method NAME --help` shows its settings, --list-methods the sources. "
            "Or a class in a file, my_method.py:MyMethod. One of",
            [*methods.names(), *methods.installed()],
        ),
        "recipe": (
            "Settings by name, those of ctt/recipes; by default that of the dataset. One of",
            recipes.names(),
        ),
    }
    return [(name, f"{text} {', '.join(names)}.") for name, (text, names) in texts.items()]


def shown_class(settings: Settings, help_asked: bool) -> type[Arguments]:
    """Return `Arguments` with the options of the method.

    The help leaves out what the method does not read. Otherwise such settings can be given, so that
    the message says what ignores them.
    """
    from tyro.conf import Suppress, arg

    try:
        about = methods.get(settings.method)
    except UserError:
        return Arguments  # `validate` tells
    unused = about.unused(settings.pairs or about.pairs) if help_asked else ()
    options = about.option_class()
    fields: list[Any] = [("options", options, dataclasses.field(default=settings.options))]
    if help_asked:
        part = in_help(options, [])
        fields[0] = ("options", part, dataclasses.field(default=part()))
        fields += [
            (name, Annotated[str, arg(help=text)], dataclasses.field(default=""))
            for name, text in lists_of_names()
        ]
    for group in (f.name for f in dataclasses.fields(Settings) if help_asked):
        kind = type(getattr(settings, group))
        if group == "options" or not dataclasses.is_dataclass(kind):
            continue
        if group in unused:
            fields.append((group, Annotated[kind, Suppress], dataclasses.field(default=kind())))
            continue
        hidden = [name.partition(".")[2] for name in unused if name.startswith(f"{group}.")]
        part = in_help(kind, hidden)
        fields.append((group, part, dataclasses.field(default=part())))
    made = dataclasses.make_dataclass(
        "Arguments",
        fields,
        bases=(Arguments,),
        # which would put the options of the method in place of those with ranges
        namespace={"__post_init__": lambda self: None} if help_asked else None,
        frozen=True,
    )
    made.__doc__ = Arguments.__doc__
    return made


def in_help(kind: type[Any], hidden: Sequence[str]) -> type[Any]:
    """Return a group of settings as the help shows it: with ranges, and without hidden fields."""
    from tyro.conf import Suppress, arg

    hints, ranges = typing.get_type_hints(kind), ranges_of(kind)
    fields: list[Any] = []
    for field in dataclasses.fields(kind):
        note: Any = None
        if field.name in hidden:
            note = Suppress
        elif field.name in ranges:
            note = arg(help_behavior_hint=f"(default: {{}}; {ranges[field.name].text})".format)
        if note is not None:
            default = dataclasses.field(default=field.default)
            fields.append((field.name, Annotated[hints[field.name], note], default))
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True)


A = TypeVar("A")


def remade(kind: type[A], values: Any) -> A:
    """Return an instance of a dataclass with the values that another one has under its names."""
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if not hasattr(values, field.name):
            continue
        value = getattr(values, field.name)
        inner = hints[field.name]
        nested = dataclasses.is_dataclass(value) and (
            field.name != "options" or issubclass(inner, type(value))
        )
        found[field.name] = remade(inner, value) if nested else value
    return kind(**found)
