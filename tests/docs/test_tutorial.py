"""The tutorial runs from its first script to its last, with fewer iterations."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ctt import recipes
from tests.docs.pages import ROOT, blocks, command_lines, run

PAGE = ROOT / "docs" / "train-on-your-images.md"
SHORTER = {"--train.iterations 200": "--train.iterations 2", "--start-after 100": "--start-after 1"}


def test_the_tutorial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for language, text in blocks(PAGE):
        if language == "python":
            exec(compile(text, PAGE.name, "exec"), names)
        elif language == "bash":
            for long, short in SHORTER.items():
                text = text.replace(long, short)
            run(text, monkeypatch)
    summary = json.loads(Path("runs/mine/summary.json").read_text("utf-8"))
    assert summary["iterations"] == 2
    photos = sorted(path.stem for path in Path("mine/photos").iterdir())
    masks = sorted(Path("predictions").glob("*_mask.png"))
    assert [path.name for path in masks] == [f"{name}_mask.png" for name in photos]
    with Image.open(masks[0]) as mask:
        assert mask.size == (40, 40)
    assert "of the pixels are digit" in capsys.readouterr().out


def test_own_images_in_the_commands_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands as they stand, but for the recipe, how long it trains and the download."""
    monkeypatch.chdir(tmp_path)
    script = next(text for language, text in blocks(PAGE) if language == "python")
    exec(compile(script, PAGE.name, "exec"), {})
    Path("mine/photos").rename("photos")
    (backbone,) = recipes.load("folder")["model"]["backbone"]
    lines = [line for line in command_lines(ROOT / "README.md") if re.search("mine|fetch", line)]
    programs = ["ctt-data check", "ctt-data fetch", "ctt-train --dataset", "ctt-predict runs/mine"]
    assert [" ".join(line.split()[:2]) for line in lines] == programs
    lines.remove(f"ctt-data fetch weights --backbone {backbone}")
    for line in lines:
        quick = " --recipe folder-small --train.iterations 1 --data.workers 0"
        run(line + quick * line.startswith("ctt-train"), monkeypatch)
    assert len(list(Path("predictions").glob("*_mask.png"))) == 8
