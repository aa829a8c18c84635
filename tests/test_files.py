"""Files that are written as a whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ctt import run
from ctt.files import atomic_write, is_part_of, part_of, remove_parts
from ctt.inference.render import save_png


def test_two_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    """The later one wins, and the other has no error."""
    path = tmp_path / "x.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"

    class Meanwhile:
        def save(self, part: Path, format: str) -> None:
            save_png(Image.new("L", (2, 2), 1), path)
            Image.new("L", (2, 2), 7).save(part, format)

    save_png(Meanwhile(), path)  # type: ignore[arg-type]
    assert Image.open(path).getpixel((0, 0)) == 7
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x", "a" * 250, "\N{HIRAGANA LETTER A}" * 84, "\udcff.png"])
def test_the_longest_names_have_parts(tmp_path: Path, name: str) -> None:
    assert is_part_of(part_of(tmp_path / name), tmp_path / name)
    with atomic_write(tmp_path / name) as part:
        part.write_text("whole")
    assert (tmp_path / name).read_text() == "whole"


def test_parts_of_killed_processes_are_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from ctt.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as part:\n"
        "    print(part, flush=True); input(); os._exit(1)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        part = Path(process.stdout.readline().strip())
        remove_parts(tmp_path)
        assert part.is_file()
        process.communicate("die\n")
    download = tmp_path / "voc.tar.part"
    download.touch()
    elsewhere = tmp_path / "x.00000000-1-00000000.part"
    elsewhere.touch()
    remove_parts(tmp_path)
    assert {*tmp_path.iterdir()} == {download, elsewhere}
    with run.lock(tmp_path):
        assert {*tmp_path.iterdir()} == {download, tmp_path / "checkpoints"}
