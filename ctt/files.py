"""Atomic file writes, and one error type for failed ones."""

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from ctt.errors import UnwritableError, UserError

NAMED = 32  # letters of a file's name in the names of its parts
PART = re.compile(r"(?s:(?P<name>.+))\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.part")
HUB = "hf:"  # before a repository of the Hugging Face hub
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


def is_on_hub(path: Path) -> bool:
    """Return whether a path names a repository of the Hugging Face hub."""
    return str(path).startswith(HUB)


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


def part_of(path: Path) -> Path:
    """Return a name beside `path` for a file that becomes it, which no other process takes."""
    own = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f"{path.name[:NAMED]}.{own}.part")  # the whole name may be too long


def is_part_of(part: Path, path: Path) -> bool:
    """Return whether the name `part` is one that `part_of` gives."""
    found = PART.fullmatch(part.name)
    return found is not None and found["name"] == path.name[:NAMED]


def remove_parts(folder: Path, *, alone: bool = False) -> None:
    """Remove what processes that were killed have left of the files that they wrote in a folder.

    Args:
        alone: nobody but this process writes in the folder and those below it, so that also parts
            of processes on other machines are left ones.
    """
    for part in folder.rglob("*.part") if alone else folder.glob("*.part"):
        found = PART.fullmatch(part.name)
        if found and (alone or found["machine"] == _machine()) and not _is_running(found):
            with contextlib.suppress(OSError):  # Windows: it is being written
                part.unlink()


def _is_running(found: re.Match[str]) -> bool:
    """Return whether another process of this machine has the number in the name of a part."""
    process = int(found["process"])
    if found["machine"] != _machine() or process == os.getpid() or os.name == "nt":
        return False
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # it is another user's
    return True


@functools.cache
def _machine() -> str:
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which becomes `path` when the block ends and is removed if it fails.

    Whoever reads `path` sees the old file or the new one, also after the machine has lost power.

    Raises:
        UnwritableError: the part cannot be written.
    """
    part = part_of(path)
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
