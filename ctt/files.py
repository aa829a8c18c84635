"""Atomic file writes, and one error type for failed ones."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from ctt.errors import UnwritableError, UserError

LONGEST_WAIT = 60  # seconds, for a program that writes the same files


@contextlib.contextmanager
def as_write_error(path: Path) -> Iterator[None]:
    """Turn what keeps a file from being written, such as a full disk, into an `UnwritableError`.

    Libraries may wrap our OSError in an exception of their own; its context is searched, too.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = next((e for e in (error, error.__context__) if isinstance(e, OSError)), None)
        if cause is None:
            raise
        raise UnwritableError(path, cause.strerror or str(cause)) from None


def expanded(path: Path, option: str) -> Path:
    """Return a path with the home folder in place of `~` or `~user` at its front.

    Raises:
        UserError: nobody knows that folder.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(
            f"{option} {path}: it is not known which folder {path.parts[0]} stands for. Give the "
            f"whole path."
        ) from None


def sha256(path: Path) -> str:
    """Return the checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which becomes `path` when the block ends and is removed if it fails.

    Whoever reads `path` sees the old file or the new one, also after the machine has lost power.

    Raises:
        UnwritableError: the part cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with as_write_error(path):
            part.touch()
            mode = part.stat().st_mode  # what this user gives to new files
            yield part
            part.chmod(mode)  # some libraries write files that only their owner may read
            with part.open("r+b") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Keep other programs that write `path` under the same lock waiting until the block ends.

    The lock is the file `.NAME.lock` beside `path`. On a file system without locks nobody waits.
    """
    from filelock import FileLock

    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=LONGEST_WAIT, mode=0o666)
    with contextlib.suppress(OSError, NotImplementedError):  # also of a wait that is too long
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
