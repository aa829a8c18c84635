"""Whether a run that is resumed goes on with the data that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ctt import fingerprint
from ctt.data.dataset import Dataset

LOOKED_AT = 16  # labelled images whose files are compared
CHANGED = {
    "numbers": "numbers in masks have another meaning (id_map, ignore_index or threshold)",
    "colours": "colours in masks have another meaning (palette or ignore_color)",
}


def facts(dataset: Dataset, labeled: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return what a checkpoint keeps of the data beside the facts of `DatasetInfo`.

    Args:
        labeled: names of the labelled images, in the order of the run's list.
    """
    some = labeled[:: max(1, -(-len(labeled) // LOOKED_AT))]
    return {
        "meaning": dataset.meaning(),
        "files": {name: _content(dataset, name) for name in some},
        "images": {name: _content(dataset, name, labeled=False) for name in some},
    }


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words what masks mean now and did not before; empty if they mean the same.

    Args:
        saved: from `facts`, as in the checkpoint; empty in one of an earlier version.
    """
    after = now["meaning"]
    before = saved.get("meaning", after)
    return next((text for name, text in CHANGED.items() if before.get(name) != after.get(name)), "")


def changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a sentence if some of the labelled images or their masks are other files now."""
    before = saved.get("files", {})
    found = [name for name, text in now["files"].items() if before.get(name, text) != text]
    if not found:
        return []
    return [
        f"Warning: {', '.join(found)} or their masks have changed since the run began "
        f"({len(now['files'])} labelled images were compared), and the run goes on with them as "
        f"they are now."
    ]


def is_of_run(saved: Mapping[str, Any], dataset: Dataset) -> bool:
    """Return whether some of the labelled images of a run are these, or nothing is known of them.

    Args:
        saved: from `facts`, as in the checkpoint. Of earlier versions it holds images and masks
            together, or nothing.
    """
    labeled = "images" not in saved
    known = saved.get("files" if labeled else "images", {})
    return not known or any(
        dataset.find(name) == name and _content(dataset, name, labeled) == text
        for name, text in known.items()
    )


def _content(dataset: Dataset, name: str, labeled: bool = True) -> str:
    """Return the checksum of an image's files, with its mask if `labeled`; of one in memory, of
    none."""
    found = " ".join(fingerprint.of_file(path) for path in dataset.files(name, labeled=labeled))
    return hashlib.sha256(found.encode()).hexdigest()
