"""Downloads, from a server on this machine."""

import hashlib
import io
import re
import shlex
import shutil
import ssl
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ctt import data
from ctt.cli import data as ctt_data
from ctt.data import fetch
from ctt.data.dataset import Dataset
from ctt.data.fetch import SBD, VOC, Archive, download, fetch_augmented, fetch_voc
from ctt.data.options import DatasetOptions
from ctt.data.voc import AUG_MASKS
from ctt.errors import UserError
from tests.data.trees import Array, write_voc


class Server(ThreadingHTTPServer):
    """Serves `content`; ends a connection after `limit` bytes."""

    content = b""
    limit = 10**9
    ranges = True
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if not self.path.endswith(".tar"):
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        start = start if self.server.ranges else 0
        if start >= len(self.server.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.server.content) - start))
        self.end_headers()
        self.wfile.write(self.server.content[start:][: self.server.limit])

    def log_message(self, *_: object) -> None:
        pass


def made_archive(member: str = "VOCdevkit/VOC2012/JPEGImages/a.jpg") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo(member)
        info.size = 3_000_000
        tar.addfile(info, io.BytesIO(bytes(range(256)) * (3_000_000 // 256 + 1)))
    return file.getvalue()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        running.content = made_archive()
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def archive(server: Server, name: str = "voc.tar") -> Archive:
    url = f"http://127.0.0.1:{server.server_port}/{name}"
    return Archive(url, hashlib.sha256(server.content).hexdigest())


def opened(root: Path) -> Dataset:
    return data.open_dataset("voc", root, DatasetOptions())


def quiet(_done: int, _total: int | None) -> None:
    pass


def test_official_archive_is_named() -> None:
    assert VOC.url.startswith("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/")
    assert VOC.name == "VOCtrainval_11-May-2012.tar"


def test_voc_is_fetched_and_unpacked(tmp_path: Path, server: Server) -> None:
    seen: list[tuple[int, int | None]] = []
    folder = fetch_voc(tmp_path / "new", lambda *at: seen.append(at), archive(server))
    assert folder == tmp_path / "new" / "VOCdevkit" / "VOC2012"
    assert (folder / "JPEGImages" / "a.jpg").stat().st_size == 3_000_000
    assert seen[-1] == (len(server.content), len(server.content))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["VOCdevkit"]
    with pytest.raises(UserError, match="is there already"):
        fetch_voc(tmp_path / "new", quiet, archive(server))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(tmp_path: Path, server: Server, ranges: bool) -> None:
    server.limit = 1_000_000
    with pytest.raises(UserError, match=r"ended after 1,000,000 of .* it goes on from there"):
        download(archive(server), tmp_path, quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["voc.tar.part"]
    server.limit, server.ranges = 10**9, ranges
    path = download(archive(server), tmp_path, quiet)
    assert server.asked == [None, "bytes=1000000-"]
    assert path.read_bytes() == server.content
    assert [p.name for p in tmp_path.iterdir()] == ["voc.tar"]


def test_a_complete_part_is_checked_and_used(tmp_path: Path, server: Server) -> None:
    (tmp_path / "voc.tar.part").write_bytes(server.content)
    assert download(archive(server), tmp_path, quiet).read_bytes() == server.content


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path, server: Server) -> None:
    wanted = Archive(archive(server).url, "0" * 32)
    with pytest.raises(UserError, match="its SHA-256 is not 0000"):
        fetch_voc(tmp_path, quiet, wanted)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_put_there_by_hand_is_used(tmp_path: Path, server: Server) -> None:
    (tmp_path / "voc.tar").write_bytes(server.content)
    assert fetch_voc(tmp_path, quiet, archive(server)).is_dir()
    assert server.asked == []
    assert (tmp_path / "voc.tar").read_bytes() == server.content  # it is the user's


def test_a_wrong_archive_put_there_by_hand_is_left(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "voc.tar"
    path.write_bytes(server.content[:-1])  # such as one that is still being copied
    with pytest.raises(UserError, match=r"voc\.tar is not what .* should hold .* Move it away"):
        fetch_voc(tmp_path, quiet, archive(server))
    assert path.stat().st_size == len(server.content) - 1


def test_another_archive_unpacks_to_nothing(tmp_path: Path, server: Server) -> None:
    server.content = made_archive("elsewhere/a.jpg")
    with pytest.raises(UserError, match="does not unpack to VOCdevkit/VOC2012"):
        fetch_voc(tmp_path, quiet, archive(server))
    assert not list(tmp_path.rglob("*.jpg"))


@pytest.mark.parametrize("kind", ["absolute", "above", "link", "hard link", "device"])
def test_an_archive_cannot_write_outside(tmp_path: Path, server: Server, kind: str) -> None:
    outside, file = tmp_path / "outside", io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        inside = tarfile.TarInfo("VOCdevkit/VOC2012/JPEGImages/a.jpg")
        tar.addfile(inside, io.BytesIO())
        evil = tarfile.TarInfo("VOCdevkit/VOC2012/evil")
        if kind in ("absolute", "above"):
            evil.name = str(outside) if kind == "absolute" else "../../outside"
            evil.size = 4
        elif kind == "device":
            evil.type = tarfile.FIFOTYPE
        else:
            evil.type = tarfile.SYMTYPE if kind == "link" else tarfile.LNKTYPE
            evil.linkname = str(tmp_path)
        tar.addfile(evil, io.BytesIO(b"evil"))
        through = tarfile.TarInfo("VOCdevkit/VOC2012/evil/outside")
        tar.addfile(through, io.BytesIO())
    server.content = file.getvalue()
    root = tmp_path / "root"
    if kind == "absolute":  # such paths are taken as paths below the folder
        fetch_voc(root, quiet, archive(server))
    else:
        with pytest.raises(UserError, match="does not unpack to VOCdevkit/VOC2012"):
            fetch_voc(root, quiet, archive(server))
        assert [path.name for path in root.iterdir()] == ["voc.tar"]
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


@pytest.mark.parametrize("member", [b"no mat file", b"", None])
def test_masks_in_an_archive_that_are_none(
    tmp_path: Path, server: Server, member: bytes | None
) -> None:
    folder = write_voc(tmp_path, aug_folder="")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("dataset/cls/a.mat")
        info.size, info.type = len(member or b""), tarfile.DIRTYPE if member is None else b"0"
        tar.addfile(info, io.BytesIO(member or b""))
    server.content = file.getvalue()
    with pytest.raises(UserError, match=r"archive of SBD.*a\.mat"):
        fetch_augmented(tmp_path, quiet, archive(server, "sbd.tar"))
    assert not (folder / AUG_MASKS).exists()


def test_without_a_network_it_says_what_to_put_where(tmp_path: Path, server: Server) -> None:
    with pytest.raises(
        UserError, match=r"cannot be downloaded \(404 Not Found\).* download missing "
    ):
        fetch_voc(tmp_path, quiet, archive(server, "missing"))
    nowhere = Archive("http://127.0.0.1:9/voc.tar", "0" * 32)
    with pytest.raises(
        UserError, match=rf"cannot be reached .* put it into {re.escape(str(tmp_path))}; the"
    ):
        fetch_voc(tmp_path, quiet, nowhere)


def sbd_archive(masks: dict[str, Array]) -> bytes:
    from scipy.io import savemat

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, mask in masks.items():
            content = io.BytesIO()
            savemat(content, {"GTcls": {"Segmentation": mask}})
            info = tarfile.TarInfo(f"benchmark_RELEASE/dataset/cls/{name}.mat")
            info.size = len(content.getvalue())
            tar.addfile(info, io.BytesIO(content.getvalue()))
    return file.getvalue()


def test_augmented_masks_are_made_from_sbd_and_those_of_voc(tmp_path: Path, server: Server) -> None:
    folder = write_voc(tmp_path, classic=2, augmented=3, evaluation=1)
    before = opened(tmp_path)
    truth = {name: before.label(name) for name in before.train_ids()}
    coarse = {name: label.where(label != 255, 0).numpy() for name, label in truth.items()}
    for name in (folder / AUG_MASKS).iterdir():
        name.unlink()
    (folder / AUG_MASKS).rmdir()
    server.content = sbd_archive(coarse)
    target, masks = fetch_augmented(tmp_path, quiet, archive(server, "sbd.tar"))
    assert (target, masks) == (folder / AUG_MASKS, 6)
    after = opened(tmp_path)
    assert after.train_ids() == before.train_ids()
    classic = (folder / "ImageSets" / "Segmentation" / "train.txt").read_text("utf-8").splitlines()
    for name in after.train_ids():
        expected = truth[name].numpy() if name in classic else coarse[name]
        assert np.array_equal(after.label(name).numpy(), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["VOCdevkit"]
    with pytest.raises(UserError, match="is there already"):
        fetch_augmented(tmp_path, quiet, archive(server, "sbd.tar"))


@pytest.mark.parametrize("content", [b"no archive", made_archive()])
def test_other_archives_make_no_masks(tmp_path: Path, server: Server, content: bytes) -> None:
    folder = write_voc(tmp_path, aug_folder="")
    server.content = content
    with pytest.raises(UserError, match=r"archive of SBD"):
        fetch_augmented(tmp_path, quiet, archive(server, "sbd.tar"))
    assert not (folder / AUG_MASKS).exists()
    assert not (folder / f"{AUG_MASKS}.part").exists()


def test_the_advice_can_be_given_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("my data; no other's")

    def advised(fetching: Callable[..., object]) -> list[str]:
        with pytest.raises(UserError) as caught:
            fetching(root, quiet)
        return shlex.split(str(caught.value).rpartition(": ")[2])

    assert advised(fetch_augmented) == ["ctt-data", "fetch", "voc", "--data-root", str(root)]
    for masks, fetching, images in (("", fetch_voc, 3), (AUG_MASKS, fetch_augmented, 8)):
        shutil.rmtree(root, ignore_errors=True)
        write_voc(root, aug_folder=masks)
        program, *arguments = advised(fetching)
        assert program == "ctt-data"
        assert ctt_data._main(arguments) == 0
        assert f"{images} images with masks" in capsys.readouterr().out


def test_a_broken_tls_connection_is_no_full_disk(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ssl.SSLError(1, "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC]")

    monkeypatch.setattr(fetch, "_copy", broken)
    with pytest.raises(UserError, match=r"cannot be reached .*DECRYPTION_FAILED"):
        fetch_voc(tmp_path, quiet, archive(server))


def test_augmenting_needs_voc(tmp_path: Path) -> None:
    assert SBD.name == "benchmark.tgz"
    with pytest.raises(UserError, match="First: ctt-data fetch voc"):
        fetch_augmented(tmp_path, quiet)
