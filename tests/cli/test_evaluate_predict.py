import csv
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ctt
from ctt import checkpoint, run
from ctt.cli import evaluate, export, predict, train
from ctt.data import open_dataset
from ctt.data.digits import Digits
from ctt.data.folder import refuse_among_images
from ctt.data.options import DatasetOptions
from ctt.data.pictures import read_image
from ctt.errors import UserError
from ctt.inference import predict as inference
from ctt.inference.load import TrainedNetworks, load_trained
from ctt.settings import EvalSettings
from tests.data import trees

RESULTS = ("_mask.png", "_overlay.png", "_confidence.png")
SCORES = ("miou", "class_iou", "absent", "pixel_accuracy")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    dataset = Digits(2, 3)
    for name in dataset.eval_ids():
        Image.fromarray(dataset.image(name).permute(1, 2, 0).numpy()).save(folder / f"{name} ü.png")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (33, 57), np.uint8)).save(folder / "grey.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def call(program: Callable[[], None], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ctt", *arguments])
    with pytest.raises(SystemExit) as stop:
        program()
    return int(stop.value.code or 0)


def test_evaluation_of_a_run_repeats_its_summary(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores"
    arguments = [str(folder), "--out", str(out), "--workers", "1"]
    assert call(evaluate.main, arguments, monkeypatch) == 0
    scores = json.loads((out / "summary.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    for key in (*SCORES, "protocol", "images", "images_sha256"):
        assert scores[key] == summary[key]
    whole = {"name": "whole", "scales": [1.0], "flip": False, "amp": "off", "fit": "pad"}
    assert scores["protocol"] == whole
    names = "".join(f"{name}\n" for name in Digits(24, 6).eval_ids())
    assert scores["images_sha256"] == hashlib.sha256(names.encode()).hexdigest()
    checkpoint = (folder / "checkpoints" / "last.pt").read_bytes()
    assert scores["weights_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert len(list(out.glob("confusion_*.png"))) == 5
    rows = list(csv.reader((out / "confusion_ensemble.csv").open(encoding="utf-8")))
    counts = np.array([row[1:] for row in rows[1:]], dtype=int)
    assert counts.sum() == 6 * 40 * 40
    accuracy = 100 * counts.trace() / counts.sum()
    assert scores["pixel_accuracy"]["ensemble"] == pytest.approx(accuracy, abs=0.01)
    assert call(evaluate.main, arguments, monkeypatch) == 2  # the folder is not empty


def test_a_network_gives_the_same_masks_wherever_it_is_read_from(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run folder, its file of weights, an exported file and ctt.load show images alike."""
    out, sent = tmp_path / "run", tmp_path / "sent.safetensors"
    quick = (
        "--ratio 6 --data.labeled-pool 24 --data.eval-images 6 --data.batch-size 2 --model.width 4 "
        "--model.features 8 --train.threads 1 --train.iterations 3 --eval.protocol half --eval.flip"
    )
    assert train._main([*quick.split(), "--out", str(out)]) == 0
    options = ["--format", "safetensors", "--out", str(sent)]
    assert export._main([str(out), *options]) == 0
    file = next(images.glob("* ü.png"))
    given = [ctt.load(path).predict(file, probabilities=True) for path in (out, sent)]
    found = [(255 * probability.amax(dim=0)).round().numpy() for probability in given]
    for n, weights in enumerate((out, out / "best.safetensors", sent)):
        arguments = [str(weights), str(file), "--confidence", "--out", str(tmp_path / str(n))]
        assert call(predict.main, arguments, monkeypatch) == 0
        found.append(np.array(Image.open(tmp_path / str(n) / f"{file.stem}_confidence.png")))
    assert len(np.unique(found[0])) > 1
    assert all(np.array_equal(found[0], other) for other in found)
    more = ["--eval.protocol", "whole", "--confidence", "--out", str(tmp_path / "whole")]
    assert call(predict.main, [str(sent), str(file), *more], monkeypatch) == 0
    whole = np.array(Image.open(tmp_path / "whole" / f"{file.stem}_confidence.png"))
    assert not np.array_equal(whole, found[0])
    for weights in (out, sent):
        protocol = load_trained(weights).settings.eval
        assert (protocol.protocol, protocol.flip) == ("half", True)


DYING = """
import os, signal, sys
import torch.utils.data
import {module} as module
from ctt.cli.{program} import main

read = module.{reader}

def dying(*arguments, **options):
    if torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*arguments, **options)

module.{reader} = dying
main()
"""


@pytest.mark.parametrize(
    ("program", "module", "reader", "options"),
    [
        ("evaluate", "ctt.inference.evaluate", "read_pair", "--workers 2"),
        ("predict", "ctt.data.pictures", "read_image", "{images} --workers 2 --out {out}"),
        ("train", "ctt.inference.evaluate", "read_pair", "--train.iterations 4 --data.workers 1"),
    ],
)
def test_a_loader_process_that_dies_ends_each_program_with_one_paragraph(
    folder: Path, images: Path, tmp_path: Path, program: str, module: str, reader: str, options: str
) -> None:
    """In training, one of the evaluation."""
    script = DYING.format(program=program, module=module, reader=reader)
    resumed = shutil.copytree(folder, tmp_path / "run")
    arguments = [text.format(images=images, out=tmp_path / "masks") for text in options.split()]
    given = ["--resume", str(resumed)] if program == "train" else [str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", script, *given, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = " ".join(done.stderr.split())
    assert done.returncode == 2, said
    assert said.startswith(f"ctt-{PROGRAMS[program]}: A process that loads images has ended (")
    assert said.count(" has ended (") == 1
    assert "Traceback" not in said
    if program == "train":
        assert f"The last checkpoint is whole: --resume {resumed} goes on from it." in said
        assert checkpoint.load(resumed / run.CHECKPOINT)["iteration"] == 4


PROGRAMS = {"evaluate": "eval", "predict": "predict", "train": "train"}


def test_a_checkpoint_of_another_network_is_refused(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(folder, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text("utf-8").replace("width: 4", "width: 5"), "utf-8")
    assert call(evaluate.main, [str(tmp_path / "run")], monkeypatch) == 2
    assert "checkpoint and config.yaml do not fit" in " ".join(capsys.readouterr().err.split())


def test_only_the_networks_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores"
    protocol = (
        "--eval.protocol sliding --eval.window 17 20 --eval.stride 0.5 --eval.flip "
        "--eval.scales 0.75 1 --eval.amp bf16 --workers 0"
    )
    chosen = ["--network", "ensemble", "student_2", "--out", str(out), *protocol.split()]
    assert call(evaluate.main, [str(folder), *chosen], monkeypatch) == 0
    scores = json.loads((out / "summary.json").read_text())
    assert list(scores["miou"]) == ["student_2", "ensemble"]
    assert scores["protocol"] == {
        "name": "sliding",
        "window": [17, 20],
        "stride": 0.5,
        "scales": [0.75, 1.0],
        "flip": True,
        "amp": "bf16",
        "fit": "pad",
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--split tune", "were trained with those images"),
        ("--network teacher_9", "Networks: student_1, student_2, teacher_1, teacher_2, ensemble."),
        ("--eval.scales 0 1", "--eval.scales must be factors in 0.1..10"),
        ("--eval.window 4 4", "--eval.window must be at least 8 8"),
        ("--eval.stride 900", "--eval.stride must be a share"),
        ("--eval.window 16 16", "--eval.window changes nothing with --eval.protocol whole"),
        ("--dataset nope", "no such dataset"),
        ("--device cuda:99", "--device cuda:99 cannot be used here"),
        ("--workers -1", "--workers -1 must be at least 0"),
    ],
)
def test_bad_options_of_evaluation(
    arguments: str,
    text: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(evaluate.main, [str(folder), *arguments.split()], monkeypatch) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert text in shown
    assert "Traceback" not in shown


def test_evaluation_of_weights_names_their_origin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(evaluate.main, [str(folder / "best.safetensors")], monkeypatch) == 0
    assert re.search(r"(student|teacher)_[12] after [123] iterations", capsys.readouterr().out)


def test_weights_of_other_classes_or_unknown_data(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network, info, note = checkpoint.load_network(folder / "best.safetensors")
    other = dataclasses.replace(info, name="moon", classes=("sky", *info.classes[1:]))
    checkpoint.save_network(tmp_path / "moon.safetensors", network, other, note)
    for arguments, text in (
        ([], "trained on moon, which is no dataset of this installation"),
        (["--dataset", "digits"], "class 0 is 'sky' to the network and 'background' in the data"),
    ):
        paths = [str(tmp_path / "moon.safetensors"), *arguments]
        assert call(evaluate.main, paths, monkeypatch) == 2
        assert text in " ".join(capsys.readouterr().err.split())


def test_masks_and_overlays(
    folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert call(predict.main, [str(folder), str(images), "--out", str(out)], monkeypatch) == 0
    assert len(list(out.iterdir())) == 8
    with Image.open(out / "grey_mask.png") as mask:
        assert mask.mode == "P"
        assert mask.size == (57, 33)
        assert np.array(mask).max() <= 10
        assert mask.getpalette()[3:6] == [230, 25, 75]
    with Image.open(out / "grey_overlay.png") as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (57, 33))
    again = [str(folder / "best.safetensors"), str(images), "--out", str(out)]
    assert call(predict.main, again, monkeypatch) == 2
    assert call(predict.main, [*again, "--overwrite"], monkeypatch) == 0
    (out / "grey_mask.png").unlink()
    only_grey = [str(folder), str(images / "grey.jpg"), "--out", str(out)]
    assert call(predict.main, only_grey, monkeypatch) == 2  # the overlay is still there


def test_images_of_every_kind(tmp_path: Path) -> None:
    """Grey, 16 bits, transparent and turned pictures are seen as a viewer shows them."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 30), np.uint8)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(expected).quantize(256).save(tmp_path / "palette.png")
    clear = np.dstack([expected, np.full_like(grey, 255)])
    clear[:10, :, 3] = 0
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    turned = Image.fromarray(expected).rotate(90, expand=True)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("grey.png", "deep.png", "deep.tif", "int.tif", "float.tif", "turned.png"):
        found = read_image(tmp_path / name).permute(1, 2, 0).numpy()
        assert np.array_equal(found, expected), name
    palette = read_image(tmp_path / "palette.png").permute(1, 2, 0).numpy()
    assert np.abs(palette.astype(int) - expected).max() <= 1
    found = read_image(tmp_path / "clear.png").permute(1, 2, 0).numpy()
    assert np.array_equal(found[10:], expected[10:])
    assert (found[:10] == 255).all()


def test_only_masks_and_confidence(
    folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = [str(folder), str(images / "grey.jpg"), "--out", str(out), "--no-overlay"]
    assert call(predict.main, [*arguments, "--confidence"], monkeypatch) == 0
    assert sorted(p.name for p in out.iterdir()) == ["grey_confidence.png", "grey_mask.png"]
    with Image.open(out / "grey_confidence.png") as picture:
        confidence = np.array(picture)
    assert confidence.shape == (33, 57)
    assert confidence.min() >= 255 // 11  # the largest of eleven probabilities


def test_windows_and_networks_of_a_run(
    folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best network, a window larger than the image: as without windows; the ensemble works."""
    protocol = "--eval.protocol sliding --eval.window 64 64 --no-overlay --workers 0"
    masks = {}
    for name, extra in (
        ("plain", []),
        ("sliding", protocol.split()),
        ("windows", ["--eval.protocol", "sliding", "--eval.window", "16", "24"]),
        ("ensemble", ["--network", "ensemble", "--eval.flip"]),
    ):
        arguments = [str(folder), str(images / "grey.jpg"), "--out", str(tmp_path / name), *extra]
        assert call(predict.main, arguments, monkeypatch) == 0
        with Image.open(tmp_path / name / "grey_mask.png") as mask:
            masks[name] = np.array(mask)
        assert masks[name].shape == (33, 57)
    assert np.array_equal(masks["plain"], masks["sliding"])


def test_patterns_and_subfolders(
    folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = images / "deeper" / "still [1]"
    inner.mkdir(parents=True)
    shutil.copy(images / "grey.jpg", inner / "grey.jpg")
    shutil.copy(images / "grey.jpg", inner / "._grey.jpg")  # as macOS leaves them
    weights = str(folder / "best.safetensors")
    for number, (paths, expected) in enumerate(
        [
            ([str(images)], 4),
            ([str(images), "--recursive"], 5),
            ([f"{images}/*.jpg"], 1),
            ([f"{images}/v*.png", f"{images}/deeper/**/*.jpg"], 4),
        ]
    ):
        out = images / "results" if number == 1 else tmp_path / str(number)
        arguments = [weights, *paths, "--out", str(out), "--no-overlay"]
        assert call(predict.main, arguments, monkeypatch) == 0
        assert len(list(out.rglob("*_mask.png"))) == expected
    assert (images / "results" / "deeper" / "still [1]" / "grey_mask.png").is_file()
    again = [weights, str(images), "--recursive", "--out", str(images / "results"), "--overwrite"]
    assert call(predict.main, again, monkeypatch) == 0  # its own results are no images


def test_results_beside_the_images_are_no_images(
    folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder / "best.safetensors"), str(images), "--out", str(images)]
    options = ["--confidence", "--workers", "0"]
    assert call(predict.main, [*arguments, *options], monkeypatch) == 0
    before = sorted(images.iterdir())
    assert len(before) == 5 + 3 * 4
    shutil.copy(images / "grey.jpg", images / "new.jpg")
    assert call(predict.main, [*arguments, *options, "--skip-existing"], monkeypatch) == 0
    assert "1 of 1 images" in capsys.readouterr().out
    expected = [*before, *(images / f"new{end}" for end in (".jpg", *RESULTS))]
    assert sorted(images.iterdir()) == sorted(expected)
    pattern = [arguments[0], f"{images}/*g", *arguments[2:], *options, "--overwrite"]
    assert call(predict.main, pattern, monkeypatch) == 0
    assert "5 of 5 images" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["unlabeled", "images/leaves", "val/masks/new"])
def test_results_among_the_images_of_a_dataset_are_refused(
    part: str,
    folder: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "mine"
    (root / "unlabeled").mkdir(parents=True)
    (root / "dataset.yaml").write_text("classes: [a, b]\n")
    out = ["--out", str(root / part)]
    for program, arguments in (
        (predict.main, [str(folder), str(images)]),
        (predict.main, [str(folder), "--rank"]),
        (evaluate.main, [str(folder)]),
        (train.main, ["--dry-run"]),
    ):
        assert call(program, [*arguments, *out], monkeypatch) == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert "a part of that dataset, so what is written there would be trained on" in shown
    for option in ("--submission", "--embedding"):
        assert call(evaluate.main, [str(folder), option, out[1]], monkeypatch) == 2
        assert capsys.readouterr().err.split()[1] == option
    assert sorted(path.name for path in root.iterdir()) == ["dataset.yaml", "unlabeled"]
    for other in (root / "predictions", tmp_path / "images"):
        refuse_among_images(other)
    (root / "images").symlink_to(images)  # links are followed when a dataset is read
    for place in (root / "images/new", root / "images/../images"):
        with pytest.raises(UserError, match="would be trained on"):
            refuse_among_images(place)
    refuse_among_images(root / "images/../predictions")


def test_an_image_that_is_named_twice_is_segmented_once(
    folder: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(images)
    (images / "link.jpg").symlink_to(images / "grey.jpg")
    paths = [f"{images}/*.jpg", "grey.jpg", f"{images}/../{images.name}/link.jpg", "."]
    options = ["--out", str(tmp_path / "out"), "--workers", "0", "--no-overlay"]
    assert call(predict.main, [str(folder), *paths, *options], monkeypatch) == 0
    assert "5 of 5 images" in capsys.readouterr().out
    assert (tmp_path / "out" / "link_mask.png").is_file()


@pytest.mark.parametrize(
    ("trained", "chosen", "protocol", "scales"),
    [
        ("half", "", "whole", (0.5, 1.0)),
        ("half", "half", "whole", (0.5, 1.0)),
        ("half", "whole", "whole", (1.0, 2.0)),
        ("center-crop", "", "whole", (1.0, 2.0)),
        ("whole", "half", "whole", (0.5, 1.0)),
    ],
)
def test_images_are_shown_as_in_the_evaluations(
    trained: str,
    chosen: str,
    protocol: str,
    scales: tuple[float, ...],
    folder: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[EvalSettings] = []
    monkeypatch.setattr(
        TrainedNetworks,
        "predictor",
        lambda self, device, settings: seen.append(settings) or sys.exit(7),
    )
    shutil.copytree(folder, tmp_path / "run")
    settings = run.read_settings(folder)
    as_trained = EvalSettings(protocol=trained, scales=(1.0, 2.0))  # type: ignore[arg-type]
    run.write_settings(tmp_path / "run", dataclasses.replace(settings, eval=as_trained))
    options = ["--eval.protocol", chosen] if chosen else []
    arguments = [str(tmp_path / "run"), str(images), "--out", str(tmp_path / "out"), *options]
    assert call(predict.main, arguments, monkeypatch) == 7
    assert [(s.protocol, s.scales) for s in seen] == [(protocol, scales)]


def test_a_broken_image_costs_only_itself(
    folder: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = (images / "grey.jpg").read_bytes()
    (images / "grey.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "a.png").write_bytes(b"no image at all")
    out = tmp_path / "out"
    assert call(predict.main, [str(folder), str(images), "--out", str(out)], monkeypatch) == 2
    shown = capsys.readouterr()
    assert "3 of 5 images are segmented" in shown.out
    assert re.search("a.png cannot be read.*grey.jpg cannot be read", shown.err, re.DOTALL)
    done = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert len(done) == 6
    (images / "grey.jpg").write_bytes(whole)
    (images / "a.png").unlink()
    rest = [str(folder), str(images), "--out", str(out), "--skip-existing"]
    assert call(predict.main, rest, monkeypatch) == 0
    assert "1 of 1 images" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(out.iterdir())) == 8
    assert call(predict.main, rest, monkeypatch) == 0  # nothing is left to do
    assert re.search("0 of 0 images are .*, 4 were there already", capsys.readouterr().out)


def test_too_little_memory_names_the_image_and_the_mend(
    folder: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_memory(network: object, amp: str, shown: Tensor) -> Tensor:
        if shown.shape[-1] == 57:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return torch.zeros(len(shown), 11, *shown.shape[-2:])

    monkeypatch.setattr(inference, "whole", no_memory)
    out = tmp_path / "out"
    assert call(predict.main, [str(folder), str(images), "--out", str(out)], monkeypatch) == 2
    shown = capsys.readouterr()
    assert "3 of 4 images" in shown.out
    assert "grey.jpg: There is not enough memory" in shown.err
    assert "--eval.protocol sliding" in shown.err


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "none",
        "pattern",
        "broken",
        "empty",
        "twice",
        "weights",
        "network",
        "crop",
        "window",
        "workers",
    ],
)
def test_bad_input(
    kind: str,
    folder: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights, paths, options = folder, [images], []
    if kind == "missing":
        paths = [tmp_path / "nobody.png"]
    elif kind == "none":
        paths = []
    elif kind == "pattern":
        paths = [images / "*.tiff"]
    elif kind == "network":
        options = ["--network", "teacher_3"]
    elif kind == "workers":
        options = ["--workers", "-2"]
    elif kind == "crop":
        options = ["--eval.protocol", "center-crop"]
    elif kind == "window":
        options = ["--eval.window", "16", "16"]
    elif kind == "broken":
        whole = (images / "grey.jpg").read_bytes()
        (images / "grey.jpg").write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        paths = [tmp_path / "no images"]
        paths[0].mkdir()
    elif kind == "twice":
        (tmp_path / "grey.png").write_bytes(b"another image of that name")
        paths = [images, tmp_path / "grey.png"]
    else:
        weights = images / "notes.txt"
    arguments = [str(weights), *map(str, paths), "--out", str(tmp_path / "out"), *options]
    assert call(predict.main, arguments, monkeypatch) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    expected = {
        "missing": "no such image",
        "none": "Which images?",
        "pattern": "no such image",
        "network": "Networks: student_1, student_2, teacher_1, teacher_2, ensemble.",
        "workers": "--workers -2 must be at least 0",
        "crop": "a mask is made of the whole image",
        "window": "--eval.window changes nothing with --eval.protocol whole",
        "broken": "grey.jpg cannot be read as an image",
        "empty": "No image found",
        "twice": "would both be written",
        "weights": "notes.txt is no safetensors file",
    }[kind]
    assert expected in " ".join(shown.split())


def test_images_of_another_folder_are_all_scored_whatever_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as those of another site, which have running numbers too."""
    counts = {"labeled": 3, "unlabeled": 2, "size": (20, 24)}
    trees.write_folder(tmp_path / "data", evaluation=1, **counts)
    trees.write_folder(tmp_path / "other", evaluation=4, **counts)
    for i, path in enumerate(sorted((tmp_path / "other").rglob("images/**/*.jpg"))):
        noise = np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(noise).save(path)
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    image, label = trees.picture((20, 24), (1, 2), 9)
    trees.save_image(tmp_path / "moved" / "val" / "images" / "later.jpg", image)
    trees.save_mask(tmp_path / "moved" / "val" / "masks" / "later.png", label)
    for path in (tmp_path / "moved" / "masks").rglob("*.png"):  # the same masks in other files
        Image.open(path).save(path, compress_level=0)
    monkeypatch.chdir(tmp_path)
    quick = (
        "--recipe digits --dataset folder --data-root data --out run --ratio 1/1 "
        "--data.batch-size 2 --data.crop 16 16 --model.width 4 --model.features 8 "
        "--train.threads 1 --data.workers 0 --train.iterations 1"
    )
    assert call(train.main, quick.split(), monkeypatch) == 0
    for root, scored, said in (
        ("other", 4, "other holds other images than those that the run was trained with"),
        ("moved", 1, "1 images to evaluate on came later and are left out"),
    ):
        for weights in ("run", "run/best.safetensors"):
            capsys.readouterr()
            out = f"{root} {len(weights)}"
            arguments = [weights, "--data-root", root, "--workers", "0", "--out", out]
            assert call(evaluate.main, arguments, monkeypatch) == 0
            shown = " ".join(capsys.readouterr().out.split())
            assert said in shown
            assert f"{scored} images of folder/val in {root}" in shown
            assert json.loads(Path(out, "summary.json").read_text("utf-8"))["images"] == scored


def test_images_that_came_later_do_not_change_what_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = trees.write_folder(tmp_path / "data", labeled=10, unlabeled=0, evaluation=0), "run"
    monkeypatch.chdir(tmp_path)
    quick = (
        "--recipe digits --dataset folder --data-root data --out run --ratio 5 --data.batch-size 2 "
        "--data.crop 16 16 --model.width 4 --model.features 8 --train.threads 1 --data.workers 0 "
        "--train.iterations 3"
    )
    assert call(train.main, quick.split(), monkeypatch) == 0
    before = json.loads(Path(out, "summary.json").read_text("utf-8"))
    held_out = Path(out, "split", "evaluation.txt").read_text("utf-8").splitlines()
    for i in range(20):
        image, label = trees.picture((40, 48), (1, 2), i)
        trees.save_image(root / "images" / f"later {i}.jpg", image)
        trees.save_mask(root / "masks" / f"later {i}.png", label)
    drawn_now = open_dataset("folder", root, DatasetOptions()).eval_ids()
    assert len(held_out) == 1
    assert drawn_now != held_out
    for weights, scores in ((out, "scores"), (f"{out}/best.safetensors", "scores of a file")):
        arguments = [weights, "--data-root", "data", "--workers", "0", "--out", scores]
        assert call(evaluate.main, arguments, monkeypatch) == 0
        after = json.loads(Path(scores, "summary.json").read_text("utf-8"))
        assert after["images_sha256"] == before["images_sha256"]
    assert call(train.main, ["--resume", out, "--train.iterations", "4"], monkeypatch) == 0
    resumed = json.loads(Path(out, "summary.json").read_text("utf-8"))
    assert resumed["images_sha256"] == before["images_sha256"]
    capsys.readouterr()
    Path(out, "split", "evaluation.txt").unlink()
    with Path(out, "split", "labeled.txt").open("a", encoding="utf-8") as file:
        file.write(f"{drawn_now[0]}\n")
    assert call(evaluate.main, [out, "--workers", "0"], monkeypatch) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{drawn_now[0]} is an image to evaluate on, but the run in run was trained" in said
