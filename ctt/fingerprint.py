"""What stands for files in the hash of the settings: what they hold, and not where they are."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ctt.errors import UserError
from ctt.files import is_on_hub, sha256

SAMPLED = 16  # images of a folder whose content counts, at least; of the others name and size do


def of_file(path: Path | str) -> str:
    """Return the checksum of a file; of one that is not there, or no file, its name."""
    try:
        return sha256(Path(path).expanduser())
    except (OSError, RuntimeError):  # RuntimeError: nobody knows the folder of that user
        return Path(path).name


def of_teacher(path: Path | str) -> str:
    """Return the checksum of what teaches: all networks of a run, its best one if there is no
    checkpoint of it, or a file of weights; of what is on the hub or not there, the name."""
    from ctt import run

    if is_on_hub(Path(path)):
        return Path(path).as_posix()
    own = Path(path).expanduser()
    if run.has_checkpoint(own):
        return of_file(own / run.CHECKPOINT)
    found = of_file(own / run.WEIGHTS)
    return of_file(path) if found == run.WEIGHTS else found


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
    from ctt.data.split import read_lines, readings

    try:
        root = Path(root).expanduser()
        description = root / DESCRIPTION
        pairs = read_description(description).pairs
        own, masks = [sha256(description)], set()
        if pairs:  # which may name masks anywhere in the folder
            own.append(of_file(root / pairs))
            for line in read_lines(root / pairs).values():
                named = {text for _, text in readings(line.replace("\\", "/")) if text}
                masks |= {text for text in named if (root / text).is_file()}
        own.append(_of_images(root, PARTS, sorted(masks)))
        return hashlib.sha256(" ".join(own).encode()).hexdigest()
    except (OSError, RuntimeError, UserError):
        return ""


def _of_images(root: Path, folders: Sequence[str], others: Iterable[str] = ()) -> str:
    """Return the checksum of the images in folders below `root`; empty if there are none.

    Args:
        others: files below `root` that count too.
    """
    from ctt.data import IMAGE_SUFFIXES
    from ctt.data.folder import MASK_SUFFIXES, walk

    ends = (*IMAGE_SUFFIXES, *MASK_SUFFIXES)
    names = [n for part in folders for n in walk(root, part) if n.lower().endswith(ends)]
    names = [*dict.fromkeys([*names, *others])]
    digest = hashlib.sha256()
    for place, name in enumerate(names):
        path = root / name
        whole = sha256(path) if place % max(1, len(names) // SAMPLED) == 0 else ""
        digest.update(f"{name}\0{path.stat().st_size}\0{whole}\n".encode(errors="surrogateescape"))
    return digest.hexdigest() if names else ""
