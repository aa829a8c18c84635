"""The files around the code say what holds."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import ctt

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def test_the_citation_names_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert citation["version"] == ctt.__version__
    assert citation["license"] == project["license"]
    (paper,) = citation["references"]
    assert paper["doi"] == "10.1016/j.neucom.2022.08.052"


def test_the_changelog_has_the_version_or_what_comes_next() -> None:
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert titles[0] == "Unreleased" or titles[0].startswith(ctt.__version__)


@pytest.mark.parametrize("form", [f for f in FORMS if f.stem != "config"], ids=lambda f: f.stem)
def test_issue_forms_are_complete(form: Path) -> None:
    content = read(form)
    assert {"name", "description", "body"} <= content.keys()
    names = [field["id"] for field in content["body"]]
    assert len(set(names)) == len(names) > 0
    assert all(field["attributes"]["label"] for field in content["body"])


def test_every_change_runs_what_a_release_must_pass() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    commands = [step.get("run") for job in jobs.values() for step in job["steps"]]
    for command in filter(None, commands):
        assert (ROOT / command).is_file(), command
    assert ".ci/run" in commands


def test_the_rooms_of_the_contributing_page_are_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rooms = re.findall(r"^\| `([\w/]+)` \|", page, re.MULTILINE)
    packages = {f"ctt/{p.parent.name}" for p in (ROOT / "ctt").glob("*/__init__.py")}
    assert packages - set(rooms) == {"ctt/recipes"}
    assert [room for room in rooms if not (ROOT / room).is_dir()] == []
