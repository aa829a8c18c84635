import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ctt
from ctt import checkpoint, models
from ctt.cli import export
from ctt.data.digits import INFO
from ctt.inference import export as graphs
from tests.models.tiny import SWIN

onnxruntime = pytest.importorskip("onnxruntime")


def call(arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ctt-export", *shlex.split(arguments)])
    with pytest.raises(SystemExit) as stop:
        export.main()
    return int(stop.value.code or 0)


def file_of(name: str, backbone: str, folder: Path) -> Path:
    torch.manual_seed(0)
    network = models.build(name, 11, 16, 8, backbone=backbone)
    checkpoint.save_network(folder / "net.safetensors", network, INFO, name)
    return folder / "net.safetensors"


@pytest.mark.parametrize(
    ("name", "backbone"), [("deeplabv3plus", "test_resnet"), ("smp:fpn", "resnet18")]
)
def test_onnx_of_any_size(
    name: str, backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = file_of(name, backbone, tmp_path)
    assert call(f"{weights}", monkeypatch) == 0
    session = onnxruntime.InferenceSession(tmp_path / "best.onnx")
    meta = json.loads(session.get_modelmeta().custom_metadata_map["ctt"])
    assert meta["classes"] == list(INFO.classes)
    assert (meta["input"], meta["output"]) == ("0..1", "probabilities")
    segmenter = ctt.load(weights)
    for size in ((1, 3, 65, 97), (3, 3, 40, 40)):
        images = torch.rand(size)
        (found,) = session.run(["classes"], {"images": images.numpy()})
        np.testing.assert_allclose(found, segmenter(images).numpy(), atol=1e-4)


def test_a_graph_of_bands_takes_pixels_without_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = dataclasses.replace(INFO, bands=(1, 2, 3))
    network = models.build("small", 11, 8, 4)
    checkpoint.save_network(tmp_path / "net.safetensors", network, info, "bands")
    assert call(f"{tmp_path / 'net.safetensors'}", monkeypatch) == 0
    session = onnxruntime.InferenceSession(tmp_path / "best.onnx")
    images = torch.rand(1, 3, 40, 48)
    images[:, :, 5:9, 7] = torch.nan
    (found,) = session.run(["classes"], {"images": images.numpy()})
    expected = ctt.load(tmp_path / "net.safetensors")(images)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    assert np.isfinite(found).all()


def test_program_of_torch_export_from_a_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "net.pt2"
    options = "--network teacher_2 --format torch-export --output logits --normalized"
    assert call(f"{folder} {options} --out {out}", monkeypatch) == 0
    segmenter = ctt.load(folder, "teacher_2")
    extra = {"ctt.json": ""}
    program = torch.export.load(out, extra_files=extra)
    assert json.loads(extra["ctt.json"])["input"] == "normalised"
    images = torch.randn(1, 3, 33, 52)
    torch.testing.assert_close(program.module()(images), segmenter.logits(images))
    assert call(f"{folder} {options} --out {out}", monkeypatch) == 2
    copy = shutil.copytree(folder, tmp_path / "run")
    assert call(f"{copy} --network student_1 --format safetensors", monkeypatch) == 0
    again = ctt.load(copy / "student_1.safetensors")
    torch.testing.assert_close(again(images), ctt.load(folder, "student_1")(images))


def test_a_program_says_how_small_images_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, extra = file_of("small", "", tmp_path), {"ctt.json": ""}
    assert call(f"{weights} --format torch-export", monkeypatch) == 0
    program = torch.export.load(tmp_path / "best.pt2", extra_files=extra).module()
    smallest = json.loads(extra["ctt.json"])["smallest_side"]
    assert f"from {smallest} x {smallest} pixels on" in " ".join(capsys.readouterr().out.split())
    segmenter = ctt.load(weights)
    for size in ((smallest, smallest), (smallest, 200), (200, smallest), (smallest + 1, 64)):
        images = torch.rand(1, 3, *size)
        torch.testing.assert_close(program(images), segmenter(images))
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.rand(1, 3, smallest - 1, 64))


def test_transformers_have_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = file_of("vit", "test_vit", tmp_path)
    assert call(f"{weights} --size 50 40", monkeypatch) == 0
    session = onnxruntime.InferenceSession(tmp_path / "best.onnx")
    images = torch.rand(3, 3, 50, 40)
    (found,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found, ctt.load(weights)(images).numpy(), atol=1e-4)


def test_windows_of_attention_need_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tracing them with open sizes does not end."""
    weights = file_of("deeplabv3plus", SWIN, tmp_path)
    assert call(f"{weights} --format torch-export", monkeypatch) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "windows of attention (Swin)" in shown
    assert "by --size HEIGHT WIDTH" in shown


@pytest.mark.parametrize("size", ["9000000 9000000", "2000000000 2000000000", "0 5", f"5 {2**64}"])
def test_sizes_beyond_the_memory(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = file_of("small", "", tmp_path)
    assert call(f"{weights} --size {size}", monkeypatch) == 2
    assert "--size" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == [weights]


def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = file_of("small", "", tmp_path)
    monkeypatch.setattr(graphs, "TOLERANCE", -1.0)
    assert call(f"{weights} --format torch-export", monkeypatch) == 2
    assert "is not written. Fix the size of the images" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == [weights]


@pytest.mark.parametrize("file_format", ["onnx", "torch-export"])
def test_a_full_disk_is_told(
    file_format: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = file_of("small", "", tmp_path)
    suffix = "onnx" if file_format == "onnx" else "pt2"
    full = tmp_path / "full.part"
    full.symlink_to("/dev/full")
    monkeypatch.setattr("ctt.files.part_of", lambda path: full)
    assert call(f"{weights} --format {file_format}", monkeypatch) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'best'}.{suffix} cannot be written (No space left" in shown
    assert list(tmp_path.iterdir()) == [weights]


def test_operations_that_a_format_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pooling that rounds up has no open sizes in a .pt2 file."""
    weights = file_of("deeplabv2", "test_resnet", tmp_path)
    assert call(f"{weights} --format torch-export", monkeypatch) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "cannot be put into a graph" in shown
    assert "by --size HEIGHT WIDTH" in shown
    assert list(tmp_path.iterdir()) == [weights]
    assert call(f"{weights} --format torch-export --size 40 56", monkeypatch) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("{nowhere}", "there is no such file"),
        ("{text}", "is no safetensors file"),
        ("{net} --network teacher_1", "there is none of that name"),
        ("{net} --out {net}", "is the network itself"),
        ("{net} --out {text}", "is there already"),
        ("{net} --out {nowhere}/x.onnx", "there is no folder"),
        ("{net} --out {folder}", "this is a folder"),
        ("{net} --size 0 40", "--size must be at least 1 1"),
        ("{net} --format safetensors --output logits", "writes weights alone"),
        ("{same}", "pad as TensorFlow does"),
    ],
)
def test_bad_input(
    arguments: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {name: tmp_path / name for name in ("nowhere", "text", "folder", "same")}
    paths["text"].write_text("hello")
    paths["folder"].mkdir()
    paths["net"] = file_of("small", "", tmp_path)
    if "same" in arguments:
        paths["same"] = file_of("deeplabv2", "tf_efficientnet_lite0", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert call(arguments.format(**paths), monkeypatch) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert text in " ".join(shown.split())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
