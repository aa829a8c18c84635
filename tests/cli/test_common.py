import errno
import os

import pytest

from ctt.cli.common import BAD_INPUT, run_program


def test_a_full_disk_is_one_line_wherever_it_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    def body(number: int) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.raises(SystemExit) as stop:
        run_program("ctt-x", lambda: body(errno.ENOSPC))
    assert stop.value.code == BAD_INPUT
    assert capsys.readouterr().err == "ctt-x: No space left on device.\n"
    with pytest.raises(OSError, match="Bad file descriptor"):  # a fault of the program
        run_program("ctt-x", lambda: body(errno.EBADF))
