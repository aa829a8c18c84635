"""ctt-sweep: what it trains, and that it goes on after whatever stopped it."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from ctt import checkpoint, fingerprint, methods, recipes, run
from ctt.cli import sweep, train
from ctt.errors import UserError
from ctt.experiments import catalog, paper, pool, runs
from ctt.experiments import table as tables
from ctt.experiments.results import Row, read
from ctt.experiments.table import write_results
from ctt.inference.load import load_trained
from ctt.settings import Settings
from ctt.train.record import read_rows
from tests.conftest import leave_out_figures
from tests.data import trees

PROGRAM = [sys.executable, "-c", "from ctt.cli.sweep import main; main()"]
TINY = shlex.split(
    "--data.labeled-pool 24 --data.eval-images 6 --data.batch-size 3 --data.crop 24 24 "
    "--model.width 4 --model.features 8 --loss.gamma 0.2 --loss.ct-after 0 --bank.capacity 4 "
    "--bank.per-class 4 --train.iterations 8 --train.eval-every 2 --train.no-tensorboard "
    "--train.deterministic --train.threads 1"
)
FOUR = ["table4", "--only", "supervised", "all", "--seeds", "0", "1", "--shares", "6", *TINY]


def rows_of(path: Path) -> list[Row]:
    """Return the rows without what no two runs have alike."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read(path)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four runs that were never stopped, trained by the commands that are printed."""
    out = tmp_path_factory.mktemp("sweep") / "whole"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert sweep._main([*FOUR, "--out", str(out), "--print"]) == 0
    commands = printed.getvalue().splitlines()
    assert len(commands) == 4
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "ctt-train"
        assert train._main(arguments) == 0
    assert sweep._main([*FOUR, "--out", str(out)]) == 0
    return out


def test_the_table_tells_what_was_run(whole: Path) -> None:
    rows = read(whole / "table4.csv")
    assert [(r["variant"], r["seed"]) for r in rows] == [
        *(("supervised", "0"), ("all", "0")),
        *(("supervised", "1"), ("all", "1")),
    ]
    for row in rows:
        assert (row["status"], row["iterations"], row["labeled"]) == ("done", "8", "6")
        assert (row["experiment"], row["dataset"], row["share"]) == ("table4", "digits", "6")
        assert row["torch"]
        assert row["device"]
        assert 0 <= float(row["last"]) <= float(row["best"]) + 20
        summary = json.loads((whole / "runs" / row["settings_hash"] / "summary.json").read_text())
        assert float(row["ensemble"]) == summary["miou"]["ensemble"]
        teachers = [scores for name, scores in summary["class_iou"].items() if "teacher" in name]
        expected = sum(scores["background"] for scores in teachers) / len(teachers)
        assert float(row["iou background"]) == pytest.approx(expected, abs=0.006)
        metrics = read_rows(whole / "runs" / row["settings_hash"] / "metrics.csv")
        for name in ("confident_pixels", "pseudo_label_accuracy"):
            assert float(row[name]) == pytest.approx(float(metrics[-1][name]), abs=0.0006)
    # 8 steps with 3 labelled images, 3 passes each; of two pairs with as many unlabelled ones too,
    # and the teachers with these and with one of the labelled ones, for the banks
    assert [row["forwards"] for row in rows[:2]] == ["72", str(8 * (3 * 3 * 4 + 2 * 3 + 2))]
    assert [row["method"] for row in rows[:2]] == ["supervised", "cross-teacher"]
    assert "optim.lr" not in rows[0]  # all have the same, which the file beside it tells
    assert "optim.lr: 0.1" in (whole / "table4.yaml").read_text()
    with (whole / "table4-curves.csv").open() as file:
        points = list(csv.DictReader(file))
    assert [p["iteration"] for p in points[:4]] == ["2", "4", "6", "8"]
    assert points[3]["last"] == f"{float(rows[0]['last']):.2f}"


def test_a_sweep_that_was_stopped_ends_like_one_that_was_not(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    command = [*PROGRAM, *FOUR, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # the first time it is killed, and what it was training goes on alone; then comes Ctrl-C
    for number, how in enumerate((signal.SIGKILL, signal.SIGINT), 1):
        with subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            env=environment,
            # what a shell runs in the background inherits that Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            wait_for(lambda n=number: len(begun(out)) > n, process)
            process.send_signal(how)
            process.wait(120)
        assert process.returncode == (130 if how == signal.SIGINT else -how)
    status = [row["status"] for row in read(out / "table4.csv")]
    assert set(status) == {"done", "missing"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows_of(out / "table4.csv") == rows_of(whole / "table4.csv")
    curves = "table4-curves.csv"
    assert (out / curves).read_bytes() == (whole / curves).read_bytes()


def begun(out: Path) -> list[Path]:
    return list((out / "runs").glob("*/metrics.csv"))


def wait_for(
    ready: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120
) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_run_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, start = tmp_path / "sweep", pool.start
    seen: list[runs.Run] = []

    def broken(r: runs.Run, place: pool.Place) -> pool.Job:
        seen.append(r)
        job = start(r, (*place, "--optim.lr", "1e30") if len(seen) == 1 else place)
        assert job is not None
        return dataclasses.replace(job, place=place)

    monkeypatch.setattr(pool, "start", broken)
    command = [*FOUR, "--out", str(out), "--only", "supervised"]
    assert sweep._main(command) == sweep.SOME_FAILED
    first, second = read(out / "table4.csv")
    assert (first["status"], second["status"]) == ("failed", "done")
    assert first["error"].startswith("ctt-train: Training diverged")
    assert "failed: ctt-train: Training diverged" in capsys.readouterr().out
    monkeypatch.setattr(pool, "start", start)
    assert sweep._main(command) == 0
    assert {row["status"] for row in read(out / "table4.csv")} == {"done"}


def test_settings_that_the_data_decides_belong_to_the_run_they_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_out_figures(monkeypatch)
    root, out = trees.write_folder(tmp_path / "mine"), tmp_path / "sweep"
    command = shlex.split(
        "ladder --dataset folder --only supervised --seeds 0 --recipe folder-small "
        "--data.batch-size 2 --data.workers 0 --model.width 4 --model.features 8 "
        "--train.iterations 2 --train.threads 1 --train.device cpu --train.no-tensorboard"
    )
    command += ["--data-root", str(root), "--out", str(out)]

    def trained_here(
        left: list[runs.Run], at: object, done: Callable[[runs.Run, bool], None]
    ) -> bool:
        for r in left:
            done(r, pool.finish(r, train._main(r.command())))
        return True

    monkeypatch.setattr(pool, "train_all", trained_here)
    assert sweep._main(command) == 0
    (row,) = read(out / "ladder.csv")
    assert row["status"] == "done"
    folder = out / "runs" / row["settings_hash"]
    saved, _ = checkpoint.load_last(folder / run.CHECKPOINT)
    assert saved["settings"]["data"]["crop"] == [40, 48]
    assert sweep._main(command) == 0
    assert "1 of 1 runs are finished" in capsys.readouterr().out
    # it goes on by itself with the same crop, and is known by the hash of what it was asked for
    assert train._main(["--resume", str(folder)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert train._main(["--resume", str(folder), "--train.iterations", "3"]) == 0
    longer = run.read_settings(folder)
    assert longer.data.crop == (0, 0)
    summary = json.loads((folder / run.SUMMARY).read_text())
    assert summary["settings_hash"] == longer.hash() != row["settings_hash"]
    saved, _ = checkpoint.load_last(folder / run.CHECKPOINT)
    assert saved["settings"]["data"]["crop"] == [40, 48]
    assert load_trained(folder).settings.data.crop == (40, 48)


def test_the_users_threads_and_device_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [place[2:] for place in pool.places(2, [])] == [
        ("--train.device", "cuda:0"),
        ("--train.device", "cuda:1"),
    ]
    for given in (["--train.threads=1", "--train.device=cpu"], shlex.split("--train.threads 1")):
        assert all("--train.threads" not in place for place in pool.places(2, given))
    assert pool.places(1, ["--train.threads=1", "--train.device=cpu"]) == [()]


@pytest.mark.parametrize("config", ["", "seed: 0", "recipe: [folder]"])
def test_machines_with_and_without_a_gpu_train_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    given = ["--train.iterations", "3"]
    if config:
        file = tmp_path / "own.yaml"
        file.write_text(config)
        given += ["--config", str(file)]
    parsed = sweep.Arguments("ladder", dataset="folder", seeds=(0,), only=("supervised",))
    monkeypatch.setattr(recipes, "has_gpu", lambda device: False)
    (r,) = sweep.plan(parsed, given, tmp_path)
    assert r.settings.data.crop == ((0, 0) if "recipe" not in config else (321, 321))
    monkeypatch.setattr(recipes, "has_gpu", lambda device: True)
    assert train.read(list(r.arguments))[1].hash() == r.folder.name


def test_a_run_that_ended_before_its_first_checkpoint_has_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_out_figures(monkeypatch)
    command = [*FOUR, "--only", "supervised", "--seeds", "0", "--out", str(tmp_path), "--print"]
    command += ["--train.iterations", "2"]
    assert sweep._main(command) == 0
    program, *arguments = shlex.split(capsys.readouterr().out)
    parsed, settings = train.read(arguments)
    run.create(parsed.out, settings)  # as far as it came
    assert sweep._main(command) == 0
    again = shlex.split(capsys.readouterr().out)
    assert again[:3] == [program, "--resume", str(parsed.out)]
    assert again[3:] == ["--train.no-tensorboard", "--train.threads", "1"]
    for line in (arguments, again[1:], arguments):  # of either list, finished or not
        assert train._main(line) == 0
    capsys.readouterr()
    assert sweep._main(command) == 0
    assert capsys.readouterr().out == ""
    assert [row["status"] for row in read(tmp_path / "table4.csv")] == ["done"]


def test_a_run_belongs_to_one_program(whole: Path) -> None:
    settings = run.read_settings(next((whole / "runs").glob("*/config.yaml")).parent)
    r = runs.Run("table4", "6", "", "all", (), settings, whole / "runs" / "none")
    claim = pool.claimed(r)
    assert claim is not None
    assert pool.start(r, ()) is None
    assert not r.folder.exists()
    os.close(claim)
    again = pool.claimed(r)
    assert again is not None
    os.close(again)
    trained = dataclasses.replace(r, folder=whole / "runs" / settings.hash())
    with run.lock(trained.folder):  # as ctt-train --resume has it
        assert pool.claimed(trained) is None


def test_sweeps_may_write_one_table_at_a_time(whole: Path, tmp_path: Path) -> None:
    settings = run.read_settings(next((whole / "runs").glob("*/config.yaml")).parent)
    r = runs.Run("table4", "6", "", "all", (), settings, whole / "runs" / settings.hash())
    table = tmp_path / "table4.csv"

    def write(times: int) -> None:
        for _ in range(times):
            assert [row["status"] for row in write_results(table, [r], ["ctt-sweep"])] == ["done"]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(write, [5] * 4)) == [None] * 4
    assert [row["status"] for row in read(table)] == ["done"]
    assert not list(tmp_path.glob("*.part"))


def test_runs_in_common_are_trained_once(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["cost", *FOUR[4:], "--only", "supervised", "--out", str(whole), "--print"]
    before = (whole / "table4.csv").read_bytes()
    assert sweep._main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6  # three budgets, two seeds
    assert all(line.startswith("ctt-train --dataset digits") for line in lines)
    parsed, settings = train.read(shlex.split(lines[0])[1:])
    assert settings.hash() == parsed.out.name  # type: ignore[union-attr]
    status = {row["budget"]: row["status"] for row in read(whole / "cost.csv")}
    assert status == {
        "equal iterations": "done",
        **dict.fromkeys(("cost 1/4", "cost 1/2", "cost 1"), "missing"),
    }
    assert (whole / "table4.csv").read_bytes() == before
    assert sweep._main([*FOUR, "--out", str(whole)]) == 0
    assert "4 of 4 runs are finished" in capsys.readouterr().out


def test_a_table_keeps_its_finished_runs(whole: Path) -> None:
    table = whole / "table4.csv"
    before = table.read_bytes()
    for other in (["--seeds", "1"], ["--only", "all"], ["--optim.lr", "0.2"]):
        with pytest.raises(UserError, match=r"table4.csv has \d finished runs that this command"):
            sweep._main([*FOUR, *other, "--out", str(whole), "--print"])
        assert table.read_bytes() == before


def test_a_table_keeps_finished_runs_whose_folders_are_gone(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "runs")
    names = ("table4.csv", "table4-curves.csv")
    before = [(out / name).read_bytes() for name in names]
    assert sweep._main([*FOUR, "--out", str(out)]) == 0  # nothing is trained again
    assert [(out / name).read_bytes() for name in names] == before
    assert not (out / "runs").exists()


def test_a_table_keeps_runs_that_another_sweep_finishes_meanwhile(
    whole: Path, tmp_path: Path
) -> None:
    written = tmp_path / "table4.csv"
    first, second = planned_as(FOUR, whole)
    other = planned_as([*FOUR, "--optim.lr", "0.3"], whole)[0]
    for some in ([first], [second], [second, other]):
        write_results(written, some, ["ctt-sweep"])
    rows = {row["settings_hash"]: row for row in read(written)}
    expected = {row["settings_hash"]: row for row in read(whole / "table4.csv")}
    assert set(rows) == {r.folder.name for r in (first, second, other)}
    for r in (first, second):
        common = set(rows[r.folder.name]) & set(expected[r.folder.name])
        assert {"last", "seconds", "iou background"} <= common
        assert all(rows[r.folder.name][n] == expected[r.folder.name][n] for n in common)
    # what the runs do not share any more is told of each
    rates = {name: row["optim.lr"] for name, row in rows.items()}
    assert [rates[r.folder.name] for r in (first, second, other)] == ["0.1", "0.1", "0.3"]
    assert "optim.lr" not in written.with_suffix(".yaml").read_text()
    with (tmp_path / "table4-curves.csv").open() as file:
        assert {point["seed"] for point in csv.DictReader(file)} == {"0", "1"}


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_that_has_another_place_by_now_is_one_row(
    whole: Path, tmp_path: Path, gone: bool
) -> None:
    table = tmp_path / "cost.csv"
    r = dataclasses.replace(planned_as(FOUR, whole)[0], budget="cost 1")
    write_results(table, [r], ["ctt-sweep"])
    before = read(table)
    other = dataclasses.replace(r, budget="cost 1/2")
    if gone:
        other = dataclasses.replace(other, folder=tmp_path / "runs" / r.folder.name)
    write_results(table, [other], ["ctt-sweep"])
    assert read(table) == [row | {"budget": "cost 1/2"} for row in before]
    with (tmp_path / "cost-curves.csv").open() as file:
        assert {point["budget"] for point in csv.DictReader(file)} == {"cost 1/2"}


def test_a_run_with_results_but_no_checkpoint_is_not_removed(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    for file in out.glob("table4*"):
        file.unlink()
    row = next(row for row in read(whole / "table4.csv") if row["variant"] == "supervised")
    folder = out / "runs" / row["settings_hash"]
    shutil.rmtree(folder / "checkpoints")
    summary = json.loads((folder / run.SUMMARY).read_text()) | {"settings_hash": "longer"}
    (folder / run.SUMMARY).write_text(json.dumps(summary))
    (folder / "notes.txt").write_text("mine")
    only = ["--only", "supervised", "--out", str(out)]
    assert sweep._main([*FOUR, *only]) == sweep.SOME_FAILED
    r = next(r for r in planned_as(FOUR, out) if r.folder == folder)
    with pytest.raises(UserError, match=r"supervised, 6, seed .* no checkpoint to go on from"):
        pool.train_one(r, [])  # as a job of a cluster
    assert (folder / "notes.txt").is_file()
    assert {row["status"] for row in read(out / "table4.csv")} == {"done", "failed"}
    (error,) = (row["error"] for row in read(out / "table4.csv") if row["error"])
    assert "no checkpoint to go on from" in error
    # one that was killed between its first evaluation and its first checkpoint begins anew
    (folder / run.SUMMARY).unlink()
    assert (folder / run.WEIGHTS).is_file()
    assert r.obstacle() is None


def planned_as(command: list[str], out: Path) -> list[runs.Run]:
    shares, rest = command.index("--shares"), command[command.index("--shares") + 2 :]
    parsed = sweep.Arguments(
        command[0], seeds=(0, 1), shares=(command[shares + 1],), only=("supervised",)
    )
    return list(sweep.plan(parsed, rest, out))


STAND_IN = """
import signal, sys, time
def stop(number, frame):
    open(sys.argv[1], "w").write("checkpoint")
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
open(sys.argv[1], "w").write("started")
time.sleep(60)
"""


def test_an_error_of_the_sweep_lets_its_runs_write_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow"
    monkeypatch.setattr(pool, "PROGRAM", (sys.executable, "-c", STAND_IN, str(slow)))
    first, second = (
        runs.Run("table4", "6", "", name, (), Settings(), tmp_path / "runs" / name)
        for name in ("first", "second")
    )

    def summary(r: runs.Run) -> dict[str, str] | None:
        return {} if r is second and slow.is_file() and slow.read_text() else None

    def done(r: runs.Run, good: bool) -> None:
        raise ValueError("a fault of the table")

    def started(
        r: runs.Run, place: pool.Place, start: Callable[..., object] = pool.start
    ) -> object:
        job = start(r, place)
        while not slow.is_file() or not slow.read_text():
            time.sleep(0.05)
        return job

    monkeypatch.setattr(runs.Run, "summary", summary)
    monkeypatch.setattr(pool, "start", started)
    with pytest.raises(ValueError, match="a fault of the table"):
        pool.train_all([first, second], [(), ()], done)
    assert slow.read_text() == "checkpoint"


def test_a_table_that_cannot_be_written_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = iter([False, True, False])

    def write(*arguments: object) -> list[Row]:
        if next(full):
            raise UserError("table4.csv cannot be written (No space left on device).")
        return write_results(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tables, "write_results", write)
    monkeypatch.setattr(pool, "train_all", lambda left, at, done: done(left[0], False) is None)
    only = ["--only", "supervised", "--seeds", "0", "--out", str(tmp_path)]
    assert sweep._main([*FOUR, *only]) == sweep.SOME_FAILED
    assert "Not written: table4.csv cannot be written" in capsys.readouterr().out


def test_a_resumed_run_has_the_data_and_the_device_of_the_command(tmp_path: Path) -> None:
    given = shlex.split("--train.threads=1 --data.workers 0 --optim.lr 0.2 --train.no-tensorboard")
    parsed = sweep.Arguments("ladder", dataset="digits", seeds=(0,), only=("supervised",))
    (r,) = sweep.plan(parsed, given, tmp_path)
    r.folder.mkdir(parents=True)
    (r.folder / run.CONFIG).write_text("seed: 0\n")
    assert r.command() == [
        *("--resume", str(r.folder), "--train.threads=1", "--data.workers", "0"),
        "--train.no-tensorboard",
    ]


def test_options_that_no_row_reads_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ladder", "--seeds", "0", "--out", str(tmp_path), "--print", "--loss.ct", "0.5"]
    assert sweep._main([*command, "--only", "supervised"]) == 0
    out, err = capsys.readouterr()
    assert "--loss.ct" not in out
    assert "--loss.ct: no method of these rows reads this" in err
    assert sweep._main([*command, "--only", "supervised", "cross teacher"]) == 0
    assert capsys.readouterr().err == ""


def test_one_pair_has_no_peer_for_the_low_level_contrast(tmp_path: Path) -> None:
    parsed = sweep.Arguments("ladder", seeds=(0,), only=("cross teacher",))
    (r,) = sweep.plan(parsed, ["--pairs", "1"], tmp_path)
    assert "--loss.lc" not in r.arguments
    assert (r.settings.pairs, r.settings.loss.hc) == (1, 0)


def test_equal_shares_are_refused(tmp_path: Path) -> None:
    parsed = sweep.Arguments("ladder", seeds=(0,), shares=("1/8", "0.2", "0.125"))
    with pytest.raises(UserError, match=r"--shares 1/8 0.125 are one share"):
        list(sweep.plan(parsed, [], tmp_path))


def test_rows_have_their_own_method_whatever_a_recipe_says(tmp_path: Path) -> None:
    parsed = sweep.Arguments(
        "ladder",
        dataset="voc",
        seeds=(0,),
        shares=("92",),
        only=("supervised", "cross teacher and contrast"),
    )
    given = shlex.split("--data.voc-set classic --recipe voc-classic-dinov2-unimatch-v2")
    planned = {r.variant: r.settings.method for r in sweep.plan(parsed, given, tmp_path)}
    assert planned == {
        "supervised": "supervised",
        "cross teacher and contrast": "cross-teacher",
    }


def test_all_labels_are_for_methods_without_unlabelled_images(tmp_path: Path) -> None:
    runs = list(sweep.plan(sweep.Arguments("shares", seeds=(0,)), [], tmp_path))
    assert [r.variant for r in runs if r.share == "1/1"] == ["supervised"]
    assert len([r for r in runs if r.share == "50"]) == 16
    asked = sweep.Arguments("shares", seeds=(0,), shares=("1/1",), only=("cross-teacher",))
    assert [r.share for r in sweep.plan(asked, [], tmp_path)] == ["1/1"]
    # the recipe of a folder takes all images with masks, and has others without
    for name in ("ladder", "shares"):
        folder = sweep.Arguments(name, dataset="folder", seeds=(0,))
        planned = list(sweep.plan(folder, ["--recipe", "folder-small"], tmp_path))
        assert {r.share for r in planned} == {"1/1"}
        assert [r.variant for r in planned] == [v.name for v in catalog.get(name).variants]


def test_the_papers_tables_have_the_labels_that_it_prints(tmp_path: Path) -> None:
    of = {name: catalog.get(name).shares.get("cityscapes") for name in paper.TABLES}
    assert of == dict.fromkeys(paper.TABLES, ("1/8",))
    for dataset, share in (("cityscapes", "1/8"), ("voc", "1/20")):
        parsed = sweep.Arguments("table6", dataset=dataset, seeds=(0,))
        assert {r.share for r in sweep.plan(parsed, [], tmp_path)} == {share}


def test_why_a_run_was_killed_is_told(tmp_path: Path) -> None:
    r = runs.Run("table4", "6", "", "all", (), Settings(), tmp_path / "run")
    r.log.write_text("ctt-train: an earlier error\n")
    said = r.log.stat().st_size
    with r.log.open("a") as log:
        log.write("iteration 40  mIoU student_1 21.4\n")
    assert not pool.finish(r, -signal.SIGKILL, said)
    assert r.error.read_text() == (
        "The program was killed (SIGKILL), as systems do when memory is short."
    )
    assert not pool.finish(r, 1, said)
    assert "iteration 40" in r.error.read_text()


def test_masks_anywhere_belong_to_the_data(tmp_path: Path) -> None:
    for name in ("images/1.png", "drawn/by hand/x.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("L", (24, 24)).save(tmp_path / name)
    (tmp_path / "pairs.txt").write_text("images/1.png\tdrawn/by hand/x.png\n")
    (tmp_path / "dataset.yaml").write_text("classes: [ground, tree]\npairs: pairs.txt\n")
    before = fingerprint.of_dataset(tmp_path)
    Image.new("L", (24, 24), 1).save(tmp_path / "drawn/by hand/x.png")
    assert "" != fingerprint.of_dataset(tmp_path) != before


def test_a_run_that_teaches_counts_by_all_its_networks(whole: Path, tmp_path: Path) -> None:
    folder = next(path for path in (whole / "runs").iterdir() if path.is_dir())
    teacher = tmp_path / "teacher"
    shutil.copytree(folder, teacher)
    before = fingerprint.of_teacher(teacher)
    assert before == fingerprint.of_teacher(folder)
    with (teacher / run.CHECKPOINT).open("ab") as file:
        file.write(b" ")
    assert fingerprint.of_teacher(teacher) != before
    shutil.rmtree(teacher / "checkpoints")
    assert fingerprint.of_teacher(teacher) == fingerprint.of_teacher(teacher / run.WEIGHTS)


@pytest.mark.parametrize("name", list(catalog.EXPERIMENTS))
def test_every_row_of_every_experiment_can_be_trained(name: str) -> None:
    """Its options are known, and none of them is one that its method ignores."""
    experiment = catalog.get(name)
    found = [train.read(list(variant.options))[1] for variant in experiment.variants]
    assert len({settings.hash() for settings in found}) >= len(found) - (name != "cost")
    names = [variant.name for variant in experiment.variants]
    assert len(set(names)) == len(names)
    assert experiment.compared_with in names
    assert all(text in names for text in paper.TABLES.get(name, {}))


def test_the_papers_methods_are_all_there() -> None:
    shares = catalog.get("shares")
    names = {variant.name for variant in shares.variants}
    assert names <= set(methods.names())
    for data, table in paper.SHARES.items():
        assert set(table) <= names
        for row in table.values():
            assert set(row) <= set(shares.shares[data])
    assert paper.printed("shares", "voc", "1/50", "cross-teacher") == 69.24
    assert paper.printed("shares", "voc", "1/50", "ecs") is None
    assert paper.printed("table5", "digits", "1/20", "dual teachers") == 62.42


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("nothing", "no such experiment. Experiments: shares, table4"),
        ("tau --only 3", "`only` 3: no such row. Rows: 0.05, 0.1"),
        ("tau --jobs 0", "--jobs must be at least 1"),
        ("tau --seed 3", "--seed is not for all runs of an experiment. Give --seeds"),
        ("tau --ratio 1/4", "Give --shares"),
        ("tau --seed=3", "--seed is not for all runs of an experiment. Give --seeds"),
        ("tau --method=mean-teacher", "--method is not for all runs"),
        ("tau --dry_run", "--dry-run is not for all runs"),
        ("tau --shares 6 12 --split-labeled few.txt", "few.txt is one share of labels"),
        ("tau table5", "table5: this belongs to no option"),
        ("tau --train.iterations 0", "`train.iterations` must be at least 1"),
        ("tau --shares few", "`ratio` few is no ratio"),
        ("tau --seeds -1", "`seed` must be in 0"),
        ("tau --seeds 0 1 0", "--seeds 0 is given twice"),
        ("tau --shares 6 6", "--shares 6 is given twice"),
        ("tau --dataset nope", "`dataset` nope: no such dataset"),
        ("table7 --bank.capacity 32", "--bank.capacity: the rows of table7 set this themselves"),
        ("table9 --loss.no_directional", "--loss.no-directional: the rows of table9 set this"),
        ("table6 --loss.lc 0.3", "--loss.lc: the rows of table6 set this themselves"),
    ],
)
def test_bad_input_is_told(arguments: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        sweep._main([*shlex.split(arguments), "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_gets_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    out = tmp_path / "sweep"
    command = [*FOUR, "--only", "supervised", "--seeds", "0", "--out", str(out)]
    with pytest.raises(UserError, match=r"--submit: .*no parameter of the form name=value"):
        sweep._main([*command, "--submit", "fast"])
    assert sweep._main([*command, "--submit", "cluster=debug"]) == 0
    assert "1 job is submitted" in capsys.readouterr().out


def test_a_job_that_slurm_still_has_is_not_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitit = pytest.importorskip("submitit")
    states = tmp_path / "states"
    programs = {  # of a cluster: jobs get numbers, and have the states that a file says
        "srun": "exit 1",
        "sbatch": f"echo Submitted batch job $(($(wc -l < {states}) * 10))",
        "sacct": f"cat {states}",
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    out = str(tmp_path / "sweep")
    command = [*FOUR, "--only", "supervised", "cross teacher", "--seeds", "0", "--out", out]

    def submit(*found: str) -> str:
        submitit.SlurmJob.watcher.clear()  # each command is a program of its own
        states.write_text("\n".join(["JobID|State|NodeList", *found, ""]))
        assert sweep._main([*command, "--submit", "timeout_min=9"]) == 0
        return capsys.readouterr().out

    assert "2 jobs are submitted" in submit()  # 10_0 and 10_1
    told = submit("10_0|PENDING|", "10_1|RUNNING|n1")
    assert "2 of the runs have jobs that wait or work" in told
    assert "submitted; what" not in told
    told = submit("10_0|FAILED|n1", "10_1|RUNNING|n1")
    assert "1 of the runs have jobs" in told
    assert "1 job is submitted" in told
    assert "2 of the runs have jobs" in submit("30|PENDING|", "10_1|RUNNING|n1")
