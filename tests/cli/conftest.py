import shlex
from pathlib import Path

import pytest

from ctt.cli import train


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests leave it as it is."""
    out = tmp_path_factory.mktemp("runs") / "run"
    quick = (
        "--ratio 6 --data.labeled-pool 24 --data.eval-images 6 --data.batch-size 2 "
        "--model.width 4 --model.features 8 --train.threads 1 --train.iterations 3"
    )
    assert train._main([*shlex.split(quick), "--out", str(out)]) == 0
    return out
