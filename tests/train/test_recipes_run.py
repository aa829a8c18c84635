"""Every recipe takes two steps: its methods, views, losses and optimisers fit each other."""

import math

import pytest

from ctt import recipes
from ctt.settings import Settings, update, validate
from tests.train.steps import make, run, with_small_critics

# what a recipe says of data and networks of its size is not tried here, and the digits stand in
SMALL = {
    "dataset": "digits",
    "ratio": "6",
    "data": {"labeled_pool": 24, "eval_images": 6, "batch_size": 4, "crop": [24, 24]},
    "model": {
        "name": "small",
        "pair_name": [],
        "backbone": [],
        "weights": ["none"],
        "width": 4,
        "features": 8,
        "output_stride": 0,
        "freeze_backbone": False,
        "freeze_batch_norm": False,
        "drop_path": [0.0],
        "normalization": "data",
    },
    "bank": {"capacity": 4, "per_class": 4, "start_after": 0},
    "labeled": {"ohem_kept": 50},
    "train": {"iterations": 2, "threads": 1, "device": "cpu"},
}


@pytest.mark.parametrize("name", recipes.names())
def test_two_steps(name: str) -> None:
    weights = {"model": {"weights": ["imagenet"]}}  # of what `frozen` is put over
    settings = update(update(Settings(), weights, "test"), recipes.load(name), name)
    validate(settings)
    settings = with_small_critics(update(settings, SMALL, "small"))
    validate(settings)
    engine = make(settings, pairs=settings.pairs)
    for terms in run(engine, 4, 2):
        assert {"sup"} <= terms.keys()
        assert all(math.isfinite(value) for value in terms.values()), terms
