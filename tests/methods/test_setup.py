from pathlib import Path

import pytest
import torch

from ctt.errors import UserError
from ctt.methods.base import Method
from ctt.settings import Settings, update, validate
from tests.train.steps import make


def made(settings: Settings, **model: object) -> Method:
    values = {"model": {"name": "deeplabv2", "features": 8, **model}}
    return make(update(settings, values, "test"), 2).method


def test_backbones_and_weights_go_round_the_pairs(tiny: Settings, tmp_path: Path) -> None:
    method = made(tiny, backbone=["resnet18", "resnet34"])
    assert [s.options["backbone"] for s in method.students] == ["resnet18", "resnet34"]
    assert [t.options["backbone"] for t in method.teachers] == ["resnet18", "resnet34"]
    donor = method.students[0].state_dict()
    donor = {key: value + 1 for key, value in donor.items()}
    torch.save(donor, tmp_path / "donor.pth")
    method = made(tiny, backbone="resnet18", weights=["none", str(tmp_path / "donor.pth")])
    name = "backbone.net.conv1.weight"
    started = [torch.equal(s.state_dict()[name], donor[name]) for s in method.students]
    assert started == [False, True]
    assert torch.equal(method.teachers[1].state_dict()[name], donor[name])


def test_the_whole_head_learns_at_its_own_rate(tiny: Settings) -> None:
    method = made(update(tiny, {"optim": {"head_lr_factor": 10.0}}, "test"), backbone="resnet18")
    body, head = method.optimizers()["students"].param_groups[:2]
    assert (body["lr_factor"], head["lr_factor"]) == (1, 10)
    named = {id(p): name for name, p in method.students[0].named_parameters()}
    assert {named[id(p)].split(".")[0] for p in head["params"]} == {"aspp", "classifier"}
    assert {named[id(p)].split(".")[0] for p in body["params"]} == {"backbone"}


def test_frozen_batch_norms_are_not_optimised(tiny: Settings, tmp_path: Path) -> None:
    torch.save(made(tiny, backbone="resnet18").students[0].state_dict(), tmp_path / "a.pth")
    options = {"weights": str(tmp_path / "a.pth"), "freeze_batch_norm": True}
    method = made(tiny, backbone="resnet18", **options)
    groups = method.optimizers()["students"].param_groups
    assert all(p.requires_grad for group in groups for p in group["params"])
    assert not method.students[0].train().backbone.net.bn1.training
    for option, kept in (("freeze_batch_norm", "statistics"), ("freeze_backbone", "backbone")):
        with pytest.raises(UserError, match=f"`model.{option}` keeps the {kept} of trained"):
            validate(update(tiny, {"model": {option: True}}, "test"))
    with pytest.raises(UserError, match="the network small has no backbone"):
        made(tiny, name="small", freeze_batch_norm=True)
