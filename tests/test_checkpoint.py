import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ctt import checkpoint, models, run
from ctt.data.digits import INFO
from ctt.errors import UserError
from ctt.inference.evaluate import write_json
from ctt.inference.load import load_trained
from ctt.models.base import Grid
from ctt.settings import EvalSettings, ModelSettings, Settings


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("small", ""),
        ("deeplabv2", "test_resnet"),
        ("deeplabv3plus", "test_convnext"),
        ("vit", "test_vit"),
        ("smp:fpn", "resnet18"),
    ],
)
def test_saved_networks_come_back(tmp_path: Path, name: str, backbone: str) -> None:
    network = models.build(name, 11, 8, 4, backbone).eval()
    path = tmp_path / "folder" / "net.safetensors"
    checkpoint.save_network(path, network, INFO, "a note")
    again, info, note = checkpoint.load_network(path)
    assert info == INFO
    assert note == "a note"
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(images).logits, network(images).logits)


def test_a_file_says_how_the_run_showed_images_to_the_network(tmp_path: Path) -> None:
    network, path = models.build("small", 11, 8, 4), tmp_path / "net.safetensors"
    own = EvalSettings(protocol="sliding", window=(64, 80), stride=0.5, flip=True, scales=(0.5, 1))
    checkpoint.save_network(path, network, INFO, "", protocol=own)
    assert checkpoint.protocol_of(path) == own
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["ctt"])
    for values, expected in ((None, EvalSettings()), ({"protocol": "half"}, None), ({"x": 1}, "x")):
        former = {name: value for name, value in meta.items() if name != "protocol"}
        former |= {} if values is None else {"protocol": values}
        save_file(network.state_dict(), path, metadata={"ctt": json.dumps(former)})
        if isinstance(expected, str):
            with pytest.raises(UserError, match=r"net\.safetensors: there is no setting eval\.x"):
                load_trained(path)
        else:
            expected = expected or EvalSettings(protocol="half")
            assert load_trained(path).settings.eval == expected


@pytest.mark.parametrize("grid", ["aligned", "legacy"])
def test_networks_of_versions_without_a_grid_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: str
) -> None:
    network = models.build("small", 11, 8, 4, grid=grid).eval()
    path = tmp_path / "net.safetensors"
    checkpoint.save_network(path, network, INFO, "")
    assert checkpoint.load_network(path)[0].options["grid"] == grid
    del network.options["grid"]
    checkpoint.save_network(path, network, INFO, "")
    former = checkpoint.load_network(path)[0]
    assert former.grid == Grid(2, 0.5, 0)
    images = torch.randn(1, 3, 16, 16)
    same = torch.equal(former(images).logits, network(images).logits)
    assert same == (grid == "legacy")


def test_runs_of_versions_without_a_grid_keep_theirs(tmp_path: Path) -> None:
    config = tmp_path / run.CONFIG
    config.write_text("model: {width: 4}\n", "utf-8")
    assert run.read_settings(tmp_path).model == ModelSettings(width=4, grid="legacy")
    run.write_settings(tmp_path, Settings())
    assert run.read_settings(tmp_path).model.grid == "aligned"


def test_files_may_be_read_by_whom_the_user_lets(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = tmp_path / "net.safetensors"
    checkpoint.save_network(path, models.build("small", 11, 8, 4), INFO, "")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"iteration": 1})

    def broken(state: object, file: object) -> None:
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        checkpoint.save(path, {"iteration": 2})
    assert checkpoint.load(path)["iteration"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_full_disk_is_told_and_leaves_the_old_files(
    tmp_path: Path, no_room: Callable[[], AbstractContextManager[None]]
) -> None:
    last, best, text = (tmp_path / name for name in ("last.pt", "best.safetensors", "a.json"))
    network = models.build("small", 11, 64, 32)
    checkpoint.save(last, {"iteration": 1})
    checkpoint.save_network(best, network, INFO, "old")
    writes: dict[Path, Callable[[], None]] = {
        last: lambda: checkpoint.save(last, {"students": network.state_dict()}),
        best: lambda: checkpoint.save_network(best, network, INFO, "new"),
        text: lambda: write_json(text, {str(i): i for i in range(2000)}),
    }
    for path, write in writes.items():
        with no_room(), pytest.raises(UserError, match=rf"{path.name} cannot be written \(.*arge"):
            write()
    assert checkpoint.load(last)["iteration"] == 1
    assert checkpoint.load_network(best)[2] == "old"
    assert {p.name for p in tmp_path.iterdir()} == {last.name, best.name}


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code in a checkpoint was run",)


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    torch.save({"format": Evil()}, tmp_path / "evil.pt")
    for name in ("text.pt", "empty.pt", "other.pt", "evil.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / name)
    assert "was run" not in capsys.readouterr().out


def test_what_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    for name in ("text.safetensors", "other.safetensors", "missing.safetensors"):
        with pytest.raises(UserError, match=name):
            checkpoint.load_network(tmp_path / name)


@pytest.mark.parametrize(
    "said",
    [
        "[]",
        "7",
        "[" * 99_999,
        '{"format": "ctt-weights-1"}',
        '{"format": "ctt-weights-1", "dataset": "x", "classes": ["a"], "palette": [[0, 0, 0]], '
        '"mean": [0], "std": [1], "model": {"name": 7}, "note": ""}',
    ],
)
def test_weights_that_are_described_in_another_way(tmp_path: Path, said: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(1)}, path, {"ctt": said})
    assert checkpoint.best_in(path) is None
    with pytest.raises(UserError, match=r"other\.safetensors"):
        checkpoint.load_network(path)
