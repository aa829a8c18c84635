import pytest
from rich.table import Table

from ctt.console import plain_console
from ctt.errors import UserError
from ctt.text import drop_closed_streams, from_yaml

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


@pytest.mark.parametrize(
    ("text", "twice"), [("a: 1\nb: 2\na: 3\n", "'a'"), ("id_map: {0: x, 7: y, 7: z}\n", "7")]
)
def test_a_key_that_stands_twice_is_told(text: str, twice: str) -> None:
    with pytest.raises(UserError, match=f"dataset.yaml: .*{twice} stands there twice.* line"):
        from_yaml(text, "dataset.yaml")
    assert from_yaml("a: &x {q: 1}\nb: {<<: *x, q: 2}\n", "f")["b"] == {"q": 2}


def test_streams_that_python_never_had_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)  # as with `>&-`
    assert drop_closed_streams() is False
