"""ctt.train, the program as a function."""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import ctt
from ctt.errors import UserError
from ctt.ops import prefer_backend
from ctt.ops._registry import preferred
from tests.conftest import leave_out_figures
from tests.data.trees import save_mask, write_folder
from tests.train.processes import finish, shown, start

TINY: dict[str, Any] = {
    "recipe": "digits",
    "ratio": "1/1",
    "pairs": 1,
    "data": {"crop": (16, 16), "batch_size": 2},
    "model.width": 4,
    "model.features": 8,
    "train": {"threads": 1, "tensorboard": False, "measured_images": 0},
}


def test_it_trains_as_the_program_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_folder(tmp_path / "data", labeled=3, unlabeled=2, size=(20, 24))
    where = {"dataset": "folder", "data_root": data}
    done = ctt.train(**TINY, **where, **{"train.iterations": 2})
    assert done["folder"] == Path("runs/folder-cross-teacher-1")
    settings = yaml.safe_load((done["folder"] / "config.yaml").read_text())
    assert settings["train"]["iterations"] == 2
    assert settings["data"]["crop"] == [16, 16]
    assert settings["loss"]["hc"] == 0.02  # of the recipe
    assert done["miou"]["teacher_1"] is not None
    label = ctt.load(done["folder"]).predict(sorted((data / "val/images").rglob("*.jpg")))
    assert label[0].shape == (20, 24)
    more = ctt.train(resume=done["folder"], train={"iterations": 3})
    assert (more["folder"], more["iterations"]) == (done["folder"], 3)
    with pytest.raises(UserError, match="the folder is not empty"):
        ctt.train(**TINY, **where, out=done["folder"])


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no shell has put there, in Python and in a file of settings."""
    leave_out_figures(monkeypatch)
    home, example = tmp_path / "home", Path(__file__).resolve().parents[2] / "examples"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    write_folder(home / "data", labeled=3, unlabeled=2, size=(20, 24))
    (home / "mine.py").write_text((example / "entropy_minimization.py").read_text())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    where = {"dataset": "folder", "data_root": "~/data"}
    given = {**TINY, "train.iterations": 1}
    first = ctt.train(**given, **where, out="~/run", method="~/mine.py:EntropyMinimization")
    assert first["folder"] == home / "run"
    lists = {**where, "split_labeled": "~/run/split/labeled.txt"}
    (home / "more.yaml").write_text(yaml.safe_dump(lists))
    given["model.weights"] = "~/run/best.safetensors"
    ctt.train(**given, config="~/more.yaml", out="~/second")
    more = ctt.train(resume="~/second", **{"train.iterations": 2})
    assert more["iterations"] == 2
    assert ctt.load("~/second").predict("~/data/images/photo 0.jpg").shape == (20, 24)
    assert not list(Path().iterdir())


def test_a_loader_that_imports_the_program_trains_no_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `spawn` does, the default on macOS and Windows, where the call stands by itself."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UserError, match=r"Put the call below `if __name__ == .__main__.:`"):
        ctt.train(out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_begin_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        ctt.train(**TINY, dataset="folder", data_root=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_run_has_the_method_as_its_file_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_figures(monkeypatch)
    example = Path(__file__).resolve().parents[2] / "examples" / "entropy_minimization.py"
    data = write_folder(tmp_path / "data", labeled=3, unlabeled=2, size=(20, 24))
    mine = tmp_path / "mine.py"
    given = {**TINY, "dataset": "folder", "data_root": data, "train.iterations": 1}
    for term in ("entropy", "other"):
        mine.write_text(example.read_text().replace('"entropy"', f'"{term}"'))
        done = ctt.train(**given, method=f"{mine}:EntropyMinimization", out=tmp_path / term)
        assert f"loss_{term}" in (done["folder"] / "metrics.csv").read_text()


def test_a_run_leaves_the_process_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = [2]  # as PyTorch has them
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with pytest.raises(UserError, match="nowhere"):
        ctt.train(**TINY, dataset="folder", data_root=tmp_path / "nowhere")
    assert threads == [2, 1, 2]
    before = torch.are_deterministic_algorithms_enabled()
    for wanted in (True, False):
        given = {**TINY, "train.deterministic": wanted}
        with pytest.raises(UserError, match="nowhere"):
            ctt.train(**given, dataset="folder", data_root=tmp_path / "nowhere")
        assert torch.are_deterministic_algorithms_enabled() is before
    prefer_backend("torch")
    with pytest.raises(UserError, match="nowhere"):
        ctt.train(**TINY, dataset="folder", data_root=tmp_path / "nowhere")
    assert preferred() == "torch"
    prefer_backend("auto")


def train_from_python(folder: Path, data: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        leave_out_figures(patch)
        patch.chdir(folder)
        done = ctt.train(**TINY, dataset="folder", data_root=data, **{"train.iterations": 1})
    (folder / f"folder-{os.environ['RANK']}").write_text(str(done["folder"]))


def test_every_process_returns_the_folder(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", labeled=4, unlabeled=4, size=(20, 24))
    both = start(2, tmp_path, train_from_python, tmp_path, data)
    assert finish(both) == [0, 0], shown(tmp_path)
    for rank in (0, 1):
        assert (tmp_path / f"folder-{rank}").read_text() == "runs/folder-cross-teacher-1"
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_masks_that_are_ignored_everywhere_give_no_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "data", labeled=2, unlabeled=1, evaluation=1, size=(20, 24))
    for mask in (data / "val" / "masks").rglob("*.png"):
        save_mask(mask, np.full((20, 24), 255, np.uint8))
    change = {"dataset": "folder", "data_root": data, "out": tmp_path / "run"}
    ctt.train(**TINY, **change, method="supervised", **{"train.iterations": 1})
    text = (tmp_path / "run" / "summary.json").read_text("utf-8")
    best = json.loads(text, parse_constant=pytest.fail)["best"]
    assert best["miou"] is None
    assert best["miou_of_labeled"] is None
    said = " ".join(capsys.readouterr().out.split())
    assert "after iteration 1, but without a score: no pixel of the evaluation images" in said
    assert "nan" not in said.rpartition("Best network")[2]


def test_a_file_and_what_is_given_over_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("loss: {hc: 0, lc: 3}\nseed: 5\n")
    with pytest.raises(UserError, match=r"`loss\.lc` must be at least 0, got -1"):
        ctt.train(config=tmp_path / "a.yaml", **{"loss.lc": -1})
    for name, other in (("batch-size", "batch_size"), ("batch_size", "batch-size")):
        (tmp_path / "b.yaml").write_text(f"split-labeled: lost.txt\ndata: {{{name}: 4}}\n")
        given = {f"data.{other}": -1, "split_labeled": None}
        with pytest.raises(UserError, match=r"`data\.batch_size` must be at least 1, got -1"):
            ctt.train(config=tmp_path / "b.yaml", **given)
    with pytest.raises(UserError, match=r"ctt\.train: there is no setting loss\.lcc"):
        ctt.train(**{"loss.lcc": -1})
    with pytest.raises(UserError, match="changes nothing with"):
        ctt.train(method="supervised", loss={"hc": 1})
    with pytest.raises(UserError, match="exclude each other"):
        ctt.train(out="a", resume="b")
    with pytest.raises(UserError, match="`resume` and `auto_resume` exclude each other"):
        ctt.train(out="a", resume="b", auto_resume=True)


def test_a_call_that_is_made_again_goes_on(tmp_path: Path) -> None:
    for total in (1, 2):
        settings = {**TINY, "ratio": "8", "train.iterations": total}
        done = ctt.train(**settings, out=tmp_path, auto_resume=True)
        assert done["folder"] == tmp_path
        assert done["iterations"] == total
    with pytest.raises(UserError, match="`auto_resume` needs `out`"):
        ctt.train(**TINY, auto_resume=True)


def test_the_package_and_the_function_have_one_name() -> None:
    import ctt.train.loop

    assert callable(ctt.train)
    assert ctt.train.loop.train is not None
    assert torch.is_grad_enabled()
