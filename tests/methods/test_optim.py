"""The optimisers of the students: their groups, their rates, and that they can be resumed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ctt import checkpoint, models, run
from ctt.errors import UserError
from ctt.methods.optim import learning_rate, make_optimizer
from ctt.settings import OptimSettings, Settings, update
from ctt.train.loop import train
from tests.train.steps import batch, make, unlabelled

VIT = "vit_tiny_patch16_224"


def optimizer(network: Any, **optim: Any) -> torch.optim.Optimizer:
    return make_optimizer([network], update(Settings(), {"optim": optim}, "test"))


def test_rates_fall_by_a_power_or_a_cosine() -> None:
    poly, cosine = OptimSettings(lr=2, warmup=4), OptimSettings(lr=2, warmup=4, schedule="cosine")
    for optim in (poly, cosine):
        assert [learning_rate(optim, 100, t) for t in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(poly, 100, 50) == pytest.approx(2 * 0.5**0.9)
    assert learning_rate(cosine, 100, 50) == pytest.approx(1)
    assert learning_rate(cosine, 100, 75) == pytest.approx(1 - math.sqrt(0.5))


def test_groups_have_all_parameters_once() -> None:
    network = models.build("vit", 5, 16, backbone=VIT)
    for change in ({}, {"layer_decay": 0.8}, {"decay_vectors": False}, {"name": "adamw"}):
        groups = optimizer(network, **change).param_groups
        found = [p for group in groups for p in group["params"]]
        assert {id(p) for p in found} == {id(p) for p in network.parameters()}
        assert len(found) == len({id(p) for p in found})


def test_modules_of_a_student_learn_as_its_head_does(tiny: Settings) -> None:
    optim = {"lr": 0.1, "pair_lr": [0.1, 0.001], "pair_head_lr_factor": [1, 10]}
    for name, kinds in (
        ("u2pl", "heads"),
        ("cct", "decoders"),
        ("semiseg-contrastive", "projections predictions memories"),
    ):
        method = make(update(tiny.with_method(name), {"optim": optim}, "test"), 2).method
        groups = method.optimizers()["students"].param_groups
        factor = {id(p): group["lr_factor"] for group in groups for p in group["params"]}
        for first, second in (getattr(method, kind) for kind in kinds.split()):
            rates = [factor[id(p)] for p in second.parameters() if p.requires_grad]
            assert {factor[id(p)] for p in first.parameters() if p.requires_grad} == {1.0}
            assert rates == pytest.approx([0.1] * len(rates))


def test_modules_beside_the_students_are_clipped(tiny: Settings) -> None:
    change = {"optim": {"clip_norm": 1e-4}}
    engine = make(update(tiny.with_method("pseudoseg"), change, "test"))
    engine(batch(), unlabelled())
    for module in (*engine.method.students, *engine.method.refiners):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        assert 0 < torch.nn.utils.get_total_norm(gradients) <= 1.001e-4


def test_layers_of_a_transformer_learn_the_slower_the_deeper_they_are() -> None:
    network = models.build("vit", 5, 16, backbone=VIT)
    groups = optimizer(network, layer_decay=0.5, head_lr_factor=40.0).param_groups
    factor = {id(p): group["lr_factor"] for group in groups for p in group["params"]}
    blocks: Any = network.backbone
    rates = [factor[id(block.attn.qkv.weight)] for block in blocks.blocks]
    assert rates == [0.5 ** (11 - i) for i in range(12)]
    assert factor[id(blocks.patch_embed.proj.weight)] == 0.5**12
    assert factor[id(network.classifier.weight)] == 40


@pytest.mark.parametrize(("name", "backbone"), [("deeplabv2", "resnet18"), ("small", "")])
def test_networks_without_known_layers_are_told(name: str, backbone: str) -> None:
    network = models.build(name, 5, 16, backbone=backbone)
    with pytest.raises(UserError, match=r"`optim\.layer_decay` 0\.5: the layers of this network"):
        optimizer(network, layer_decay=0.5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_vectors_may_be_left_undecayed(name: str) -> None:
    network = models.build("deeplabv2", 5, 16, backbone="test_resnet")
    groups = optimizer(network, name=name, decay_vectors=False, weight_decay=0.3).param_groups
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}


def test_a_run_with_adamw_goes_on_to_the_bit(tiny: Settings, tmp_path: Path) -> None:
    change = {"optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01, "schedule": "cosine"}}
    settings = update(tiny, change, "test")
    train(settings, out=tmp_path / "whole")
    half = update(settings, {"train": {"checkpoint_every": 3}}, "test")
    with pytest.MonkeyPatch.context() as patch:
        save = checkpoint.save

        def save_and_stop(*arguments: Any) -> None:
            save(*arguments)
            raise KeyboardInterrupt

        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(half, out=tmp_path / "run")
    train(half, resume=tmp_path / "run")
    ends = [checkpoint.load(tmp_path / name / run.CHECKPOINT) for name in ("whole", "run")]
    assert all(torch.equal(ends[1]["method"][n], value) for n, value in ends[0]["method"].items())
    states = [end["optimizers"]["students"]["state"] for end in ends]
    assert torch.equal(states[0][0]["exp_avg_sq"], states[1][0]["exp_avg_sq"])


def test_a_frozen_backbone_stays_and_keeps_nothing(tiny: Settings) -> None:
    model = {"name": "deeplabv2", "backbone": ["test_resnet"], "freeze_backbone": True}
    engine = make(update(tiny, {"model": model}, "test"), 2)
    student = engine.method.students[0]
    before = {name: x.clone() for name, x in student.state_dict().items()}
    for i in range(2):
        engine(batch(seed=i), unlabelled(seed=i))
    for name, x in student.state_dict().items():
        assert torch.equal(x, before[name]) == name.startswith("backbone."), name
    assert not student.backbone.training
    stages = student.encode(torch.rand(2, 3, 24, 24))
    assert all(x.grad_fn is None for x in stages)


def test_a_network_without_backbone_has_none_to_freeze(tiny: Settings) -> None:
    with pytest.raises(UserError, match=r"`model\.freeze_backbone`: the network small has no"):
        make(update(tiny, {"model": {"freeze_backbone": True}}, "test"), 1)
