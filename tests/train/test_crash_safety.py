"""Broken checkpoints, weights that are no numbers, and two programs in one folder."""

import random
from pathlib import Path

import pytest
import torch

from ctt import checkpoint, run
from ctt.errors import UserError
from ctt.inference.load import load_trained
from ctt.settings import Settings, update
from ctt.train.distributed import World
from ctt.train.loop import Trainer, train


@pytest.fixture
def settings(tiny: Settings) -> Settings:
    change = {"iterations": 6, "checkpoint_every": 2, "eval_every": 3, "tensorboard": False}
    return update(tiny, {"train": change}, "test")


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
    settings: Settings, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings, out=tmp_path / "whole")
    train(settings, out=tmp_path / "run")
    last = tmp_path / "run" / run.CHECKPOINT
    damage(last, how)
    trained = load_trained(tmp_path / "run")
    assert "after 4 iterations" in trained.origin
    assert "is used instead" in trained.origin
    capsys.readouterr()
    train(settings, resume=tmp_path / "run")
    told = " ".join(capsys.readouterr().out.split())
    assert "The checkpoint before it, after iteration 4, is whole and is used instead" in told
    ends = [checkpoint.load(tmp_path / name / run.CHECKPOINT) for name in ("whole", "run")]
    for name, value in ends[0]["method"].items():
        assert torch.equal(value, ends[1]["method"][name]), name
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


def test_both_broken_is_an_error(settings: Settings, tmp_path: Path) -> None:
    train(settings, out=tmp_path / "run")
    last = tmp_path / "run" / run.CHECKPOINT
    damage(last, "cut")
    damage(checkpoint.previous(last), "cut")
    with pytest.raises(UserError, match=r"last\.pt is no checkpoint that can be read"):
        train(settings, resume=tmp_path / "run")


def test_a_run_serves_without_its_best_weights(settings: Settings, tmp_path: Path) -> None:
    train(settings, out=tmp_path / "run")
    (tmp_path / "run" / run.WEIGHTS).unlink()
    trained = load_trained(tmp_path / "run", "teacher_1")
    assert trained.info.classes == settings.open_source().info.classes


def test_a_second_program_in_the_folder_is_refused(settings: Settings, tmp_path: Path) -> None:
    short = update(settings, {"train": {"iterations": 2}}, "test")
    train(short, out=tmp_path / "run")
    first = Trainer(settings, None, tmp_path / "run", World())
    with first.lock, pytest.raises(UserError, match="another program trains in this folder"):
        train(settings, resume=tmp_path / "run")
    assert train(settings, resume=tmp_path / "run")["iterations"] == 6


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
    with pytest.raises(UserError, match=r"by iteration 4 1 tensors are no numbers any more"):
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
    read = trainer.source.image

    def noted(name: str) -> torch.Tensor:
        drawn.append(name)
        return read(name)

    trainer.source.image = noted  # type: ignore[method-assign]
    stream = trainer.streams.open("labeled", trainer.plan.labeled)
    for _ in range(2):
        next(iter(stream))
    trainer.engine.iteration, trainer.engine.drawn = 2, 2 * 3
    lines = list(trainer.streams.drawn(2))
    told = [n for x in lines if "labeled: " in x and "unlabeled" not in x for n in names_in(x)]
    assert told == drawn[: len(told)]
    assert len(told) == 6


def names_in(line: str) -> list[str]:
    return line.rstrip("\n").partition(": ")[2].split(", ")


def test_the_best_network_of_a_finished_run_is_known_when_it_goes_on(
    settings: Settings, tmp_path: Path
) -> None:
    best = train(settings, out=tmp_path / "run")["best"]
    saved = checkpoint.load(tmp_path / "run" / run.CHECKPOINT)["best"]
    rounded = {name: round(saved[name], 2) for name in ("miou", "miou_of_labeled")}
    assert {**saved, **rounded} == best
