import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a core has one process then; before torch counts them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

from ctt import recipes
from ctt.settings import Settings, update

# servers of the tests are on this machine, whatever proxy it has
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))

# a machine that has other work to do fails no test
hypothesis.settings.register_profile(
    "ctt",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ctt")

TINY = {
    "ratio": "6",
    "data": {"labeled_pool": 24, "eval_images": 6, "batch_size": 3, "crop": [24, 24]},
    "model": {"width": 4, "features": 8},
    "loss": {"gamma": 0.2, "ct_after": 0.0},
    "bank": {"capacity": 4, "per_class": 4, "every": 1, "start_after": 0},
    "train": {
        "iterations": 6,
        "threads": 1,
        "deterministic": True,
        "log_every": 2,
        "eval_every": 3,
        "measured_images": 2,
    },
}


def leave_out_figures(patch: pytest.MonkeyPatch) -> None:
    """Write empty files in place of the figures of a run and of `ctt-eval`."""
    patch.setattr("ctt.train.loop.draw_curves", lambda folder: (folder / "curves.png").touch())
    patch.setattr("ctt.train.loop.draw_predictions", lambda plan, engine, path: path.touch())
    patch.setattr("ctt.inference.figures.draw_confusion", lambda path, *_: path.touch())


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Begin every test with the same random numbers, so that it passes always or never."""
    torch.manual_seed(0)


@pytest.fixture
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Cross-teacher training that takes a second, with contrast from the first steps.

    Its figures would take as long again; they are empty files but in tests marked `figures`.
    """
    if request.node.get_closest_marker("figures") is None:
        leave_out_figures(monkeypatch)
    settings = update(Settings(), recipes.load("digits"), "recipe")
    return update(settings, TINY, "tests")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def no_room() -> Callable[[], AbstractContextManager[None]]:
    """While it is entered no file can grow beyond 4 KiB, as on a disk that is full."""

    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
