"""Disks that are full or cannot be written: two minutes.

The small disk is a tmpfs, mounted for the test alone; where that is not allowed it is skipped.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from ctt import checkpoint, run
from tests.slow.programs import call, command, environment

RUN = (
    "--ratio 24 --data.labeled-pool 60 --data.eval-images 12 --data.batch-size 4 --model.width 8 "
    "--model.features 16 --bank.capacity 16 --bank.start-after 20 --train.threads 1 "
    "--train.no-tensorboard --train.checkpoint-every 5 --train.eval-every 20 "
)
AS_ROOT = ["unshare", "--map-root-user", "--mount"]
FILLED = 'mount -t tmpfs -o size={size} tmpfs "$0" || exit 99; exec "$@"'


def can_mount(folder: Path) -> bool:
    """Return whether this user may mount a tmpfs that no other program sees."""
    if shutil.which("unshare") is None:
        return False
    script = FILLED.format(size="1m")
    tried = [*AS_ROOT, "sh", "-c", script, str(folder), "true"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


def on_small_disk(folder: Path, size: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script while `folder` is a tmpfs of that size."""
    whole = [*AS_ROOT, "sh", "-c", FILLED.format(size=size), str(folder), "sh", "-c", script]
    return subprocess.run(
        whole, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def shell(program: str, arguments: str) -> str:
    python, option, text, *rest = command(program, arguments)
    return f"{python} {option} '{text}' {' '.join(rest)}"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not can_mount(folder):
        pytest.skip("no tmpfs can be mounted here")
    return folder


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    out = tmp_path_factory.mktemp("measured") / "run"
    assert call("train", f"--out {out} {RUN} --train.iterations 5").returncode == 0
    return (out / run.CHECKPOINT).stat().st_size


def test_a_disk_that_fills_up_while_training(
    disk: Path, tmp_path: Path, checkpoint_bytes: int
) -> None:
    """Room for two checkpoints, of which the third finds the rest taken by somebody else."""
    out, kept = disk / "run", tmp_path / "kept"
    train = shell("train", f"--out {out} {RUN} --train.iterations 1000000")
    again = shell("train", f"--resume {out}")
    script = f"""
        {train} > {tmp_path}/said 2>&1 &
        until [ -f {out}/checkpoints/previous.pt ]; do sleep 0.1; done
        dd if=/dev/zero of={disk}/other 2> /dev/null
        wait $!
        echo "code $?"
        cp -r {out} {kept}
        rm {disk}/other
        {again} > {tmp_path}/later 2>&1 &
        until [ {out}/checkpoints/last.pt -nt {kept}/config.yaml ]; do sleep 0.1; done
        kill -TERM $!
        wait $!
        echo "code $?"
        """
    done = on_small_disk(disk, str(int(3.5 * checkpoint_bytes)), script)
    said = " ".join((tmp_path / "said").read_text().split())
    assert done.stdout.splitlines() == ["code 2", "code 130"], said
    assert "No space left on device" in said
    assert f"The last checkpoint is whole: --resume {out} goes on from it." in said
    assert "Traceback" not in said
    assert [*kept.rglob("*.part")] == []
    iteration = checkpoint.load(kept / run.CHECKPOINT)["iteration"]
    assert iteration == checkpoint.load(checkpoint.previous(kept / run.CHECKPOINT))["iteration"] + 5
    later = " ".join((tmp_path / "later").read_text().split())
    assert f"going on after iteration {iteration}. Run folder" in later
    assert "Stopped after iteration" in later


@pytest.mark.parametrize("checkpoints", [0.2, 0.9])
def test_a_disk_that_is_too_small(disk: Path, checkpoint_bytes: int, checkpoints: float) -> None:
    size = str(int(checkpoints * checkpoint_bytes))
    script = shell("train", f"--out {disk}/run {RUN} --train.iterations 20")
    done = on_small_disk(disk, size, script)
    assert done.returncode == 2, done.stderr
    assert "last.pt cannot be written (No space left on device)" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_full_disk_of_predictions(disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("train", f"--out {out} {RUN} --train.iterations 5").returncode == 0
    script = f"{shell('predict', f'{out} {out}/samples.png --out {disk}')}; ls {disk} >&1"
    done = on_small_disk(disk, "4k", script)
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert ".part" not in done.stdout


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """A folder that this user may not write; root may write any, and loses that right first."""
    folder = tmp_path / "fixed"
    folder.mkdir()
    return folder


def as_nobody(folder: Path, program: str, arguments: str) -> subprocess.CompletedProcess[str]:
    """Call a program without the right to write into the folder."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    line = command(program, arguments)
    if os.geteuid() == 0:
        line = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *line]
    try:
        return subprocess.run(
            line, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


NEEDS_SETPRIV = pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root writes anywhere"
)


@NEEDS_SETPRIV
def test_a_folder_that_cannot_be_written(read_only: Path) -> None:
    began = time.monotonic()
    done = as_nobody(read_only, "train", f"--out {read_only}/run {RUN} --train.iterations 5")
    assert done.returncode == 2, done.stderr
    assert "the folder cannot be written (Permission denied)" in " ".join(done.stderr.split())
    assert [*read_only.iterdir()] == []
    assert time.monotonic() - began < 60  # before anything is trained


@NEEDS_SETPRIV
def test_a_run_that_cannot_be_written(read_only: Path) -> None:
    out = read_only / "run"
    assert call("train", f"--out {out} {RUN} --train.iterations 10").returncode == 0
    before = (out / run.CHECKPOINT).read_bytes()
    done = as_nobody(read_only, "train", f"--resume {out} --train.iterations 20")
    assert done.returncode == 2, done.stderr
    assert f"{out} cannot be written" in " ".join(done.stderr.split())
    assert (out / run.CHECKPOINT).read_bytes() == before
    assert as_nobody(read_only, "evaluate", f"{out} --workers 0").returncode == 0  # it only reads
