"""The Hugging Face hub, played by a server on this machine."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import pytest
import torch
import yaml

import ctt
from ctt import models
from ctt.checkpoint import save_network
from ctt.cli import export
from ctt.data.digits import INFO
from ctt.errors import UserError
from ctt.inference.hub import card
from ctt.inference.load import load_trained

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """What the client asks for when it makes a repository, writes to it and reads from it."""

    files: dict[str, bytes]
    calls: list[str]
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.calls.append(self.path)
        if self.refuse:
            self._send(401, b'{"error": "Invalid token"}')
        elif self.path.endswith("/repos/create"):
            self._json({"url": f"http://{self.headers['Host']}/me/net"})
        elif "/preupload/" in self.path:
            asked = [f["path"] for f in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]
            self._json({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/me/net/commit/{COMMIT}"
            address = {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""}
            self._json({"success": True, **address})
        else:
            self._json({})

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        self.calls.append(self.path)
        name = self.path.partition("?")[0].rpartition("/")[2]
        if "/resolve/" not in self.path:
            self._json({"id": "me/net", "sha": COMMIT, "siblings": []})
        elif name not in self.files:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            content = self.files[name]
            tag = {"ETag": hashlib.sha256(content).hexdigest(), "X-Repo-Commit": COMMIT}
            self._send(200, content, tag, with_body)

    def _json(self, values: Any) -> None:
        self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(
        self, code: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True
    ) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    own = type("OwnHub", (Hub,), {"files": {}, "calls": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield own
    server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    torch.manual_seed(0)
    save_network(folder / "best.safetensors", models.build("small", 11, 8, 4), INFO, "a run")
    summary = {"best": {"network": "teacher_1", "miou": 41.5}, "labeled": 50, "unlabeled": 950}
    summary |= {"method": "cross-teacher", "iterations": 300, "images": 30}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_what_is_pushed_is_loaded(
    hub: type[Hub],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(run / "best.safetensors")
    assert export._main([path, "--push", "me/net"]) == 0
    assert "http" in capsys.readouterr().out
    assert set(hub.files) == {"model.safetensors", "config.json", "README.md"}
    assert json.loads(hub.files["config.json"])["classes"] == list(INFO.classes)
    shown = hub.files["README.md"].decode()
    head = yaml.safe_load(shown.split("---")[1])
    assert head["library_name"] == "ctt"
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == 41.5
    assert 'ctt.load("hf:me/net")' in shown
    assert "cross-teacher with 50 labelled and 950 unlabelled images" in shown
    network = ctt.load("hf:me/net")
    windows = cast("Path", PureWindowsPath("hf:me/net"))
    assert load_trained(windows).only().state_dict().keys() == network.network.state_dict().keys()
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    assert torch.equal(network.predict(image), ctt.load(path).predict(image))
    assert not [p for p in run.iterdir() if p.suffix not in (".safetensors", ".json")]
    monkeypatch.chdir(run.parent)
    assert export._main(["hf:me/net", "--format", "safetensors"]) == 0
    assert ctt.load("best.safetensors").classes == network.classes
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert ctt.load("hf:me/net").note == "a run"  # from the cache


def test_what_the_hub_does_not_have_or_take(hub: type[Hub], run: Path) -> None:
    with pytest.raises(UserError, match=r"hf:me/other: model\.safetensors cannot be downloaded"):
        ctt.load("hf:me/other")
    for name in ("net", "me/", "a/b/c"):
        with pytest.raises(UserError, match="give OWNER/NAME"):
            export._main([str(run / "best.safetensors"), "--push", name])
    hub.refuse = True
    with pytest.raises(UserError, match=r"does not take it .* HF_TOKEN"):
        export._main([str(run / "best.safetensors"), "--push", "me/net"])


def test_a_file_of_something_else_is_refused(hub: type[Hub]) -> None:
    hub.files["model.safetensors"] = b"\x80\x04pickle"
    with pytest.raises(UserError, match="no safetensors file"):
        ctt.load("hf:me/net")


def test_a_card_has_the_score_of_the_best_network_alone(run: Path) -> None:
    """The folder has no settings; those of its weights do."""
    save_network(run / "teacher_2.safetensors", models.build("small", 11, 8, 4), INFO, "another")
    assert "mIoU 41.5" in card(load_trained(run), run, "me/net")
    assert "mIoU 41.5" in card(load_trained(run / "best.safetensors"), run, "me/net")
    other = card(load_trained(run / "teacher_2.safetensors", "best"), run, "me/net")
    assert "41.5" not in other
    assert "cross-teacher with 50 labelled" in other


@pytest.mark.parametrize("content", ['["best"]', "3", "{", '{"best": 4}', '{"best": null}'])
def test_a_summary_of_something_else_gives_no_score(run: Path, content: str) -> None:
    (run / "summary.json").write_text(content)
    assert "mIoU" not in card(load_trained(run), run, "me/net")
