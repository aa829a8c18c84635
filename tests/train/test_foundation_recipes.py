"""Every recipe with a foundation encoder trains on a made-up tree, with a small ViT."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from ctt import checkpoint, recipes, run
from ctt.cli import evaluate, export, predict
from ctt.cli import train as program
from tests.data import trees
from tests.train.test_loop import stop_after

NAMES = [name for name in recipes.names() if "-dinov2-" in name]
SMALL = (
    "--model.backbone test_vit --train.iterations 2 --train.log-every 1 "
    "--train.eval-every 2 --train.no-tensorboard --train.measured-images 0 --train.threads 1 "
    "--data.workers 0 --data.batch-size 2 --data.crop 48 48 --bank.capacity 4"
)


def small(name: str, folder: Path) -> list[str]:
    """Return what makes a recipe small; `folder` gets weights of a backbone that is frozen."""
    window = "--eval.window 48 48 " if name.startswith("cityscapes") else ""
    weights = "none"
    if "frozen" in name:
        weights = str(folder / "backbone.safetensors")
        save_file(timm.create_model("test_vit").state_dict(), weights)
    return ["--model.weights", weights, *f"{window}{SMALL}".split()]


def tree(root: Path, name: str) -> Path:
    if name.startswith("voc"):
        trees.write_voc(root, classic=4, augmented=4, evaluation=1)
    elif name.startswith("cityscapes"):
        trees.write_cityscapes(root, train=6, evaluation=1)
    elif name.startswith("ade20k"):
        trees.write_ade20k(root, train=6, evaluation=1)
    else:
        pytest.importorskip("pycocotools")
        from ctt.data.coco import write_masks

        write_masks(trees.write_coco(root), 1, lambda part, images: None, lambda: None)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_the_recipe(tmp_path: Path, name: str) -> None:
    place = ["--data-root", str(tree(tmp_path / "data", name)), "--out", str(tmp_path / "run")]
    shown = [*small(name, tmp_path), *place]
    if "unimatch" in name or "fixmatch" in name:
        shown = [a for a in shown if a not in ("--bank.capacity", "4")]
    assert program._main(["--recipe", name, "--ratio", "1/2", *shown]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["iterations"] == 2
    assert summary["miou"]["teacher_1"] is not None
    rows = (tmp_path / "run" / "metrics.csv").read_text("utf-8").splitlines()
    assert "nan" not in rows[1]


def test_the_recipes_are_there_for_every_data_set() -> None:
    for dataset in ("voc-classic", "cityscapes", "ade20k", "coco"):
        for method in ("unimatch-v2", "fixmatch", "cross-teacher"):
            assert f"{dataset}-dinov2-{method}" in NAMES


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("ade20k-dinov2-unimatch-v2", "ADEChallengeData2016/images/validation"),
        pytest.param("coco-dinov2-cross-teacher", "val2017", marks=pytest.mark.slow),
    ],
)
def test_from_training_to_masks(tmp_path: Path, name: str, folder: str) -> None:
    """Trained, stopped, resumed bit-equal, evaluated, predicted, exported."""
    root, out, whole = tree(tmp_path / "data", name), tmp_path / "run", tmp_path / "whole"
    given = ["--recipe", name, "--ratio", "1/2", "--data-root", str(root), "--train.deterministic"]
    given += small(name, tmp_path) if "cross" in name else small(name, tmp_path)[:-2]
    assert program._main([*given, "--out", str(whole)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert program._main([*given, "--out", str(out)]) == 130
    assert program._main(["--resume", str(out)]) == 0
    states = [checkpoint.load(place / run.CHECKPOINT) for place in (whole, out)]
    for key, value in states[0]["method"].items():
        assert torch.equal(value, states[1]["method"][key]), key
    scores = tmp_path / "scores"
    assert evaluate._main([str(out), "--out", str(scores), "--workers", "0"]) == 0
    summaries = [json.loads((f / "summary.json").read_text("utf-8")) for f in (out, scores)]
    assert summaries[0]["miou"] == summaries[1]["miou"]
    picture = next((root / folder).iterdir())
    masks = ["--out", str(tmp_path / "masks"), "--network", "ensemble"]
    assert predict._main([str(out), str(picture), *masks]) == 0
    (mask,) = (tmp_path / "masks").glob("*_mask.png")
    with Image.open(picture) as photo, Image.open(mask) as found:
        assert found.size == photo.size
    options = ["--network", "teacher_1", "--format", "safetensors"]
    assert export._main([str(out), *options, "--out", str(tmp_path / "net.safetensors")]) == 0
