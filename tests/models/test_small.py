import subprocess
import sys

import pytest
import torch

from ctt import models
from ctt.errors import UserError


@pytest.mark.parametrize("size", [(40, 40), (33, 47), (9, 8)])
def test_features_are_what_the_classifier_reads(size: tuple[int, int]) -> None:
    network = models.build("small", 5, 12, 4).eval()
    images = torch.randn(2, 3, *size)
    out = network(images)
    grid = tuple(-(-side // network.stride) for side in size)
    assert out.features.shape == (2, 12, *grid)
    assert out.logits.shape == (2, 5, *grid)
    assert torch.equal(out.logits, network.classifier(out.features))


@torch.no_grad()
def test_features_do_not_move_with_the_size_of_the_image() -> None:
    network = models.build("small", 5, 12, 4).eval()
    images = torch.randn(1, 3, 128, 128)
    whole = network(images).features
    assert whole.std() > 0
    for side in (113, 118, 121):
        part = network(images[:, :, :side, :side]).features
        # the border is not seen from so far
        torch.testing.assert_close(part[:, :, :24, :24], whole[:, :, :24, :24])


def test_head_has_its_own_parameters() -> None:
    network = models.build("small", 5, 12, 4)
    head = {id(p) for p in network.head_parameters()}
    assert {n for n, p in network.named_parameters() if id(p) in head} == {
        "classifier.weight",
        "classifier.bias",
    }


NARROW = """
import torch
from ctt import models
torch.set_num_threads(8)
for size in (3, 7, 10):
    network = models.build("small", 5, 8, 4).to(memory_format=torch.channels_last)
    for _ in range(4):
        images = torch.randn(size, 3, 48, 48).contiguous(memory_format=torch.channels_last)
        network(images).logits.sum().backward()
"""


def test_backward_of_a_narrow_network() -> None:
    """In a process of its own: where a convolution writes outside its memory, it dies."""
    done = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_unknown_architecture() -> None:
    with pytest.raises(UserError, match=r"`model\.name` vgg: no such architecture"):
        models.build("vgg", 5, 12, 4)
