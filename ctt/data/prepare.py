"""Images and labels resized for training, and cached decoded in files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ctt import __version__
from ctt.data.dataset import Dataset
from ctt.data.files import FileDataset
from ctt.errors import UserError
from ctt.files import expanded


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (C, H, W) uint8 or float32 -> (C, h, w), with a filter where it shrinks."""
    # PyTorch 2.14 resizes bytes to a single column wrongly
    exact = image.float() if size[1] == 1 else image
    found = F.interpolate(exact[None], size, mode="bilinear", antialias=True, align_corners=False)
    return found[0] if found.dtype == image.dtype else found[0].round().to(image.dtype)


def resize_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (H, W) uint8 -> (h, w), the nearest pixel."""
    return F.interpolate(label[None, None], size, mode="nearest-exact")[0, 0]


class Prepared:
    """The training images of a dataset, resized, and read from a cache where there is one.

    It reads images that are chosen already; which ones there are is the dataset's matter.

    The cache is a folder of arrays, one file for an image and one for a label, written when they
    are first read. They are mapped into memory: all loader processes, ranks and runs on a machine
    share one copy, of which a crop reads its own rows only, and which the system drops when it
    needs the memory. Three bytes a pixel of an image (of bands, four for each) and one of a label,
    after the resize. A file that has changed since is read anew.

    Args:
        size: height and width, or None to keep those of each image.
        cache: a folder, or None.
    """

    def __init__(self, dataset: Dataset, size: tuple[int, int] | None, cache: Path | None) -> None:
        self.dataset, self.size = dataset, size
        self.info = dataset.info
        in_files = isinstance(dataset, FileDataset)
        self.cache = expanded(cache, "`data.cache`") if in_files and cache else None

    def image(self, name: str) -> Tensor:
        """Return an image as `Dataset.image` does, at the size for training."""
        return self._cached("image", name, lambda: self._resized_image(self.dataset.image(name)))

    def label(self, name: str) -> Tensor:
        """Return the label that belongs to `image`, which is 255 where that has no data."""

        def read() -> Tensor:
            label = self.dataset.pair(name)[1]  # whose size is the image's
            return label if self.size is None else resize_label(label, self.size)

        return self._cached("label", name, read)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return image (C, H, W) and label (H, W)."""
        if self.cache is not None:
            return self.image(name), self.label(name)
        image, label = self.dataset.pair(name)
        if self.size is not None:
            label = resize_label(label, self.size)
        return self._resized_image(image), label

    def _resized_image(self, image: Tensor) -> Tensor:
        return image if self.size is None else resize_image(image, self.size)

    def _cached(self, kind: str, name: str, read: Callable[[], Tensor]) -> Tensor:
        if self.cache is None:
            return read()
        path = self.cache / f"{self._key(kind, name)}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            # copied on write, which never happens: read-only arrays cannot become tensors
            array = np.load(path, mmap_mode="c")
            return _to_tensor(torch.from_numpy(array))
        value = read()
        self._keep(path, value)
        return value

    def _key(self, kind: str, name: str) -> str:
        """Names the bytes that would be read: by the files, when they were written, and how.

        A label depends on its image, too, which may have pixels without data. Another version of
        this program may read the same files differently.
        """
        assert isinstance(self.dataset, FileDataset)
        files = self.dataset.files(name, labeled=kind == "label")
        parts: list[object] = [__version__, kind, self.size, self.info.white, self.dataset.turned]
        parts += [self.info.bands, self.info.ranges]
        for path in files:
            try:
                state = path.stat()
            except OSError:
                raise UserError(f"{path}: there is no such file.") from None
            parts += [os.fspath(path.resolve()), state.st_mtime_ns, state.st_size]
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=16)
        if kind == "label":
            digest.update(self.dataset.label_map(files[-1]).key())
        return digest.hexdigest()

    def _keep(self, path: Path, value: Tensor) -> None:
        assert self.cache is not None
        part = None
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            # a name that no other process takes, with this user's usual permissions
            part = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.part")
            with part.open("xb") as file:
                np.save(file, np.ascontiguousarray(_from_tensor(value).numpy()))
            part.replace(path)
        except OSError as error:
            if part is not None:
                part.unlink(missing_ok=True)
            if isinstance(error, PermissionError) and path.is_file():
                return  # Windows: another process wrote it meanwhile, and has it open
            raise UserError(
                f"`data.cache` {self.cache} cannot be written ({error.strerror}). Give a folder "
                f"that can be written and has room, or None, which reads the files every time."
            ) from None


def _from_tensor(value: Tensor) -> Tensor:
    """Rows of an image lie together, so that a crop reads few pages."""
    return value.permute(1, 2, 0) if value.dim() == 3 else value


def _to_tensor(stored: Tensor) -> Tensor:
    return stored.permute(2, 0, 1) if stored.dim() == 3 else stored
