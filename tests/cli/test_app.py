"""The page, in a browser without a window."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ctt import run
from ctt.cli import app
from ctt.data.digits import INFO, Digits
from ctt.errors import UserError
from ctt.inference.load import load_trained
from ctt.settings import EvalSettings
from tests.ports import free_port

gradio = pytest.importorskip("gradio")
from ctt.cli import page, page_ranking  # noqa: E402  (need gradio)

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PICTURES = [f"{kind}-{side}" for kind in ("overlay", "mask", "confidence") for side in (0, 1)]
STARTUP = 120  # seconds that the page may take to appear on a busy machine


@pytest.fixture
def viewer(folder: Path) -> page.Viewer:
    return page.Viewer(load_trained(folder), torch.device("cpu"), EvalSettings())


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "digit.png"
    dataset = Digits(2, 1)
    Image.fromarray(dataset.image("val-0").permute(1, 2, 0).numpy()).save(file)
    return file


def test_pictures_of_two_networks(viewer: page.Viewer, picture: Path) -> None:
    *pictures, table = viewer.show(str(picture), 0.0, "student_1", "ensemble")
    assert [p.size for p in pictures] == [(320, 320)] * 6
    plain = Image.open(picture).resize((320, 320), Image.Resampling.NEAREST)
    assert np.array_equal(np.array(pictures[0]), np.array(plain))  # the overlay is not to be seen
    _, label, _ = viewer.predict(str(picture), "student_1")
    colours = np.array(INFO.palette, np.uint8)[label.numpy()]
    assert np.array_equal(np.array(pictures[1])[4::8, 4::8], colours)
    assert "student 1" in table
    assert "Both see the same class in" in table
    share = float((label == 0).float().mean())
    assert f"{share:.1%}" in table if share else "-" in table
    assert viewer.show(None, 0.5, "student_1")[:-1] == [None] * 3


def test_few_predictions_are_kept(
    viewer: page.Viewer, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen of large photographs would fill the memory."""
    files = [str(picture), *(str(tmp_path / f"{n}.png") for n in range(3))]
    for file in files[1:]:
        shutil.copy(picture, file)
    first = viewer.predict(files[0], "student_1")
    assert viewer.predict(files[0], "student_1") is first
    monkeypatch.setattr(page, "KEPT", 2 * sum(x.nbytes for x in first))
    for file in files[1:]:
        viewer.predict(file, "student_1")
        assert viewer.predict(files[0], "student_1") is first
    assert [file for file, _ in viewer.kept] == [files[3], files[0]]
    monkeypatch.setattr(page, "KEPT", 0)
    viewer.predict(files[1], "student_1")
    assert not viewer.kept


def test_a_file_that_changed_is_predicted_again(viewer: page.Viewer, picture: Path) -> None:
    before, _, _ = viewer.predict(str(picture), "student_1")
    time = picture.stat().st_mtime_ns
    Image.fromarray(np.full((50, 40, 3), 90, np.uint8)).save(picture)
    os.utime(picture, ns=(time, time + 10**9))
    after, _, _ = viewer.predict(str(picture), "student_1")
    assert after.shape[1:] == (50, 40) != before.shape[1:]


def test_a_lack_of_memory_is_told_on_the_page(
    viewer: page.Viewer, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ctt.inference.predict.logits_of", lack)
    with pytest.raises(gradio.Error, match="not enough memory for images of this size"):
        viewer.show(str(picture), 0.5, "student_1")


def test_a_folder_is_ranked(viewer: page.Viewer, picture: Path, tmp_path: Path) -> None:
    other, broken = tmp_path / "<b>.png", tmp_path / "broken.jpg"
    Image.fromarray(np.full((50, 40, 3), 90, np.uint8)).save(other)
    broken.write_text("no image")
    (tmp_path / "notes.txt").write_text("left out")
    files = [str(path) for path in tmp_path.iterdir() if path.is_file()]
    pictures, table = page_ranking.ranked(viewer, files)
    assert {caption[3:] for _, caption in pictures} == {"digit.png", "<b>.png"}
    assert sorted(shown.size for shown, _ in pictures) == [(560, 350), (640, 320)]
    assert "broken.jpg cannot be read" in table
    assert "&lt;b&gt;.png" in table
    assert "notes" not in table
    assert page_ranking.ranked(viewer, []) == ([], "")


def test_what_cannot_be_read_is_told_on_the_page(viewer: page.Viewer, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(gradio.Error, match=r"^.x.png cannot be read"):
        viewer.show(str(tmp_path / "x.png"), 0.5, "student_1")


def test_a_file_of_weights_has_one_column(folder: Path) -> None:
    trained = load_trained(folder / "best.safetensors")
    viewer = page.Viewer(trained, torch.device("cpu"), EvalSettings())
    blocks = page.build(viewer, []).config["components"]
    assert len([b for b in blocks if b["type"] == "dropdown"]) == 1
    assert len([b for b in blocks if b["type"] == "image"]) == 4


def test_names_are_escaped() -> None:
    assert "&lt;b&gt;" in page.legend(["<b>"], [torch.zeros(2, 2, dtype=torch.uint8)], INFO)


def test_pixels_without_data_have_no_class_on_the_page(
    viewer: page.Viewer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.rand(3, 24, 24)
    image[:, :12] = torch.nan
    monkeypatch.setattr(page, "read_as", lambda *_: image)
    viewer.info = dataclasses.replace(INFO, bands=(1, 2, 3))
    *_, table = viewer.show("a.tif", 0.5, "student_1", "student_2")
    _, label, confidence = viewer.predict("a.tif", "student_1")
    assert (label[:12] == 255).all()
    assert not confidence[:12].any()
    counts = torch.bincount(label[12:].flatten())
    assert f"<td>{float(counts.max() / counts.sum()):.1%}</td>" in table
    agree = label[12:] == viewer.predict("a.tif", "student_2")[1][12:]
    assert f"<b>{float(agree.float().mean()):.1%}</b>" in table
    empty = page.legend(["a", "b"], [torch.full((2, 2), 255, dtype=torch.uint8)] * 2, INFO)
    assert "%" not in empty


def test_large_pictures_shrink_and_small_ones_grow() -> None:
    for size, expected in (((40, 30), (320, 240)), ((4000, 100), (1280, 32)), ((500, 9), (500, 9))):
        assert page.enlarged(Image.new("RGB", size)).size == expected


def test_half_is_halved_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[page.Viewer] = []
    monkeypatch.setattr(page, "serve", lambda viewer, *_: seen.append(viewer))
    shutil.copytree(folder, tmp_path / "run")
    settings = run.read_settings(folder)
    halved = dataclasses.replace(settings, eval=EvalSettings(protocol="half"))
    run.write_settings(tmp_path / "run", halved)
    for options in ([], ["--eval.protocol", "half"]):
        assert app._main([str(tmp_path / "run"), *options]) == 0
    assert [(v.settings.protocol, v.settings.scales) for v in seen] == [("whole", (0.5,))] * 2
    with pytest.raises(UserError, match=r"changes nothing with `eval\.protocol` half"):
        app._main([str(tmp_path / "run"), "--eval.window", "16", "16"])


def test_bad_ports(folder: Path, viewer: page.Viewer) -> None:
    with pytest.raises(UserError, match="--port 0 must be"):
        app._main([str(folder), "--port", "0"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: nothing can be served"):
            page.serve(viewer, "127.0.0.1", port, False, page.Limits("", 1))


@contextlib.contextmanager
def served(folder: Path, *options: str, **environment: str) -> Iterator[str]:
    """The address of a page that runs; on Ctrl-C it ends in peace."""
    port = free_port()
    program = "from ctt.cli.app import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder), "--port", str(port), *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        # what a shell runs in the background inherits that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if "http" in line)
            yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]  # type: ignore[index]
        finally:
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(STARTUP) == 0
            finally:
                process.kill()


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    with served(folder) as found:
        yield found


def code(request: urllib.request.Request | str, opener: urllib.request.OpenerDirector) -> int:
    """Return the HTTP status of the answer."""
    try:
        with opener.open(request) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def upload(address: str, content: int | Path) -> urllib.request.Request:
    """Return the request by which a browser hands in a file, or one of so many bytes."""
    data = b"0" * content if isinstance(content, int) else content.read_bytes()
    head = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head.encode() + data + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    return urllib.request.Request(f"{address}/gradio_api/upload", body, kind)


def shown_of(address: str, file: Path) -> str:
    """Return what the page answers to a caller who says that he has uploaded this file."""
    given = {"path": str(file), "meta": {"_type": "gradio.FileData"}}
    call = f"{address}/gradio_api/call/show"
    body = json.dumps({"data": [given, 0.5, "student_1", "student_2"]}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(call, body, {"Content-Type": "application/json"})
    ) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}") as answer:
        return str(answer.read().decode())


def test_files_of_the_machine_are_not_shown(folder: Path, picture: Path) -> None:
    with served(folder) as address:
        with urllib.request.urlopen(upload(address, picture)) as answer:
            (uploaded,) = json.load(answer)
        assert "event: complete" in shown_of(address, Path(uploaded))
        hidden = folder / "samples.png"
        assert "event: error" in shown_of(address, hidden)
        for path in (hidden, f"{uploaded}/../../{hidden}"):
            opener = urllib.request.build_opener()
            assert code(f"{address}/gradio_api/file={path}", opener) in (403, 404)


def test_without_the_password_nothing_is_shown_or_taken(folder: Path) -> None:
    stranger, guest = (
        urllib.request.build_opener(urllib.request.HTTPCookieProcessor()) for _ in range(2)
    )
    with served(folder, "--largest-upload", "1", CTT_APP_PASSWORD="open sesame") as address:
        assert code(f"{address}/config", stranger) == 401
        assert code(upload(address, 10), stranger) == 401
        for password, status in (("open", 400), ("open sesame", 200)):
            form = urllib.parse.urlencode({"username": "ctt", "password": password}).encode()
            assert code(urllib.request.Request(f"{address}/login", form), guest) == status
        assert code(f"{address}/config", guest) == 200
        assert code(upload(address, 10**5), guest) == 200
        assert code(upload(address, 2 * 10**6), guest) == 413


@pytest.mark.parametrize(
    ("host", "warned"), [("0.0.0.0", True), ("localhost", False), ("::1", False)]
)
def test_a_page_that_others_reach_wants_a_password(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host: str,
    warned: bool,
) -> None:
    limits: list[page.Limits] = []
    monkeypatch.setattr(page, "serve", lambda *given: limits.append(given[-1]))
    assert app._main([str(folder), "--host", host]) == 0
    assert ("CTT_APP_PASSWORD" in capsys.readouterr().err) == warned
    monkeypatch.setenv("CTT_APP_PASSWORD", "open sesame")
    assert app._main([str(folder), "--host", host]) == 0
    assert capsys.readouterr().err == ""
    assert [x.password for x in limits] == ["", "open sesame"]
    with pytest.raises(UserError, match="--largest-upload 0 must be"):
        app._main([str(folder), "--largest-upload", "0"])


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_the_page_in_a_browser(address: str, picture: Path, tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api")
    with urllib.request.urlopen(address) as answer:
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    asked: list[str] = []
    errors: list[str] = []
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(500 * STARTUP)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        tab.set_input_files("#image input[type=file]", str(picture))
        check_pictures(tab)
        assert tab.locator("#legend tr").count() == 1 + len(INFO.classes)
        first = tab.locator("#mask-1 img").get_attribute("src")
        tab.locator("#network-1 input").click()
        tab.get_by_role("option", name="student 2").click()
        tab.wait_for_function("old => document.querySelector('#mask-1 img')?.src != old", arg=first)
        assert "student 2" in tab.locator("#legend").inner_text()
        tab.set_viewport_size({"width": 390, "height": 844})
        check_pictures(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        tab.screenshot(path=str(tmp_path / "narrow.png"), full_page=True)
        (tmp_path / "broken.png").write_text("no image")
        tab.get_by_label("Remove Image").click()
        tab.set_input_files("#image input[type=file]", str(tmp_path / "broken.png"))
        tab.get_by_text("broken.png cannot be read as an image").wait_for()
        browser.close()
    assert (tmp_path / "narrow.png").stat().st_size > 10_000
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def check_pictures(tab: Any) -> None:
    """All six are there, loaded, not distorted and within the window."""
    for name in PICTURES:
        shown = tab.locator(f"#{name} img")
        shown.wait_for()
        tab.wait_for_function(f"document.querySelector('#{name} img').naturalWidth == 320")
        box = shown.bounding_box()
        assert box["width"] >= 100
        assert box["x"] + box["width"] <= tab.viewport_size["width"]
