"""ctt-report: one page of tables and charts of what ctt-sweep has trained."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ctt.cli.common import refuse_torchrun, run_program
from ctt.errors import UserError
from ctt.text import say

PAGE, TEXT = (".html", ".htm"), ".md"


@dataclass(frozen=True)
class Arguments:
    """Write a page of the experiments in a folder, as HTML that needs nothing else, and the same
    tables as Markdown beside it."""

    path: Path
    """Folder that ctt-sweep wrote into, or one table in it."""
    embeddings: bool = False
    """Also draw, for the first run of each row that lies there, where pixels of labelled and
    unlabelled images are among its features (t-SNE): seconds to minutes for each."""
    out: Path | None = None
    """The page; by default report.html in the folder. Its tables go into a .md file of the same
    name."""


def main() -> None:
    """Run the program."""
    run_program("ctt-report", lambda: _main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    import tyro

    parsed = tyro.cli(
        Arguments,
        prog="ctt-report",
        args=arguments,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    refuse_torchrun("ctt-report")
    if not parsed.path.exists():
        raise UserError(f"{parsed.path}: there is no such folder or table.")
    folder = parsed.path if parsed.path.is_dir() else parsed.path.parent
    out = parsed.out or folder / "report.html"
    if out.suffix not in PAGE:
        raise UserError(f"--out {out}: give a name that ends in {PAGE[0]}.")
    from ctt.experiments.pages import as_html, as_markdown, sections
    from ctt.files import atomic_write

    refuse_other_text(out.with_suffix(TEXT))
    found = sections(parsed.path, parsed.embeddings)
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((out, as_html(found)), (out.with_suffix(TEXT), as_markdown(found))):
        with atomic_write(path) as part:
            part.write_text(text, "utf-8")
    say(f"The page is {out}, its tables as text {out.with_suffix(TEXT)}")
    return 0


def refuse_other_text(path: Path) -> None:
    """Refuse to replace a text that is no report: the user named the page alone.

    Raises:
        UserError: names the file.
    """
    from ctt.experiments.pages import HEADING

    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline()
    except FileNotFoundError:
        return
    if first.strip() != HEADING:
        raise UserError(
            f"{path} is there and no report, and the tables of the page go into a file of that "
            f"name. Give another --out."
        )
