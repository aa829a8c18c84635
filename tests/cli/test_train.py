import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ctt.cli import train as program
from ctt.errors import UserError
from ctt.run import has_checkpoint

QUICK = (
    "--ratio 6 --data.labeled-pool 24 --data.eval-images 6 --data.batch-size 2 --model.width 4 "
    "--model.features 8 --train.threads 1 --train.log-every 1"
)


def run(arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ctt-train", *shlex.split(arguments)])
    with pytest.raises(SystemExit) as stop:
        program.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--dataset nope", "--dataset nope: no such dataset. Datasets: digits"),
        ("--dataset vocc --data.voc-set classic", "--dataset vocc: no such dataset"),
        ("--ratio 1/0", "--ratio 1/0 is no ratio"),
        ("--ratio 5000", "--ratio 5000: the number of labelled images must be in 1..1000"),
        ("--loss.tau-hc -1", "--loss.tau-hc must be above 0, got -1"),
        ("--loss.tau-hc warm", "--loss.tau-hc"),
        ("--out {file}/run", "cannot be written"),
        ("--out {file}", "this is a file"),
        ("--resume {file}", "no checkpoint of a run"),
        ("--resume {empty}", "config.yaml is missing"),
        ("--resume {nowhere}", "there is no such folder"),
        ("--resume {broken}", "no checkpoint that can be read"),
        ("--config {nowhere}", "cannot be read"),
        ("--config {yaml}", "there is no setting losses"),
        ("--recipe nope", "no such recipe. Recipes: ade20k"),
        ("--method nope", "no such method"),
        ("--model.name nope", "no such architecture"),
        ("--model.weights {nowhere}", "there is no such file"),
        ("--train.device cuda:99", "--train.device cuda:99 cannot be used here"),
        ("--data-root {empty}", "has no folder"),
        ("--out {file} --resume {broken}", "exclude each other"),
        ("--out {long}", "cannot be written"),
        ("--views.blur-sigma 0 0", "--views.blur-sigma must be two numbers above 0"),
        ("--data.scale 0.5 inf", "--data.scale must be"),
        ("--optim.nesterov --optim.momentum 0", "needs --optim.momentum above 0"),
        (
            "--train.cuda-graph --train.device cpu",
            "--train.cuda-graph records the work of one process on a GPU",
        ),
        ("--train.cuda-graph --train.profile 3", "excludes --train.profile"),
        (
            "--data.unlabeled-batch-size 7 --train.accumulate 2",
            "--train.accumulate must divide --data.batch-size 12 and --data.unlabeled-batch-size 7",
        ),
        (
            "--method supervised --data.unlabeled-batch-size 7",
            "--data.unlabeled-batch-size changes nothing with --method supervised",
        ),
        ("--train.accumulate 5", "--train.accumulate must divide --data.batch-size 12"),
        (
            "--method mean-teacher --loss.hc 5",
            "--loss.hc changes nothing with --method mean-teacher",
        ),
        ("--method cct --views.jitter 0.5", "--views.jitter changes nothing with --method cct"),
        ("--optim.pair-lr 0.1 0.2 --optim.lr 1", "--optim.lr changes nothing with --optim.pair-lr"),
        (
            "--optim.pair-head-lr-factor 2 --optim.head-lr-factor 1",
            "--optim.head-lr-factor changes nothing with --optim.pair-head-lr-factor 2",
        ),
        ("--model.pair-name small --model.name vit", "--model.name changes nothing with --model"),
        ("--bank.no-random-choice --bank.top-k 3", "--bank.top-k changes nothing with --bank"),
        ("--views.blur-probability 0 --views.blur-sigma 1 2", "--views.blur-sigma changes nothing"),
        ("--method supervised --bank.capacity=9", "--bank.capacity changes nothing with"),
        ("--method supervised --views.mix classmix", "--views.mix changes nothing with --method"),
        ("--pairs 1 --loss.no-directional", "--loss.directional changes nothing with --method"),
        ("--model.name deeplabv2 --model.width 5", "--model.width changes nothing with --model"),
        ("--optim.betas 0.8 0.9", "--optim.betas changes nothing with --optim.name sgd"),
        ("--optim.name adamw --optim.nesterov", "--optim.nesterov changes nothing with"),
        ("--optim.schedule cosine --optim.power 2", "--optim.power changes nothing with"),
        ("--eval.window 99 99", "--eval.window changes nothing with --eval.protocol whole"),
        ("--eval.protocol center-crop --eval.stride 9", "--eval.stride changes nothing with"),
        ("--data.voc-set classic", "--data.voc-set changes nothing with --dataset digits"),
        ("--dataset folder --data.labeled-pool 9", "--data.labeled-pool changes nothing with"),
        ("--labeled.ohem-kept 9", "--labeled.ohem-kept changes nothing with --labeled.ohem 0"),
        ("--labeled.beta 0.5", "--labeled.beta changes nothing with --labeled.class-weights none"),
        ("--method supervised --config {bank}", "--bank.capacity changes nothing with"),
        ("--train.device meta", "--train.device meta cannot be used here"),
        ("--split-labeled {nowhere}", "cannot be read"),
        ("--dry-run --out {file}/run", "cannot be written"),
        ("--dry-run --out {file}", "this is a file"),
        ("--dry-run --out {long}", "cannot be written"),
        ("--dry-run --out {broken}", "the folder is not empty"),
        ("--dry-run --resume {broken}", "no checkpoint that can be read"),
        ("--dry-run --model.weights {nowhere}", "there is no such file"),
        (
            "--dry-run --train.cuda-graph --train.device cpu",
            "--train.cuda-graph records the work of one process",
        ),
    ],
)
def test_bad_input_is_one_paragraph(
    arguments: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {
        name: tmp_path / name for name in ("file", "empty", "nowhere", "broken", "yaml", "bank")
    }
    paths["long"] = tmp_path / ("x" * 300)
    paths["file"].write_text("text")
    paths["empty"].mkdir()
    paths["yaml"].write_text("losses: {tau_hc: 1}\n")
    paths["bank"].write_text("bank: {capacity: 9}\n")
    (paths["broken"] / "checkpoints").mkdir(parents=True)
    (paths["broken"] / "config.yaml").write_text("dataset: digits\n")
    (paths["broken"] / "split").mkdir()
    for name in ("labeled", "unlabeled"):
        (paths["broken"] / "split" / f"{name}.txt").write_text("train-000\n")
    (paths["broken"] / "checkpoints" / "last.pt").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    code = run(arguments.format(**paths), monkeypatch)
    shown = capsys.readouterr()
    flat = re.sub(r"[\s│]+", " ", shown.err)
    assert code == 2
    assert text in flat
    assert "Traceback" not in shown.err
    left = sorted(path for path in tmp_path.rglob("*") if path.name != ".lock")
    assert left == before


def test_command_line_wins_over_file_over_recipe_in_any_order(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("loss: {tau_hc: 0.2, tau_lc: 0.3}\nseed: 5\n")
    one = program.parse(["--config", str(file), "--loss.tau-hc", "0.4"])
    other = program.parse(["--loss.tau-hc", "0.4", f"--config={file}"])
    assert one == other
    assert (one.loss.tau_hc, one.loss.tau_lc, one.seed) == (0.4, 0.3, 5)
    assert one.model.width == program.parse(["--recipe", "digits"]).model.width
    with pytest.raises(UserError, match="no such recipe"):
        program.parse(["--recipe", "none"])


def test_recipes_of_a_file_are_those_of_its_list(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("recipe: [digits, released]\nloss: {tau_lc: 0.3}\n")
    found = program.parse(["--config", str(file)])
    assert (found.model.width, found.bank.capacity, found.loss.tau_lc) == (16, 256, 0.3)
    assert program.parse(["--config", str(file), "--recipe", "digits"]).bank.capacity == 64
    for names, text in (("[digits, none]", "none: no such recipe"), ("3", "a name or a list of")):
        file.write_text(f"recipe: {names}\n")
        with pytest.raises(UserError, match=text):
            program.parse(["--config", str(file)])


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys; from ctt.cli.train import main\n"
        "try: main()\n"
        "finally: print('torch loaded' if 'torch' in sys.modules else 'light')"
    )
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--loss.tau-hc" in done.stdout
    assert done.stdout.rstrip().endswith("light")


def test_a_missing_library_is_told_in_one_line() -> None:
    code = "import sys; sys.modules['tyro'] = None; from ctt.cli.train import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'ctt[train]'" in done.stderr


def wait_for_steps(process: subprocess.Popen[Any], out: Path) -> None:
    """Wait until a run that logs each step has done a few."""
    deadline = time.monotonic() + 240
    metrics = out / "metrics.csv"
    while not metrics.exists() or metrics.read_text().count("\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path,
    number: int,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "a run"
    base = [sys.executable, "-c", "from ctt.cli.train import main; main()"]
    endless = f"{QUICK} --train.iterations 100000 --data.workers {workers}"
    command = [*base, *shlex.split(endless), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_steps(process, out)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    found = re.search(r"Stopped after iteration (\d+)", shown)
    assert found is not None
    assert f"ctt-train --resume {shlex.quote(str(out))}" in shown
    last = int(found[1]) + 3
    quoted = shlex.quote(str(out))
    assert run(f"--resume {quoted} --train.iterations {last}", monkeypatch) == 0
    assert f"going on after iteration {found[1]}" in capsys.readouterr().out
    assert (out / "summary.json").is_file()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="systems without terminals of this kind")
def test_a_closed_terminal_leaves_a_checkpoint(tmp_path: Path) -> None:
    mine, of_run = os.openpty()
    in_terminal = (  # SIGHUP is ignored where nohup has started the tests
        "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "from ctt.cli.train import main; main()"
    )
    endless = f"{QUICK} --train.iterations 100000 --data.workers 1 --out {tmp_path / 'run'}"
    process = subprocess.Popen(
        [sys.executable, "-c", in_terminal, *shlex.split(endless)],
        stdin=of_run,
        stdout=of_run,
        stderr=of_run,
        start_new_session=True,
    )
    os.close(of_run)
    try:
        wait_for_steps(process, tmp_path / "run")
        os.close(mine)
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
    assert has_checkpoint(tmp_path / "run")


def test_resume_refuses_what_the_checkpoint_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(f"{QUICK} --train.iterations 2 --out {out}", monkeypatch) == 0
    for change in ("--model.width 5", "--method supervised", "--pairs 3", "--bank.capacity 9"):
        assert run(f"--resume {out} {change}", monkeypatch) == 2
        assert change.split()[0] in capsys.readouterr().err
    assert run(f"--resume {out} --dry-run --pairs 2", monkeypatch) == 0  # what it has by default
    list_of_run = out / "split" / "unlabeled.txt"
    list_of_run.write_text(list_of_run.read_text().partition("\n")[2])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(f"--resume {out} --dry-run --train.iterations 3", monkeypatch) == 0
    assert "go on after iteration 2 with 6 labelled and 17 unlab" in capsys.readouterr().out
    assert run(f"--resume {out} --dry-run --train.iterations 1", monkeypatch) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_dry_run_tells_the_memory_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(f"{QUICK} --dry-run", monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "6 labelled and 18 unlabelled images" in shown
    for row in ("activations", "momenta", "cpu has", "largest --data.batch-size"):
        assert row in shown
    assert list(tmp_path.iterdir()) == []
    assert run("--ratio 5000 --dry-run", monkeypatch) == 2


def test_a_job_that_is_started_again_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = f"{QUICK} --auto-resume --out {out} --recipe digits --train.iterations"
    assert run(f"{command} 2 --dry-run", monkeypatch) == 0
    assert not out.exists()
    assert run(f"{command} 2", monkeypatch) == 0
    assert run(f"{command} 2", monkeypatch) == 0
    assert "is finished: all 2 iterations" in capsys.readouterr().out
    assert run(f"{command} 3", monkeypatch) == 0
    assert "going on after iteration 2" in capsys.readouterr().out
    assert run(f"{command} 4 --seed 7", monkeypatch) == 2  # it would be another run
    assert "--seed" in capsys.readouterr().err
    for path in out.rglob("*.pt"):
        path.unlink()
    (out / "summary.json").unlink()
    assert run(f"{command} 2", monkeypatch) == 0  # killed before its first checkpoint
    assert "begins from the start" in capsys.readouterr().out
    assert run(f"{QUICK} --auto-resume --train.iterations 1", monkeypatch) == 2
    assert "--auto-resume needs --out" in capsys.readouterr().err
    assert run(f"--auto-resume --resume {out} --out {out}", monkeypatch) == 2
    assert "--resume and --auto-resume exclude each other" in capsys.readouterr().err
    assert run("--auto-resume --help", monkeypatch) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    assert run(f"{QUICK} --auto-resume --out {tmp_path / 'other'}", monkeypatch) == 2
    assert "the folder is not empty" in " ".join(capsys.readouterr().err.split())
