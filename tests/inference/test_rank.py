"""Which images to label next."""

import math

import pytest
import torch

from ctt import models
from ctt.data.digits import INFO
from ctt.inference.load import TrainedNetworks
from ctt.inference.rank import Committee, Rating, entropy, order
from ctt.settings import EvalSettings, Settings


def committee(*names: str) -> Committee:
    torch.manual_seed(0)
    networks = {name: models.build("small", 11, 8, 4).eval() for name in names}
    trained = TrainedNetworks(networks, INFO, Settings(), "here", "")
    return Committee(trained, torch.device("cpu"), EvalSettings())


def test_disagreement_and_entropy_are_what_they_are_called() -> None:
    asked = committee("student_1", "student_2", "teacher_1", "teacher_2")
    assert asked.names == ["teacher_1", "teacher_2"]
    image = torch.randint(0, 256, (3, 20, 28), dtype=torch.uint8)
    label, disagreement, uncertain = asked.look(image)
    with torch.no_grad():
        given = [predict(image[None])[0] for predict in asked.predicts]
    mean = (given[0] + given[1]) / 2
    assert torch.equal(label.long(), mean.argmax(dim=0))
    torch.testing.assert_close(uncertain, entropy(mean) / math.log(11))
    # the mean distance of both from their mean, in the sense of Kullback and Leibler
    apart = sum((p * (p / mean).log()).sum(dim=0) for p in given) / 2
    torch.testing.assert_close(disagreement, apart / math.log(11), atol=1e-5, rtol=1e-3)
    rating = asked.rate(image)
    assert rating.disagreement == pytest.approx(float(disagreement.mean()))
    assert rating.entropy == pytest.approx(float(uncertain.mean()))
    assert rating.features.shape == (8,)


def test_one_network_disagrees_with_nobody() -> None:
    _, disagreement, uncertain = committee("network").look(torch.zeros(3, 8, 8).byte())
    assert disagreement.max() < 1e-6
    assert uncertain.min() > 0


def test_what_has_no_data_counts_for_nothing() -> None:
    asked = committee("student_1", "teacher_1")
    assert asked.names == ["student_1", "teacher_1"]
    image = torch.rand(3, 8, 8)
    image[:, :4] = torch.nan
    label, disagreement, uncertain = asked.look(image)
    assert (label[:4] == 255).all()
    assert not disagreement[:4].any()
    assert not uncertain[:4].any()


def ratings(scores: list[float], places: list[list[float]]) -> list[Rating]:
    return [Rating(s, s, torch.tensor(p)) for s, p in zip(scores, places, strict=True)]


def test_copies_of_what_is_chosen_come_last() -> None:
    same = [[0.0, 0.0], [0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]
    found = order(ratings([1.0, 0.99, 0.5, 0.6], same))
    assert [place.image for place in found] == [0, 3, 2, 1]
    assert found[-1].distance == pytest.approx(0, abs=1e-6)
    assert found[0].score == pytest.approx(2 * 1.0 / ((1 + 0.99 + 0.5 + 0.6) / 4))


def test_copies_of_labelled_images_come_last() -> None:
    known = [torch.tensor([0.0, 0.0])]
    found = order(ratings([1.0, 0.5, 0.6], [[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]), known)
    assert [place.image for place in found] == [2, 1, 0]


def test_after_the_chosen_ones_images_go_by_their_scores() -> None:
    found = order(ratings([1.0, 0.99, 0.5, 0.6], [[0.0], [0.0], [5.0], [-5.0]]), chosen=2)
    assert [place.image for place in found] == [0, 3, 1, 2]
    assert math.isnan(found[-1].distance)
    assert order([]) == []


def test_sure_networks_give_an_order_too() -> None:
    assert len(order(ratings([0.0, 0.0], [[1.0], [1.0]]))) == 2
