import pytest
import torch

from ctt.data.digits import CANVAS, SCANS, Digits
from ctt.errors import UserError


def test_same_seed_same_images() -> None:
    first, second = Digits(6, 3), Digits(6, 3)
    assert first.train_ids() == second.train_ids()
    for name in first.train_ids() + first.eval_ids():
        assert torch.equal(first.image(name), second.image(name))
        assert torch.equal(first.label(name), second.label(name))
    other = Digits(6, 3, seed=1)
    assert not torch.equal(first.image(first.train_ids()[0]), other.image(other.train_ids()[0]))


def test_images_and_labels_are_what_a_source_promises() -> None:
    dataset = Digits(20, 4)
    assert dataset.train_ids() == sorted(dataset.train_ids())
    for name in dataset.train_ids():
        image, label = dataset.image(name), dataset.label(name)
        assert image.shape == (3, CANVAS, CANVAS)
        assert image.dtype == torch.uint8
        assert label.shape == (CANVAS, CANVAS)
        assert int(label.max()) < len(dataset.info.classes)
        assert 0 < int((label > 0).sum()) < label.numel()  # a digit, and background around it


def test_digits_are_brighter_than_their_background() -> None:
    dataset = Digits(30, 1)
    images = torch.stack([dataset.image(n) for n in dataset.train_ids()]).float().mean(dim=1)
    labels = torch.stack([dataset.label(n) for n in dataset.train_ids()])
    assert images[labels > 0].mean() > images[labels == 0].mean() + 40


def test_scans_of_training_and_evaluation_are_disjoint() -> None:
    assert not set(range(*SCANS["train"])) & set(range(*SCANS["val"]))
    assert not set(range(*SCANS["tune_train"])) & set(range(*SCANS["tune"]))
    # what is tuned on belongs to the training scans: the validation scans stay unseen
    assert set(range(*SCANS["tune"])) <= set(range(*SCANS["train"]))


def test_unknown_name_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no digits image 'train-99'"):
        Digits(3, 1).image("train-99")
