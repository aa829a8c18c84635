"""The examples of the operations run as they are written."""

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.ports import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in places.items()}
    dist.init_process_group("gloo")
    try:
        shared, seen, loss = load("operations_ddp").train(steps=4)
        torch.save((shared.state_dict(), seen and seen.state_dict(), loss), f"{folder}/{rank}.pt")
        dist.barrier()  # rank 0 holds the store through which the other still speaks
    finally:
        dist.destroy_process_group()


def test_a_plain_loop() -> None:
    bank, seen = load("operations_plain").train()
    assert bank.full.all()
    assert seen[-1] < 0.8 * seen[0]


def test_a_loop_of_segmentation_models_pytorch() -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the extra smp is not installed")
    bank, seen = load("operations_smp").train(steps=6)
    assert bank.count.sum() > 0
    assert seen[-1] < seen[0]


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.timeout(180)
def test_rank_0_alone_fills_a_bank_of_its_own(tmp_path: Path) -> None:
    mp.spawn(work, args=(free_port(), str(tmp_path)), nprocs=2)
    (shared, seen, loss), (other, none, other_loss) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    assert none is None
    assert seen["count"].tolist() == [16] * 5  # four steps of at most four keys
    for name, value in shared.items():
        assert torch.equal(other[name], value), name
    assert loss != other_loss  # each of its own images


def test_lightning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("lightning", reason="the package lightning is not installed")
    monkeypatch.chdir(tmp_path)
    load("operations_lightning").main()
    assert re.search(r"loss \d\.\d+, keys held \[16, 16, 16, 16, 16\]\n", capsys.readouterr().out)
