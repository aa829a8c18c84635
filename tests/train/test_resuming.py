"""What a run that goes on must fit, and runs that have nothing or only their end left to do."""

import dataclasses
from pathlib import Path

import pytest
import torch

import ctt
from ctt import checkpoint, run
from ctt.errors import UnwritableError, UserError
from ctt.settings import Settings, update
from ctt.train import loop
from ctt.train.distributed import World
from ctt.train.dry_run import dry_run
from ctt.train.loop import Trainer, train
from ctt.train.record import draw_curves, read_rows
from tests.data import trees
from tests.train.test_api import TINY
from tests.train.test_crash_safety import contents, rows

RESUME = (train, dry_run)
PALETTE = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]  # that of VOC


@pytest.fixture
def settings(tiny: Settings) -> Settings:
    change = {"iterations": 2, "eval_every": 1, "tensorboard": False, "measured_images": 0}
    return update(tiny.with_method("supervised"), {"train": change}, "test")


@pytest.fixture
def done(settings: Settings, out: Path) -> Path:
    """A finished run."""
    train(settings, out=out)
    return out


def test_unlabelled_images_that_have_joined_stay(tiny: Settings, out: Path) -> None:
    """A share of more iterations is more of them."""
    change = {"loss": {"ct_after": 0.5}, "train": {"iterations": 2, "tensorboard": False}}
    settings = update(tiny.with_method("mean-teacher"), change, "test")
    train(settings, out=out)
    before = contents(out)
    longer = update(settings, {"train": {"iterations": 6}}, "test")
    for resume in RESUME:
        with pytest.raises(
            UserError,
            match=r"until iteration 3, but .* iteration 1\. Give `loss\.ct_after` 0\.166667",
        ):
            resume(longer, resume=out)
    assert contents(out) == before
    assert train(update(longer, {"loss": {"ct_after": 0.166667}}, "test"), resume=out)
    later = update(settings, {"loss": {"ct_after": 0.1}, "train": {"iterations": 10}}, "test")
    assert train(later, resume=out)  # where they are is after iteration 1 again


def test_other_settings_are_refused_once_all_iterations_are_done(
    settings: Settings, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = update(settings, {"optim": {"lr": 0.9}, "train": {"log_every": 1}}, "test")
    unlike = update(settings, {"train": {"log_every": 1}}, "test")
    summary = train(unlike, resume=done)  # changes no result
    dry_run(unlike, resume=done)
    assert " ".join(capsys.readouterr().out.split()).count("is finished: all 2 iterations") == 2
    for _ in range(2):
        before = contents(done)
        for resume in RESUME:
            with pytest.raises(
                UserError, match=r"All 2 iterations .* now: `optim\.lr`\. .* larger `train\.iter"
            ):
                resume(changed, resume=done)
        assert contents(done) == before
        (done / run.SUMMARY).unlink(
            missing_ok=True
        )  # as of a run that was killed after its last evaluation
    dry_run(settings, resume=done)
    assert "would go on after iteration 2" in " ".join(capsys.readouterr().out.split())
    assert train(settings, resume=done)["settings_hash"] == summary["settings_hash"]
    more = update(changed, {"train": {"iterations": 3}}, "test")
    assert train(more, resume=done)["settings_hash"] != summary["settings_hash"]


def test_a_run_whose_data_has_moved_is_as_finished_as_before(tmp_path: Path, out: Path) -> None:
    data = trees.write_folder(tmp_path / "data", labeled=3, unlabeled=2, size=(20, 24))
    first = {**TINY, "dataset": "folder", "data_root": data, "method": "supervised"}
    done = ctt.train(**first, out=out, **{"train.iterations": 1})
    moved = data.rename(tmp_path / "moved")
    for _ in range(2):
        again = ctt.train(resume=out, data_root=moved)
        assert again["settings_hash"] == done["settings_hash"]
        (out / run.SUMMARY).unlink()


def test_the_last_evaluation_has_one_row(settings: Settings, done: Path) -> None:
    before = rows(done)
    assert [row["iteration"] for row in before if row["miou_student_1"]] == ["1", "2"]
    for _ in range(2):
        (done / run.SUMMARY).unlink()
        train(settings, resume=done)
        assert rows(done) == before


@pytest.mark.parametrize("end", ["write_classes", "draw_curves", "draw_predictions"])
def test_a_run_that_fails_in_its_last_files_is_mended_by_resume(
    settings: Settings, done: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    def full(*_: object) -> None:
        raise UnwritableError(done / run.CLASSES, "No space left on device")

    settings = update(settings, {"train": {"iterations": 3}}, "test")
    for name in (run.CLASSES, "curves.png", "samples.png"):
        (done / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(loop, end, full)
        with pytest.raises(UserError, match=r"No space left on device.* `resume`"):
            train(settings, resume=done)
    assert train(settings, resume=done)["iterations"] == 3
    for name in (run.CLASSES, "curves.png", "samples.png"):
        assert (done / name).is_file()


def test_broken_values_of_metrics_are_left_out(out: Path) -> None:
    out.mkdir()
    metrics = "iteration,loss_total,miou_a\n1,3.5,\n2,3x.5,\nx,1,\n3,,5,9\n4,nan,\n5\n"
    (out / "metrics.csv").write_text(metrics)
    assert [list(row.values()) for row in read_rows(out / "metrics.csv")] == [
        ["1", "3.5", ""],
        ["2", "", ""],
        ["3", "", "5"],
        ["4", "nan", ""],
        ["5", "", ""],
    ]
    draw_curves(out)
    assert (out / "curves.png").is_file()


def test_data_and_weights_that_do_not_fit_are_refused_also_dry(
    settings: Settings, done: Path
) -> None:
    path = done / run.CHECKPOINT
    saved = checkpoint.load(path)
    info, method = saved["info"], saved["method"]
    weight = next(iter(method))
    for change, message in (
        ({"info": info | {"mean": (0.1, 0.2, 0.3)}}, "trained on other data .*: mean is"),
        ({"method": method | {weight: torch.zeros(1)}}, "does not fit the settings of its run"),
        ({"iteration": 3}, "`train.iterations` 2: the run has been trained for 3"),
    ):
        checkpoint.save(path, saved | change)
        for resume in RESUME:
            with pytest.raises(UserError, match=message):
                resume(settings, resume=done)


def test_options_that_the_checkpoint_does_not_fit_are_named(settings: Settings, out: Path) -> None:
    u2pl = settings.with_method("u2pl")
    train(u2pl, out=out)
    other = update(u2pl, {"options": {"capacity": 7}, "train": {"iterations": 3}}, "test")
    message = r"does not fit `options.capacity` 7 \(size mismatch for .*\)\. Leave out what differs"
    for resume in RESUME:
        with pytest.raises(UserError, match=message):
            resume(other, resume=out)


def test_divergence_tells_means_and_only_a_checkpoint_that_is_there(
    settings: Settings, out: Path
) -> None:
    trainer = Trainer(settings, out, None, World())
    lost, total = torch.tensor(0.5), torch.tensor(float("nan"))
    for _ in range(2):
        trainer.losses.add({"lost_pixels": lost, "total": total})
    with pytest.raises(UserError, match=r"\(lost_pixels 0\.5, total nan\)") as told:
        trainer.losses.total()
    assert "checkpoint" not in str(told.value)
    checkpoint.save(out / run.CHECKPOINT, {})
    with pytest.raises(UserError, match=r"steps in question\. The last checkpoint is whole: `res"):
        trainer.losses.total()


@pytest.fixture
def of_folder(settings: Settings, tmp_path: Path) -> Settings:
    root = trees.write_folder(tmp_path / "set")
    return dataclasses.replace(settings, dataset="folder", data_root=root, ratio="2")


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("id_map: {0: 1, 1: 0, 2: 2, 3: 3}", "numbers in masks have another meaning"),
        (f"palette: {PALETTE}", "colours in masks have another meaning"),
    ],
)
def test_masks_that_mean_something_else_are_refused(
    of_folder: Settings, out: Path, line: str, meaning: str
) -> None:
    train(of_folder, out=out)
    assert of_folder.data_root is not None
    with (of_folder.data_root / "dataset.yaml").open("a") as file:
        file.write(f"{line}\n")
    more = update(of_folder, {"train": {"iterations": 3}}, "test")
    before = contents(out)
    for resume in RESUME:
        with pytest.raises(UserError, match=f"were trained on other data than .*: {meaning}"):
            resume(more, resume=out)
    assert contents(out) == before


def test_files_that_have_changed_are_told(
    of_folder: Settings, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "mine.py"
    method = (
        "from ctt.methods.supervised import Supervised\n\n\nclass Mine(Supervised):\n    pass\n"
    )
    own.write_text(method)
    settings = dataclasses.replace(of_folder, method=f"{own}:Mine")
    train(settings, out=out)
    more = update(settings, {"train": {"iterations": 3}}, "test")
    dry_run(more, resume=out)
    assert "changed since" not in " ".join(capsys.readouterr().out.split())
    first = (out / run.LABELED_LIST).read_text("utf-8").splitlines()[0]
    assert settings.data_root is not None
    with next(settings.data_root.glob(f"{first}*")).open("ab") as file:
        file.write(b" ")
    own.write_text(f"{method}    # better\n")
    dry_run(more, resume=out)
    train(more, resume=out)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("or their masks have changed since the run began (2 labelled images") == 2
    assert shown.count("mine.py has changed since the run began") == 2
    assert (out / run.METHOD).read_text() == own.read_text()


def test_a_checkpoint_of_an_earlier_version_says_nothing_of_files(
    of_folder: Settings, out: Path
) -> None:
    train(of_folder, out=out)
    saved, _ = checkpoint.load_last(out / run.CHECKPOINT)
    del saved["data"]
    checkpoint.save(out / run.CHECKPOINT, saved)
    train(update(of_folder, {"train": {"iterations": 3}}, "test"), resume=out)
