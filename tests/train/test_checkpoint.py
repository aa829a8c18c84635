from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ctt import models
from ctt.data.digits import INFO
from ctt.errors import UserError
from ctt.train import checkpoint
from ctt.train.settings import ModelSettings

MODEL = ModelSettings(name="small", features=8, width=4)


def test_saved_networks_come_back(tmp_path: Path) -> None:
    network = models.build("small", 11, 8, 4).eval()
    path = tmp_path / "folder" / "net.safetensors"
    checkpoint.save_network(path, network, MODEL, INFO, "a note")
    again, info, note = checkpoint.load_network(path)
    assert info == INFO
    assert note == "a note"
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(images).logits, network(images).logits)


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"iteration": 1})

    def broken(state: object, file: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"iteration": 2})
    assert checkpoint.load(path)["iteration"] == 1


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


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_students_start_from_weights_that_fit(tmp_path: Path, suffix: str) -> None:
    donor, network = (models.build("small", classes, 8, 4) for classes in (5, 11))
    path = tmp_path / f"donor{suffix}"
    if suffix == ".pth":
        torch.save(donor.state_dict(), path)
    else:
        save_file(donor.state_dict(), path)
    found, total = checkpoint.load_fitting(network, path)
    assert found == total - 2  # the classifier has another number of classes
    assert torch.equal(network.state_dict()["stem.0.weight"], donor.state_dict()["stem.0.weight"])
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    for bad in ("other.pth", "missing.pth"):
        with pytest.raises(UserError, match=f"--model.weights .*{bad}"):
            checkpoint.load_fitting(network, tmp_path / bad)
