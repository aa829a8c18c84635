"""Broken checkpoints, weights that are NaN, and two programs in one folder."""

import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ctt import checkpoint, run
from ctt.data.loader import DrawSampler
from ctt.errors import UserError
from ctt.files import part_of
from ctt.inference.evaluate import confusions
from ctt.inference.load import load_trained
from ctt.settings import Settings, update
from ctt.train import evaluator
from ctt.train.distributed import World
from ctt.train.divergence import Losses
from ctt.train.dry_run import dry_run
from ctt.train.engine import Engine
from ctt.train.loop import Stopped, Trainer, train
from ctt.train.record import read_rows


@pytest.fixture
def settings(tiny: Settings) -> Settings:
    change = {"iterations": 6, "checkpoint_every": 2, "eval_every": 3, "tensorboard": False}
    return update(tiny, {"train": change}, "test")


@pytest.fixture(scope="module")
def trained() -> list[Path]:
    """Nothing, or the run of `settings`, once a test has trained it."""
    return []


@pytest.fixture
def whole(
    settings: Settings, trained: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that ended undisturbed, for all tests, which leave it as it is."""
    if not trained:
        folder = tmp_path_factory.mktemp("crash") / "whole"
        train(settings, out=folder)
        trained.append(folder)
    return trained[0]


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "missing":
        path.unlink()
        return
    else:  # in the middle of a tensor, where torch.load sees nothing
        data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["cut", "empty", "one bit", "missing"])
def test_a_broken_checkpoint_is_told_and_the_one_before_serves(
    settings: Settings, whole: Path, out: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last = out / run.CHECKPOINT
    damage(last, how)
    trained = load_trained(out)
    assert "after 4 iterations" in trained.origin
    assert "is used instead" in trained.origin
    capsys.readouterr()
    train(settings, resume=out)
    told = " ".join(capsys.readouterr().out.split())
    assert "The checkpoint before it, after iteration 4, is whole and is used instead" in told
    assert same_ends(whole, out)
    assert checkpoint.load(checkpoint.previous(last))["iteration"] == 4


def test_no_bit_of_a_checkpoint_changes_unseen(tmp_path: Path) -> None:
    state = {"iteration": 3, "method": {"students.0.w": torch.randn(40, 40)}}
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    whole, rng = path.read_bytes(), random.Random(0)
    seen = 0
    for _ in range(200):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
        try:
            found = checkpoint.load(path)
        except UserError:
            seen += 1
        else:  # a bit that means nothing
            assert found["iteration"] == 3
            assert torch.equal(found["method"]["students.0.w"], state["method"]["students.0.w"])
    assert seen > 150


def test_both_broken_is_an_error(settings: Settings, out: Path) -> None:
    last = out / run.CHECKPOINT
    damage(last, "cut")
    damage(checkpoint.previous(last), "cut")
    with pytest.raises(UserError, match=r"last\.pt is no checkpoint that can be read"):
        train(settings, resume=out)


def test_a_run_serves_without_its_best_weights(settings: Settings, out: Path) -> None:
    (out / run.WEIGHTS).unlink()
    trained = load_trained(out, "teacher_1")
    assert trained.info.classes == settings.open_dataset().info.classes


def test_a_second_program_in_the_folder_is_refused(settings: Settings, tmp_path: Path) -> None:
    short = update(settings, {"train": {"iterations": 2}}, "test")
    train(short, out=tmp_path / "run")
    first = Trainer(settings, None, tmp_path / "run", World())
    with first.lock, pytest.raises(UserError, match="another program trains in this folder"):
        train(settings, resume=tmp_path / "run")
    broken = update(settings, {"optim": {"name": "adamw"}}, "test")
    with pytest.raises(UserError, match="does not fit"):
        train(broken, resume=tmp_path / "run")  # and lets go of the lock
    assert train(settings, resume=tmp_path / "run")["iterations"] == 6


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_second_program_writes_nothing_before_it_is_refused(
    settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """Both were started at the same time, or the first has no checkpoint yet."""
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with run.lock(out):
        if goes_on:
            run.write_settings(out, settings)
        monkeypatch.setattr(run, "check_new", lambda out: None)
        before = contents(out)
        with pytest.raises(UserError, match="another program trains in this folder"):
            train(settings, **{"resume" if goes_on else "out": out})
        assert contents(out) == before
    monkeypatch.undo()
    assert Trainer(settings, out if not goes_on else None, out if goes_on else None, World())


def test_weights_that_are_no_numbers_are_not_written(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(settings, tmp_path / "run", None, World())
    follow = trainer.method.after_step

    def spoil(b: object, step: object) -> None:
        follow(b, step)  # type: ignore[arg-type]
        if trainer.engine.iteration == 3:  # the fourth step
            trainer.method.teachers[1].classifier.bias.data[0] = float("nan")

    monkeypatch.setattr(trainer.method, "after_step", spoil)
    with pytest.raises(UserError, match=r"by iteration 4, 1 of \d+ tensors hold NaN"):
        trainer.train()
    assert checkpoint.load(tmp_path / "run" / run.CHECKPOINT)["iteration"] == 2
    lines = (tmp_path / "run" / "diverged.txt").read_text().splitlines()
    names = {*trainer.plan.labeled, *trainer.plan.unlabeled}
    assert [line.partition(",")[0] for line in lines][-1] == "iteration 4"
    for line in lines:
        assert set(line.partition(": ")[2].split(", ")) <= names


def test_the_named_images_are_those_of_the_steps(settings: Settings, tmp_path: Path) -> None:
    trainer = Trainer(settings, tmp_path / "run", None, World())
    drawn: list[str] = []
    read = trainer.dataset.image

    def noted(name: str) -> torch.Tensor:
        drawn.append(name)
        return read(name)

    trainer.dataset.image = noted  # type: ignore[method-assign]
    stream = trainer.streams.open("labeled", trainer.plan.labeled)
    for _ in range(2):
        next(iter(stream))
    trainer.engine.iteration, trainer.engine.drawn = 2, 2 * 3
    lines = list(trainer.streams.drawn(2))
    told = [n for x in lines if "labeled: " in x and "unlabeled" not in x for n in names_in(x)]
    assert told == drawn[: len(told)]
    assert len(told) == 6


def test_other_batch_sizes_on_resume_neither_skip_nor_repeat_images(
    settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps took three images of either list each."""
    change = {"data": {"batch_size": 4, "unlabeled_batch_size": 5}, "train": {"iterations": 8}}
    trainer = Trainer(update(settings, change, "test"), None, out, World())
    drawn: list[str] = []
    read = trainer.dataset.image

    def noted(name: str) -> torch.Tensor:
        drawn.append(name)
        return read(name)

    monkeypatch.setattr(trainer.dataset, "image", noted)
    for purpose, ids in trainer.streams.lists().items():
        drawn.clear()
        images = len(next(trainer.streams.open(purpose, ids))[0])
        expected = DrawSampler(len(ids), images, 18, 1, settings.seed, purpose)
        assert drawn[:images] == [ids[k] for batch in expected for k, _ in batch]
    trainer.streams.close()
    trainer.engine.iteration, trainer.engine.drawn, trainer.engine.drawn_unlabeled = 7, 22, 23
    labeled, *_ = trainer.streams.drawn(7)  # steps before the resume took fewer images
    assert labeled.startswith("iteration 3, labeled")


def names_in(line: str) -> list[str]:
    return line.rstrip("\n").partition(": ")[2].split(", ")


def test_the_best_network_of_a_finished_run_is_known_when_it_goes_on(
    whole: Path,
) -> None:
    best = json.loads((whole / run.SUMMARY).read_text("utf-8"))["best"]
    saved = checkpoint.load(whole / run.CHECKPOINT)["best"]
    rounded = {name: round(saved[name], 2) for name in ("miou", "miou_of_labeled")}
    assert {**saved, **rounded} == best


def test_better_weights_than_the_checkpoint_knows_of_are_kept(
    settings: Settings, out: Path
) -> None:
    """As of a run that was killed after an evaluation and before the next checkpoint."""
    saved = checkpoint.load(out / run.CHECKPOINT)
    worse = saved["best"] | {"iteration": 1, "miou_of_labeled": -1.0}
    checkpoint.save(out / run.CHECKPOINT, saved | {"best": worse})
    trainer = Trainer(settings, None, out, World())
    assert trainer.evaluator.best == saved["best"]
    better = saved["best"] | {"miou_of_labeled": 100.0}
    trainer.evaluator.resume(better, 6)
    assert trainer.evaluator.best == better
    network = trainer.method.networks()["teacher_1"]
    info = dataclasses.replace(trainer.dataset.info, name="another")
    checkpoint.save_network(out / run.WEIGHTS, network, info, "of another dataset", better)
    trainer.evaluator.resume(worse, 6)
    assert trainer.evaluator.best == worse
    (out / run.WEIGHTS).unlink()
    trainer.evaluator.resume(worse, 6)
    assert trainer.evaluator.best == worse


@pytest.mark.parametrize("lost", ["checkpoints", "split"])
def test_a_run_without_a_checkpoint_yet_begins_from_the_start(
    settings: Settings, whole: Path, out: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(UserError, match=r"because checkpoints/last\.pt is missing"):
        train(settings, resume=out)  # it is finished, so it had one
    for name in ("summary.json", "curves.png", "samples.png"):
        (out / name).unlink()
    if lost == "split":  # as of a run that was killed in its first moment
        shutil.rmtree(out / "split")
        (out / run.WEIGHTS).unlink()
        (out / "metrics.csv").unlink()
    dry_run(settings, resume=out)
    assert "would start with 6 labelled" in " ".join(capsys.readouterr().out.split())
    train(settings, resume=out)
    assert "ended before its first checkpoint" in capsys.readouterr().out
    assert same_ends(whole, out)
    assert rows(out) == rows(whole)
    for path in (run.LABELED_LIST, run.UNLABELED_LIST, run.EVALUATION_LIST):
        assert (out / path).read_text() == (whole / path).read_text()


def test_what_a_run_leaves_in_its_first_moment_is_in_nobodys_way(
    settings: Settings, tmp_path: Path
) -> None:
    out = tmp_path / "new"
    out.mkdir()
    part_of(out / run.CONFIG).touch()
    assert train(settings, out=out)["iterations"] == 6
    assert not list(out.rglob("*.part"))


def test_rows_of_a_resumed_run_are_those_of_one_that_went_through(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows fall between checkpoints, and checkpoints between rows."""
    every = {"iterations": 9, "log_every": 2, "checkpoint_every": 3, "eval_every": 4}
    settings = update(settings, {"train": every}, "test")
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(settings, out=whole)
    step = Engine.__call__
    for died in (2, 5, 8):  # before the first checkpoint, and after others

        def die(self: Engine, *batches: Any, died: int = died) -> dict[str, torch.Tensor]:
            if self.iteration == died:
                raise KeyboardInterrupt
            return step(self, *batches)

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "__call__", die)
            with pytest.raises(KeyboardInterrupt):
                train(settings, **({"resume": out} if out.exists() else {"out": out}))
    train(settings, resume=out)
    assert same_ends(whole, out)
    assert rows(out) == rows(whole)
    assert [row["iteration"] for row in rows(out)] == ["2", "4", "4", "6", "8", "8", "9", "9"]


def test_a_run_killed_in_an_evaluation_repeats_it_and_no_step(
    settings: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = update(settings, {"train": {"checkpoint_every": 3}}, "test")
    out, steps, step = tmp_path / "run", [], Engine.__call__

    def count(self: Engine, *batches: Any) -> dict[str, torch.Tensor]:
        steps.append(self.iteration)
        return step(self, *batches)

    monkeypatch.setattr(Engine, "__call__", count)
    for _ in range(2):  # the first evaluation, and its repetition
        with monkeypatch.context() as patch:
            patch.setattr(evaluator, "confusions", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(settings, **({"resume": out} if out.exists() else {"out": out}))
    train(settings, resume=out)
    assert steps == [0, 1, 2, 3, 4, 5]
    assert same_ends(whole, out)
    assert rows(out) == rows(whole)


@pytest.mark.parametrize("number", [1, 2])  # without a checkpoint of its iteration; the last
def test_ctrl_c_in_an_evaluation_ends_it_at_once(
    settings: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out, begun, ended = tmp_path / "run", [], []

    def ask(*arguments: Any, **more: Any) -> dict[str, torch.Tensor]:
        begun.append(1)
        if len(begun) == number:
            os.kill(os.getpid(), signal.SIGINT)
        matrices = confusions(*arguments, **more)
        ended.append(1)
        return matrices

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "confusions", ask)
        with pytest.raises(Stopped) as stopped:
            train(settings, out=out)
    assert len(ended) == number - 1
    assert stopped.value.iteration == 3 * number
    train(settings, resume=out)
    assert same_ends(whole, out)
    assert rows(out) == rows(whole)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_finished_run_that_is_resumed_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    settings = update(settings, {"train": {"tensorboard": True}}, "test")
    summary = train(settings, out=tmp_path / "run")
    before = contents(tmp_path / "run")
    again = train(settings, resume=tmp_path / "run")
    assert again == json.loads(json.dumps(summary))
    assert contents(tmp_path / "run") == before


def test_a_term_is_switched_off_between_two_rows(settings: Settings, out: Path) -> None:
    """The checkpoint holds a loss that the method no longer has; rows before it keep theirs."""
    before, saved = rows(out), checkpoint.load(out / run.CHECKPOINT)
    sums = {"sup": 2.0, "hc": 1.0, "lc": 1.0, "total": 4.0, "queues_gone": 1.0}
    checkpoint.save(out / run.CHECKPOINT, saved | {"sums": sums, "summed": dict.fromkeys(sums, 1)})
    change = {"loss": {"hc": 0, "lc": 0}, "train": {"iterations": 7}, "data": {"workers": 0}}
    train(update(settings, change, "test"), resume=out)
    *kept, row, evaluated = rows(out)
    assert kept == before
    assert kept[0]["loss_hc"]
    assert (row["iteration"], row["loss_hc"], row["loss_lc"]) == ("7", "", "")
    assert float(row["loss_sup"]) > 1
    assert evaluated["miou_teacher_1"]


def test_a_new_loss_has_the_mean_of_its_own_steps() -> None:
    """Whether new settings or another round bring it; old checkpoints count steps for all sums."""
    method = SimpleNamespace(terms=("sup", "ct"), logged=("lost_pixels",))
    engine: Any = SimpleNamespace(
        method=method, world=World(), device=torch.device("cpu"), iteration=2
    )
    losses = Losses(SimpleNamespace(engine=engine, folder=Path()))  # type: ignore[arg-type]
    losses.load_state_dict({"sums": {"sup": 2.0, "hc": 9.0, "total": 11.0}, "summed": 2})
    one = torch.tensor(1.0)
    losses.add({"sup": 4 * one, "ct": 5 * one, "total": 7 * one})
    saved = losses.state_dict()
    losses.load_state_dict(saved)
    assert losses.means() == {"sup": 2.0, "ct": 5.0, "total": 6.0}
    assert losses.means() == {}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return what each file of a run holds, and when it was written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def same_ends(one: Path, other: Path) -> bool:
    """Return whether the last checkpoints of two runs hold the same tensors."""
    first, second = (checkpoint.load(x / run.CHECKPOINT)["method"] for x in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without what a clock says."""
    clocks = ("images_per_second", "input_wait")
    found = read_rows(folder / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in clocks} for row in found]
