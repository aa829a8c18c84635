"""What stands for files in the hash of the settings: what they hold, and not where they are."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from ctt.errors import UserError
from ctt.files import sha256

SAMPLED = 16  # images of a folder whose content counts, at least; of the others name and size do


def of_file(path: Path | str) -> str:
    """Return the checksum of a file; of one that is not there, or no file, its name."""
    try:
        return sha256(Path(path).expanduser())
    except (OSError, RuntimeError):  # RuntimeError: nobody knows the folder of that user
        return Path(path).name


def of_teacher(path: Path | str) -> str:
    """Return the checksum of a run's weights, or of a file of them; without either, the name."""
    from ctt.run import WEIGHTS

    weights = Path(path, WEIGHTS)
    found = of_file(weights)
    return of_file(path) if found == WEIGHTS else found


def of_folder(path: Path | str) -> str:
    """Return the checksum of the images in a folder; of one without images, its name."""
    found = ""
    with contextlib.suppress(OSError, RuntimeError):
        found = _of_images(Path(path).expanduser(), ("",))
    return found or Path(path).name


def of_dataset(root: Path | str) -> str:
    """Return the checksum of a dataset in folders, with its dataset.yaml; empty without one."""
    from ctt.data.description import DESCRIPTION, read_description
    from ctt.data.folder import PARTS

    try:
        root = Path(root).expanduser()
        description = root / DESCRIPTION
        pairs = read_description(description).pairs
        own = [sha256(description), *([of_file(root / pairs)] if pairs else [])]
        return hashlib.sha256(" ".join([*own, _of_images(root, PARTS)]).encode()).hexdigest()
    except (OSError, RuntimeError, UserError):
        return ""


def _of_images(root: Path, folders: Sequence[str]) -> str:
    """Return the checksum of the images in folders below `root`; empty if there are none."""
    from ctt.data import IMAGE_SUFFIXES
    from ctt.data.folder import MASK_SUFFIXES, walk

    ends = (*IMAGE_SUFFIXES, *MASK_SUFFIXES)
    names = [n for part in folders for n in walk(root, part) if n.lower().endswith(ends)]
    digest = hashlib.sha256()
    for place, name in enumerate(names):
        path = root / name
        whole = sha256(path) if place % max(1, len(names) // SAMPLED) == 0 else ""
        digest.update(f"{name}\0{path.stat().st_size}\0{whole}\n".encode(errors="surrogateescape"))
    return digest.hexdigest() if names else ""
