"""Links lead somewhere, and code in the pages can be read by Python and by the programs."""

import re
from pathlib import Path

import pytest

from ctt import methods
from ctt.cli.train import parse
from tests.docs.pages import LINK, PAGES, ROOT, anchors, blocks, command_lines, prose

EVERY = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


@EVERY
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"\w+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@EVERY
def test_python_in_pages_can_be_compiled(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            compile(text, page.name, "exec")


def training_commands() -> list[str]:
    """Return the arguments of every `ctt-train` of the pages, but for those with placeholders."""
    found = set()
    for line in (line for page in PAGES for line in command_lines(page)):
        _, program, arguments = line.partition("ctt-train ")
        if program and not re.search(r"METHOD|my_method|examples/|[\"$]", line):
            found.add(arguments)
    return sorted(found)


@pytest.mark.parametrize("arguments", training_commands())
def test_commands_of_the_pages_have_settings_that_exist(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("seed: 3\n")
    words = [word for word in arguments.split() if word not in ("--dry-run", "--list-methods")]
    if "--resume" not in words and "--help" not in words:
        parse(words)


def test_the_skeleton_of_a_method_can_be_loaded(tmp_path: Path) -> None:
    text = next(t for name, t in blocks(ROOT / "docs/write-a-method.md") if name == "python")
    (tmp_path / "skeleton.py").write_text(text)
    settings = parse(["--method", f"{tmp_path / 'skeleton.py'}:MyMethod", "--options.weight", "2"])
    assert vars(settings.options) == {"weight": 2}


def test_the_readme_counts_the_methods() -> None:
    said = re.findall(r"\b(\d+) methods\b", (ROOT / "README.md").read_text("utf-8"))
    assert str(len(methods.names())) in said
