import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from ctt.data.digits import INFO, Digits
from ctt.models.base import SegmentationModel
from ctt.train.evaluate import Score, batches, evaluate, score


class Fixed(SegmentationModel):
    """Gives each pixel the logits of a table by the colour of its first channel."""

    stride = 1

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.classifier = nn.Identity()
        self.table = torch.randn(8, 9, generator=rng)  # classes 9 and 10 are never predicted

    def extract(self, images: Tensor) -> Tensor:
        colour = ((images[:, 0] * INFO.std[0] + INFO.mean[0]) * 7.99).long()
        logits = self.table[colour].permute(0, 3, 1, 2)
        return torch.cat([logits, torch.full_like(logits[:, :2], -20)], dim=1)


def independent_miou(network: Fixed, source: Digits) -> float:
    truth, predicted = [], []
    for name in source.eval_ids():
        label = source.label(name).long()
        image = source.image(name)[None] / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in (INFO.mean, INFO.std))
        logits = network((image - mean) / std).logits[0]
        truth.append(label[label != 255].numpy())
        predicted.append(logits.argmax(dim=0)[label != 255].numpy())
    matrix = confusion_matrix(np.concatenate(truth), np.concatenate(predicted), labels=range(11))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    present = union > 0
    return float(100 * (matrix.diagonal()[present] / union[present]).mean())


def test_miou_equals_an_independent_computation() -> None:
    source = Digits(2, 9)
    for name in source.eval_ids()[::2]:  # ignored pixels, and classes 8 and 9 nowhere
        source.label(name)[:7] = 255
    for name in source.eval_ids():
        label = source.label(name)
        label[(label == 9) | (label == 10)] = 0
    networks = {"student_1": Fixed(0), "teacher_1": Fixed(1)}
    scores = evaluate(dict(networks), source, source.eval_ids(), torch.device("cpu"))
    for name, network in networks.items():
        assert scores[name].miou == pytest.approx(independent_miou(network, source), abs=1e-9)
    assert math.isnan(scores["student_1"].class_iou[9])
    assert scores["ensemble"].miou == scores["teacher_1"].miou


def test_score_of_a_matrix() -> None:
    result = score(torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]]))
    assert result.class_iou[:2] == pytest.approx((75.0, 50.0))
    assert math.isnan(result.class_iou[2])
    assert result.miou == pytest.approx(62.5)
    assert result.pixel_accuracy == pytest.approx(80.0)
    assert math.isnan(Score((math.nan,), math.nan).miou)


def test_images_of_one_size_are_stacked() -> None:
    source = Digits(2, 5)
    assert [len(images) for images, _ in batches(source, source.eval_ids())] == [5]


def test_evaluation_leaves_the_mode_of_networks() -> None:
    source = Digits(2, 2)
    network = Fixed(0).train()
    evaluate({"student_1": network}, source, source.eval_ids(), torch.device("cpu"))
    assert network.training
