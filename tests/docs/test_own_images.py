"""The transcript of docs/your-own-images.md runs: an export and photographs in, masks out."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.data import exports
from tests.docs.pages import ROOT, blocks, run

PAGE = ROOT / "docs" / "your-own-images.md"
SMALLER = (
    "--train.iterations 4 --bank.start-after 2 --model.width 4 --model.features 8 --data.workers 0 "
    "--data.batch-size 2 --train.threads 1 --train.no-tensorboard --train.measured-images 2"
)


def transcript() -> list[tuple[str, list[str]]]:
    """The commands of the page, each with the lines that it prints."""
    (text,) = (text for language, text in blocks(PAGE) if language == "console")
    steps: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            steps.append((line.removeprefix("$ "), []))
        else:
            steps[-1][1].append(line)
    return steps


def pattern(line: str) -> str:
    """What a line of the transcript matches: numbers and the best network may differ."""
    text = re.sub(r"(student|teacher)_\d", "NETWORK", line)
    parts = re.split(r"(NETWORK|[\d.,]*\d)", text)
    kinds = {"NETWORK": r"\w+"}
    return "".join(kinds.get(p, r"[\d.,]+") if i % 2 else re.escape(p) for i, p in enumerate(parts))


def test_from_an_export_to_masks_in_six_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocotools")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    exports.berries(tmp_path, size=(48, 64))
    steps = transcript()
    assert len(steps) <= 6
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for line, expected in steps:
        program = shlex.split(line)[0]
        if program in ("python3", "pip"):
            names = re.findall(r"\[(.*)\]", line)
            assert all(
                n in extras["optional-dependencies"] for n in ",".join(names).split(",") if n
            )
            continue
        run(f"{line} {SMALLER}" if program == "ctt-train" else line, monkeypatch)
        shown = capsys.readouterr().out
        for wanted in expected:
            assert wanted == "..." or re.search(pattern(wanted), shown), wanted
    assert len([*Path("predictions").glob("*_mask.png")]) == 200
