"""Downloads that a user asked for, from the official place, with resume and checksum."""

from __future__ import annotations

import contextlib
import http.client
import io
import shlex
import shutil
import ssl
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image

from ctt.data.files import first_with, list_names
from ctt.data.voc import AUG_MASKS, CLASSIC_MASKS, PLACES, bit_palette
from ctt.errors import UserError
from ctt.files import sha256

BLOCK = 1 << 20
TIMEOUT = 30  # seconds without a byte

Progress = Callable[[int, int | None], None]  # bytes so far, and in all where that is known


@dataclass(frozen=True)
class Archive:
    """A file to download, and its SHA-256 in hexadecimal digits."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


VOC = Archive(
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
)
SBD = Archive(
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
    "benchmark.tgz",
    "6a5a2918d5c73ce032fdeba876574d150d9d04113ab87540a1304cbcc715be53",
)


def fetch_voc(root: Path, progress: Progress, archive: Archive = VOC) -> Path:
    """Download VOC 2012 to `root`; an archive that is already there is used, and left there.

    Returns:
        the folder VOC2012.

    Raises:
        UserError: it is there already, cannot be downloaded, or is not what it should be.
    """
    folder = root / "VOCdevkit" / "VOC2012"
    if folder.exists():
        raise UserError(
            f"{folder} is there already. Check it with: {check_command(root, 'classic')}"
        )
    with _writable(root):
        root.mkdir(parents=True, exist_ok=True)
        with _downloaded(archive, root, progress) as tar:
            unpack(tar, root)
    return folder


def fetch_augmented(root: Path, progress: Progress, archive: Archive = SBD) -> tuple[Path, int]:
    """Make the augmented masks of a VOC 2012 in `root` from the Semantic Boundaries Dataset (SBD).

    SBD labels the classes of VOC in more of its images (Hariharan et al., ICCV 2011). Where VOC
    has a mask itself, that is taken: it is finer, and marks borders to be ignored.

    Returns:
        the folder of the masks, and how many there are.

    Raises:
        UserError: VOC 2012 is not there, the masks are, or SBD cannot be downloaded or read.
    """
    folder = first_with(root, PLACES, CLASSIC_MASKS)
    if folder is None:
        raise UserError(
            f"`data_root` {root}: there is no VOC 2012 to be augmented. First: "
            f"{fetch_command('voc', root)}"
        )
    target = folder / AUG_MASKS
    if target.exists():
        raise UserError(f"{target} is there already. Check it with: {check_command(root, 'aug')}")
    part = folder / f"{AUG_MASKS}.part"
    with _writable(root), _downloaded(archive, root, progress) as tar:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            convert_sbd(tar, part)
            for file in list_names(folder / CLASSIC_MASKS):
                shutil.copyfile(folder / CLASSIC_MASKS / file, part / file)
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target, len(list_names(target))


def fetch_command(what: str, root: Path) -> str:
    """Return the command that fetches a dataset, ready to be pasted into a shell."""
    return shlex.join(["ctt-data", "fetch", what, "--data-root", str(root)])


def check_command(root: Path, voc_set: str) -> str:
    options = ["--dataset", "voc", "--data-root", str(root), "--data.voc-set", voc_set]
    return shlex.join(["ctt-data", "check", *options])


def convert_sbd(tar: Path, target: Path) -> None:
    """Write the classes of SBD's archive as palette PNGs of the same names.

    Raises:
        UserError: the archive is broken or holds something else.
    """
    written = 0
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.parent.name != "cls" or path.suffix != ".mat":
                    continue
                content = archive.extractfile(member)
                if content is None:
                    raise ValueError(f"{member.name} is no file")
                truth = _truth(content.read(), member.name)
                mask = Image.fromarray(truth, mode="P")
                mask.putpalette([channel for colour in bit_palette(256) for channel in colour])
                mask.save(target / f"{path.stem}.png")
                written += 1
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{tar} cannot be read as the archive of SBD ({error}).") from None
    if not written:
        raise UserError(f"{tar} holds no masks (cls/*.mat), so it is not the archive of SBD.")


def _truth(content: bytes, name: str) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """The classes (H, W) in a file of SBD."""
    from scipy.io import loadmat

    try:
        truth = loadmat(io.BytesIO(content))["GTcls"][0, 0]["Segmentation"]
        return np.asarray(truth).astype(np.uint8).reshape(truth.shape[0], truth.shape[1])
    except Exception as error:  # bytes that are no such file can raise anything
        raise ValueError(f"{name}: {error}") from None


@contextlib.contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"`data_root` {root} cannot be written ({error.strerror}).") from None


@contextlib.contextmanager
def _downloaded(archive: Archive, folder: Path, progress: Progress) -> Iterator[Path]:
    """Yield the archive in `folder`, and remove it after its use unless it was there before."""
    was_there = (folder / archive.name).exists()
    tar = download(archive, folder, progress)
    yield tar
    if not was_there:
        tar.unlink()


def download(archive: Archive, folder: Path, progress: Progress) -> Path:
    """Return the archive in `folder`; an unfinished download is resumed.

    Raises:
        UserError: it cannot be reached, the connection broke, or the checksum is another.
    """
    target = folder / archive.name
    by_hand = (
        f"Without a connection, download {archive.name} elsewhere and put it into {folder}; the "
        f"same command then uses it."
    )
    own = target.exists()  # of the user, or of a download that ended before it was unpacked
    part = target if own else target.with_name(f"{target.name}.part")
    if not own:
        _receive(archive.url, part, progress, by_hand)
    if sha256(part) != archive.sha256:
        mend = "Move it away, or wait until it is written, and run the command again."
        if not own:
            part.unlink()
            mend = f"It has been removed. Run the command again. {by_hand}"
        raise UserError(
            f"{part} is not what {archive.url} should hold (its SHA-256 is not {archive.sha256}). "
            f"{mend}"
        )
    return part.replace(target)


def _receive(url: str, part: Path, progress: Progress, by_hand: str) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
            start = start if resumed else 0
            length = response.headers.get("Content-Length")
            total = start + int(length) if length is not None else None
            _check_room(part.parent, total)
            with part.open("ab" if resumed else "wb") as file:
                _copy(response, file, start, total, progress)
    except urllib.error.HTTPError as error:
        # nothing is left to send: the checksum tells whether it is right
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return
        raise UserError(
            f"{url} cannot be downloaded ({error.code} {error.reason}). {by_hand}"
        ) from None
    except (
        urllib.error.URLError,
        TimeoutError,
        ConnectionError,
        ssl.SSLError,
        http.client.HTTPException,
    ) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url} cannot be reached ({reason}). {by_hand}") from None
    if total is not None and part.stat().st_size < total:
        raise UserError(
            f"{url}: the connection ended after {part.stat().st_size:,} of {total:,} bytes. Run "
            f"the command again: it goes on from there."
        )


def _copy(
    source: IO[bytes], target: IO[bytes], start: int, total: int | None, progress: Progress
) -> None:
    done = start
    while block := source.read(BLOCK):
        target.write(block)
        done += len(block)
        progress(done, total)


def _check_room(folder: Path, total: int | None) -> None:
    free = shutil.disk_usage(folder).free
    if total is not None and free < 2 * total:
        raise UserError(
            f"{folder} has room for {free:,} bytes, but the archive and what it holds need "
            f"{2 * total:,}. Give another `data_root`."
        )


def unpack(tar: Path, root: Path) -> None:
    """Unpack VOCdevkit/VOC2012 into `root`, all of it or nothing, and nothing outside of it.

    Raises:
        UserError: the archive is broken, holds something else, or would write elsewhere.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            f"{tar}: this version of Python cannot keep an archive from writing elsewhere. Take "
            f"Python 3.11.4 or later, or unpack it by hand into {root}."
        )
    part = root / f"{tar.name}.unpacked"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with tarfile.open(tar) as archive:
            archive.extractall(part, filter="data")
        (root / "VOCdevkit").mkdir(exist_ok=True)
        (part / "VOCdevkit" / "VOC2012").rename(root / "VOCdevkit" / "VOC2012")
    except (tarfile.TarError, FileNotFoundError, EOFError, ValueError) as error:
        raise UserError(f"{tar} does not unpack to VOCdevkit/VOC2012 ({error}).") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
