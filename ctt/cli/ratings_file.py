"""The file that ctt-predict --rank goes on from when it was interrupted."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ctt.files import as_write_error
from ctt.inference.rank import Committee, Rating

if TYPE_CHECKING:
    from ctt.cli.ranking import Entry

NAME = "ratings.jsonl"


class RatingsFile:
    """Ratings by image, of which each is on the disk as soon as it is known.

    A rating is taken from the file only while the image, the networks and the way in which they
    see it are the same.

    Args:
        folder: that of the results; the file is gone from it once the order is written.
    """

    def __init__(self, folder: Path, committee: Committee) -> None:
        self.path = folder / NAME
        self.committee = _checksum(committee)
        self.found: dict[str, Rating] = {}
        if self.path.is_file():
            for line in self.path.read_text("utf-8", "replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short
                    known = json.loads(line)
                    self.found[known["image"]] = Rating(
                        known["disagreement"], known["entropy"], _decoded(known["features"])
                    )

    def get(self, entry: Entry) -> Rating | None:
        """Return the rating of an image; None if it is not known."""
        return self.found.get(self._key(entry))

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[str]]:
        """Open the file to add ratings to it."""
        with as_write_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a", encoding="utf-8")
        with file:
            file.write("\n")  # after a line that was cut short
            yield file

    def add(self, file: IO[str], entry: Entry, rating: Rating) -> None:
        """Write a rating into the file that `opened` gives."""
        line = {
            "image": self._key(entry),
            "disagreement": rating.disagreement,
            "entropy": rating.entropy,
            "features": base64.b64encode(rating.features.numpy().tobytes()).decode(),
        }
        with as_write_error(self.path):
            file.write(json.dumps(line) + "\n")
            file.flush()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _key(self, entry: Entry) -> str:
        """Return what a rating depends on, as a checksum."""
        parts = [self.committee, ascii(entry.name)]  # ascii: a name need not be in UTF-8
        if entry.file is not None:
            about = entry.file.stat()
            parts += [str(about.st_size), str(about.st_mtime_ns)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _checksum(committee: Committee) -> str:
    """Return the checksum of networks and of how they see images."""
    digest = hashlib.sha256(repr((committee.names, committee.settings, committee.info)).encode())
    for network in committee.networks:
        for name, value in network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _decoded(text: str) -> Tensor:
    """Return the features that a line holds.

    Raises:
        ValueError: it holds none.
    """
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).copy())
