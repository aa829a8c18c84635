"""Pages that are made of the code, so that they say what holds."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ctt import recipes
from ctt.methods import catalog
from ctt.ranges import ranges_of
from ctt.settings import Settings

ROOT = Path(__file__).parents[2]
FORMULAS = yaml.safe_load((ROOT / "docs" / "formulas.yaml").read_text("utf-8"))


def settings() -> str:
    """Return the page of all settings, a table for each group."""
    text = [
        "# Settings\n",
        "Every option of `ctt-train`, made from `ctt/settings.py`. Defaults are those of the paper "
        "where it prints one; [recipes](results.md#the-recipes) set what differs for a dataset. "
        "In a `--config` file a group is a block, and words are joined by underscores: "
        "`--data.batch-size 4` is `data: {batch_size: 4}`.\n",
    ]
    groups = {f.name: f for f in dataclasses.fields(Settings)}
    hints = typing.get_type_hints(Settings)
    plain = [name for name in groups if not dataclasses.is_dataclass(hints[name])]
    text += ["## The run\n", table(Settings, "--", plain)]
    for name in groups:
        if dataclasses.is_dataclass(hints[name]) and name != "options":
            text += [f"## `--{name.replace('_', '-')}.*`\n", table(hints[name], f"--{name}.")]
    text += ["## `--options.*`\n", "Each method has its own: see [Methods](methods.md).\n"]
    return "\n".join(text)


def table(owner: type, prefix: str, names: list[str] | None = None) -> str:
    """Return a table of the fields of a dataclass: option, default, range, what it is."""
    docs, hints, ranges = docs_of(owner), typing.get_type_hints(owner), ranges_of(owner)
    rows = ["| option | default | range | what it is |", "|---|---|---|---|"]
    for field in dataclasses.fields(owner):
        if names is not None and field.name not in names:
            continue
        option = f"{prefix}{field.name}".replace("_", "-")
        limits = ranges[field.name].text if field.name in ranges else ""
        first = f"`{option}`{choices(hints[field.name])}"
        cells = (first, shown(field), limits, docs.get(field.name, ""))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def docs_of(owner: type) -> dict[str, str]:
    """Return the string below each field of a class and of its parents, in one line."""
    docs: dict[str, str] = {}
    for parent in reversed(owner.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        body = ast.parse(inspect.cleandoc(inspect.getsource(parent))).body[0]
        assert isinstance(body, ast.ClassDef)
        for before, node in zip(body.body, body.body[1:], strict=False):
            if isinstance(before, ast.AnnAssign) and isinstance(node, ast.Expr):
                assert isinstance(before.target, ast.Name)
                docs[before.target.id] = " ".join(str(ast.literal_eval(node.value)).split())
    return docs


def choices(hint: Any) -> str:
    """Return the words that a field takes; empty where it takes numbers or any text."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is not typing.Literal:
        return ""
    return "<br>" + ", ".join(f"`{word}`" for word in typing.get_args(hint))


def shown(field: dataclasses.Field[Any]) -> str:
    """Return the default of a field as one would type it."""
    value = field.default
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def methods() -> str:
    """Return the table of the methods, and a section of each with its formula and departures."""
    rows = [
        "## Facts\n",
        "| `--method` | source | pairs | cost of a step | beside students and teachers |",
        "|---|---|---|---|---|",
    ]
    for name, about in catalog.METHODS.items():
        cost = f"{about.cost:g}" if about.cost else ""
        link = f"[`{name}`](#{anchor(name)})"
        rows.append(f"| {link} | {about.paper} | {about.pairs} | {cost} | {about.extra} |")
    rows += [
        "\nCosts are multiples of a mean teacher's step, measured on a CPU "
        "([table](method-costs.md)).\n",
        "## One by one\n",
        "Formulas show what is added to the supervised loss, for one student and pixel: $p$ is the "
        "student, $p'$ its teacher, $u_w$ and $u_s$ are the weak and the strong view of an "
        "unlabelled image, $m$ mixes two images by a mask, $T$ is a threshold, and $[\\,]$ is 1 "
        "where the condition holds.\n",
    ]
    return "\n".join([*rows, *map(method, catalog.METHODS)])


def method(name: str) -> str:
    """Return the section of one method."""
    about = catalog.METHODS[name]
    module = importlib.import_module(about.target.partition(":")[0])
    text = [f"### {name} {{ #{anchor(name)} }}\n", f"$$ {FORMULAS[name].strip()} $$\n"]
    text += [paragraphs(inspect.cleandoc(module.__doc__ or "")), "\n"]
    options = about.option_class()
    if dataclasses.fields(options):
        text += ['??? note "Settings of its own"\n']
        text += [f"    {line}" for line in table(options, "--options.").splitlines()]
    return "\n".join([*text, f"\nFile: `{module.__name__.replace('.', '/')}.py`\n"])


def anchor(name: str) -> str:
    """Return the anchor of a method's section."""
    return "method-" + name.replace("++", "-plus-plus")


def paragraphs(text: str) -> str:
    """Return a docstring as Markdown, with options as code and lists set apart."""
    text = re.sub(r"(?<![`\w-])(--[a-z][\w.-]*[\w])", r"`\1`", text)
    text = re.sub(r"``(--[^`]*)``", r"`\1`", text)
    return re.sub(r"(?m)^(?!- )(.+)\n(?=- )", r"\1\n\n", text)


def recipe_files() -> str:
    """Return the list of the recipes, each with its file."""
    text = ["## The recipes\n"]
    for name in recipes.names():
        content = (ROOT / "ctt" / "recipes" / f"{name}.yaml").read_text("utf-8").rstrip()
        text += [f'??? note "{name}"\n', "    ```yaml"]
        text += [f"    {line}".rstrip() for line in content.splitlines()] + ["    ```\n"]
    return "\n".join(text)


def examples() -> str:
    """Return the page of the scripts in examples/."""
    text = ["# Examples\n", "Each file of `examples/` runs in the tests.\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text("utf-8")
        first = (ast.get_docstring(ast.parse(code)) or "").splitlines()[0]
        text += [f"## {path.name}\n", f"{first}\n", f'??? example "{path.name}"\n', "    ```python"]
        text += [f"    {line}".rstrip() for line in code.splitlines()] + ["    ```\n"]
    text += notebook(ROOT / "examples" / "own_folder.ipynb")
    return "\n".join(text)


def notebook(path: Path) -> list[str]:
    """Return the cells of a notebook as Markdown, its headings below one of its name."""
    text = [f"## {path.name}\n"]
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            text.append(f"```python\n{source}\n```\n")
        else:
            text.append(re.sub(r"(?m)^#+", "###", source) + "\n")
    return text


def interfaces() -> dict[str, str]:
    """Return what mkdocstrings shall document at the end of each page."""
    operations = [
        "ema_update_", "class_topk", "queue_push_", "MemoryBank", "info_nce", "pair_info_nce",
        "available_backends", "prefer_backend",
    ]  # fmt: skip
    return {
        "operations.md": reference(f"ctt.ops.{name}" for name in operations),
        "python.md": reference(["ctt.load", "ctt.models.segmenter.Segmenter"]),
        "write-a-method.md": reference(
            ["ctt.methods.base.Method", "ctt.methods.base.Step", "ctt.methods.catalog.About"]
        ),
    }


def reference(names: Iterator[str] | list[str]) -> str:
    return "\n".join(["## Reference\n", *(f"::: {name}\n" for name in names)])
