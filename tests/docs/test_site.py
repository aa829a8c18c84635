"""The documentation builds as a site, and its generated pages follow the code."""

import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from ctt import methods
from ctt.settings import Settings
from tests.docs.pages import ROOT

pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of MkDocs is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_site"))
    return importlib.import_module("generate")


def pages(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.html")):
        yield path.name, path.read_text("utf-8")


def test_formulas_are_rendered(site: Path) -> None:
    shown = 0
    for name, html in pages(site):
        for formula in re.findall(r"<math.*?</math>", html, re.DOTALL):
            shown += 1
            assert "\\" not in formula, (name, formula)
        assert 'class="arithmatex">\\' not in html, name
    assert shown > len(methods.names())


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for name, html in pages(site):
        loaded = re.findall(r'<(?:script|link|img)[^>]*?(?:src|href)="(https?:[^"]*)"', html)
        assert [url for url in loaded if 'rel="canonical"' not in url] == [], name


def test_every_method_has_a_section(site: Path, generate: ModuleType) -> None:
    formulas = yaml.safe_load((ROOT / "docs" / "formulas.yaml").read_text("utf-8"))
    assert sorted(formulas) == sorted(methods.names())
    html = (site / "methods.html").read_text("utf-8")
    for name in methods.names():
        assert f'id="{generate.anchor(name)}"' in html
        assert f"<code>{name}</code>" in html


def fields(owner: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}".replace("_", "-")


def test_every_setting_is_in_its_table(generate: ModuleType) -> None:
    page = generate.settings()
    missing = [name for name in fields(Settings(), "--") if f"| `{name}`" not in page]
    assert [name for name in missing if not name.startswith("--options.")] == []


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_no_page_is_wider_than_the_screen(site: Path, width: int) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        for path in sorted(site.glob("*.html")):
            page.goto(path.as_uri())
            beyond = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.evaluate(beyond) == 0, path.name
        browser.close()
