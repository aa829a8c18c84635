"""The pages that people read, and what is in them."""

import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the language and the text of each block of code, in the order of the page."""
    return BLOCK.findall(page.read_text("utf-8"))


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return BLOCK.sub("", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


def command_lines(page: Path) -> list[str]:
    """Return the commands of the blocks of bash of a page, without comments."""
    text = "\n".join(text for language, text in blocks(page) if language == "bash")
    lines = (line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command that begins with one of the package's programs; it must succeed."""
    name, *arguments = shlex.split(line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["scripts"][name].partition(":")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as stop:
        getattr(importlib.import_module(module), function)()
    assert not stop.value.code, line
