import pytest
from rich.table import Table

from ctt.console import plain_console

NAMES = ("runs/[test] a", "a/[/x]", "[red]sky", ":cat:/1", "[/]")


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="[b] set")
    table.add_column("class")
    for name in NAMES:
        table.add_row(name)
        plain_console().print(name, soft_wrap=True)
    plain_console().print(table)
    shown = capsys.readouterr().out
    assert shown.startswith("\n".join(NAMES))
    assert "[b] set" in shown
    assert all(shown.count(name) == 2 for name in NAMES[:-1])
    plain_console(quiet=True).print("nothing")
    assert capsys.readouterr().out == ""
