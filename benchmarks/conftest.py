"""Options of `pytest benchmarks`, and the tables at its end."""

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from benchmarks import harness, report

TABLES = pytest.StashKey[list[str]]()
ROWS = pytest.StashKey[list[report.Row]]()
GROUPS = ("default", "paper", "series", "all")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ctt benchmarks")
    group.addoption(
        "--sizes",
        default="default",
        help=f"comma-separated names of sizes, or of groups of them: {', '.join(GROUPS)}",
    )
    group.addoption(
        "--seconds", type=float, default=5.0, help="time for the rounds of one comparison"
    )
    group.addoption(
        "--methods", default="", help="comma-separated methods of test_methods.py; by default all"
    )
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    group.addoption("--no-record", action="store_true", help="do not append to benchmarks/results")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES], config.stash[ROWS] = [], []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        names = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        metafunc.parametrize("device", [torch.device(n) for n in names], ids=str)
    if "size" in metafunc.fixturenames:
        groups: dict[str, list[str]] = metafunc.module.GROUPS
        asked = metafunc.config.getoption("--sizes").split(",")
        known = list(metafunc.module.SIZES)
        chosen = {n for a in asked for n in (known if a == "all" else groups.get(a, [a]))}
        metafunc.parametrize("size", [n for n in known if n in chosen])


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--seconds"))


@pytest.fixture
def may_compile(request: pytest.FixtureRequest) -> bool:
    return not request.config.getoption("--no-compile")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[list[harness.Row]], None]:
    """Keep rows: in the file of their device, and for the summary."""

    def keep(rows: list[harness.Row]) -> None:
        first = rows[0]
        title = f"{first.operation} {first.size} {first.shape} {first.dtype} {first.mode}"
        place = f"{first.device}, {first.threads} threads, torch {first.torch}"
        request.config.stash[TABLES].append(f"{title} ({place})\n{harness.table(rows)}\n")
        request.config.stash[ROWS] += [{k: str(v) for k, v in asdict(r).items()} for r in rows]
        if not request.config.getoption("--no-record"):
            harness.append(rows)

    return keep


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keep a text for the summary."""
    return lambda text: request.config.stash[TABLES].append(f"{text}\n")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for text in config.stash[TABLES]:
        terminalreporter.write_line("")
        terminalreporter.write_line(text)
    terminalreporter.write_line(report.lost(config.stash[ROWS]))
