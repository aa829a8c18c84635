from pathlib import Path

import pytest
import torch

from ctt.errors import UserError
from ctt.train.settings import Settings, update, validate
from ctt.train.state import TrainState


def state(settings: Settings, **model: object) -> TrainState:
    values = {"model": {"name": "deeplabv2", "features": 8, **model}}
    return TrainState(update(settings, values, "test"), 2, 5, torch.device("cpu"))


def test_backbones_and_weights_go_round_the_pairs(tiny: Settings, tmp_path: Path) -> None:
    made = state(tiny, backbone=["resnet18", "resnet34"])
    assert [s.options["backbone"] for s in made.students] == ["resnet18", "resnet34"]
    assert [t.options["backbone"] for t in made.teachers] == ["resnet18", "resnet34"]
    donor = made.students[0].state_dict()
    donor = {key: value + 1 for key, value in donor.items()}
    torch.save(donor, tmp_path / "donor.pth")
    made = state(tiny, backbone="resnet18", weights=["none", str(tmp_path / "donor.pth")])
    name = "backbone.net.conv1.weight"
    assert [torch.equal(s.state_dict()[name], donor[name]) for s in made.students] == [False, True]
    assert torch.equal(made.teachers[1].state_dict()[name], donor[name])
    assert len(made.origins) == 1


def test_the_whole_head_learns_at_its_own_rate(tiny: Settings) -> None:
    made = state(update(tiny, {"optim": {"head_lr_factor": 10.0}}, "test"), backbone="resnet18")
    body, head = made.optimizer.param_groups[:2]
    assert (body["lr_factor"], head["lr_factor"]) == (1, 10)
    named = {id(p): name for name, p in made.students[0].named_parameters()}
    assert {named[id(p)].split(".")[0] for p in head["params"]} == {"aspp", "classifier"}
    assert {named[id(p)].split(".")[0] for p in body["params"]} == {"backbone"}


def test_frozen_batch_norms_are_not_optimised(tiny: Settings, tmp_path: Path) -> None:
    torch.save(state(tiny, backbone="resnet18").students[0].state_dict(), tmp_path / "a.pth")
    options = {"weights": str(tmp_path / "a.pth"), "freeze_batch_norm": True}
    made = state(tiny, backbone="resnet18", **options)
    assert all(p.requires_grad for g in made.optimizer.param_groups for p in g["params"])
    assert not made.students[0].train().backbone.net.bn1.training
    with pytest.raises(UserError, match="keeps the statistics of trained weights"):
        validate(update(tiny, {"model": {"freeze_batch_norm": True}}, "test"))
    with pytest.raises(UserError, match="the network small has no backbone"):
        state(tiny, name="small", freeze_batch_norm=True)
