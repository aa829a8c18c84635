"""Whether compiled kernels were made from the sources beside them. setup.py runs this file, too."""

import hashlib
import shlex
import warnings
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "csrc"  # in a clone and in an sdist, not in a wheel

ENDINGS = (".cpp", ".h", ".cu", ".cuh")


def digest(part: str) -> str:
    """Return the checksum of the sources in csrc/`part`; of none, an empty text."""
    found = hashlib.sha256()
    files = sorted(path for path in (SOURCES / part).glob("*") if path.suffix in ENDINGS)
    for path in files:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest() if files else ""


def outdated(library: str, built_from: str, part: str) -> str | None:
    """Return why a library cannot be used that was compiled from other sources than those in
    csrc/`part`, as after `git pull`, and warn of it; None if it can, or if no sources are here.

    Args:
        built_from: the checksum of its sources, as `digest` returns it.
    """
    if built_from == digest(part) or not digest(part):
        return None
    reason = (
        f"{library} was compiled from other sources than those in {SOURCES / part}, as after "
        f"`git pull`; compile it again with: pip install -e {shlex.quote(str(SOURCES.parent))}"
    )
    warnings.warn(f"ctt.ops: {reason}", stacklevel=2)
    return reason
