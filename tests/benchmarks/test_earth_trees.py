from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import earth_trees
from ctt.data.dataset import Dataset
from ctt.data.earth import INFO


class Stripes(Dataset):
    """Tiles whose colour is that of their class."""

    info = INFO

    def train_ids(self) -> list[str]:
        return [f"train-{i}" for i in range(9)]

    def eval_ids(self) -> list[str]:
        return [f"val-{i}" for i in range(9)]

    def image(self, name: str) -> Tensor:
        palette = torch.tensor(INFO.palette, dtype=torch.uint8)
        return palette[self.label(name).long()].permute(2, 0, 1)

    def label(self, name: str) -> Tensor:
        return torch.full((16, 16), int(name.rpartition("-")[2]), dtype=torch.uint8)


def test_trees_learn_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earth_trees, "Earth", lambda split: Stripes())
    out = tmp_path / "trees.csv"
    arguments = ["earth_trees", "--shares", "1/1", "--seeds", "0", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    earth_trees.main()
    assert out.read_text().splitlines()[1].startswith("val,1/1,0,9,100.00,")


def test_features_are_colours_means_and_deviations() -> None:
    features, label = earth_trees.pixels(Stripes(), "val-3")  # type: ignore[arg-type]
    assert features.shape == (256, 21)
    assert label.tolist() == [3] * 256
    colour = np.array(INFO.palette[3]) / 255
    assert np.allclose(features[:, :3], colour)
    assert np.allclose(features[:, 3:6], colour, atol=1e-6)
    assert np.allclose(features[:, 6:9], 0, atol=1e-3)
