"""The command line is frozen: who changes it sees it here, and in the changelog what users must do.

python -m tests.cli.test_options > tests/cli/options.txt
"""

import dataclasses
import importlib
import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

from ctt import methods

FROZEN = Path(__file__).with_name("options.txt")
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def options_of(owner: type, prefix: str = "") -> Iterator[str]:
    """Yield the options of a dataclass; without dashes those that have no default."""
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        name, kind = f"{prefix}{field.name}".replace("_", "-"), hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from options_of(typing.cast(type, kind), f"{name}.")
            continue
        required = field.default is field.default_factory is dataclasses.MISSING
        yield name.upper() if required else f"--{name}"


def commands() -> Iterator[tuple[str, type]]:
    """Yield each program and command with the dataclass of its arguments."""
    scripts = tomllib.loads(PROJECT.read_text("utf-8"))["project"]["scripts"]
    for program, target in scripts.items():
        module = importlib.import_module(target.partition(":")[0])
        if hasattr(module, "Arguments"):
            yield program, module.Arguments
            continue
        # one class for each command, in this module or in one that it imports
        source = Path(module.__file__ or "").read_text("utf-8")
        others = re.findall(r"from (ctt\.cli\.\w+) import", source)
        for owner in (module, *map(importlib.import_module, sorted(set(others)))):
            for name, kind in vars(owner).items():
                if dataclasses.is_dataclass(kind) and kind.__module__ == owner.__name__:
                    command = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
                    yield f"{program} {command}", typing.cast(type, kind)


def lines() -> list[str]:
    """Return one line for each option of each program and method."""
    found = [f"{name} {option}" for name, kind in commands() for option in options_of(kind)]
    for name in methods.names():
        own = options_of(methods.get(name).option_class(), "options.")
        found += [f"ctt-train --method {name} {option}" for option in own]
    return sorted(set(found))


def test_the_options_are_those_of_the_file() -> None:
    frozen = FROZEN.read_text("utf-8").splitlines()
    now = lines()
    gone, new = sorted(set(frozen) - set(now)), sorted(set(now) - set(frozen))
    told = f"{__doc__}\ngone: {gone}\nnew: {new}"
    assert (gone, new) == ([], []), told


if __name__ == "__main__":
    print("\n".join(lines()))
