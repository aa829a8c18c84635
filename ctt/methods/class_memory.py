"""A memory of features for each class (Alonso et al.), and a rule for negatives (U2PL)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.methods import followers
from ctt.methods.base import Setup, Step
from ctt.methods.losses import as_pixels
from ctt.models.base import wide
from ctt.ops import MemoryBank


class Selectors(nn.Module):
    """One two-layer network per class, which gives each vector a weight in 0..1."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(dim)
        self.first = nn.Parameter(torch.empty(classes, dim, dim).uniform_(-bound, bound))
        self.second = nn.Parameter(torch.empty(classes, dim).uniform_(-bound, bound))
        self.norm = nn.LayerNorm(dim)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the weights (C, n) of vectors (C, n, D)."""
        hidden = F.leaky_relu(self.norm(vectors @ self.first), 0.2)
        weight: Tensor = (hidden @ self.second[:, :, None])[..., 0].sigmoid()
        return weight


class ClassMemory(nn.Module):
    """A queue of vectors per class, selectors that weigh pixels and vectors, and a slow copy of the
    pixel selectors (Alonso et al., 2021).

    Args:
        capacity: vectors of a class.
        dim: D.
    """

    def __init__(self, setup: Setup, capacity: int, dim: int) -> None:
        super().__init__()
        self.bank = MemoryBank(setup.classes, capacity, dim)
        self.of_pixels = setup.finish(Selectors(setup.classes, dim))
        self.of_vectors = setup.finish(Selectors(setup.classes, dim))
        self.slow = followers.copies([self.of_pixels])

    def distance(self, pixels: Tensor, there: Tensor, step: Step) -> Tensor:
        """Return the weighted mean of 1 - cosine over pairs of pixel and vector of each class, then
        the mean over the classes.

        Args:
            pixels: (C, n, D), normalised; the selectors learn from them, and they not from these.
            there: (C, n), where there is one.
        """
        bank = self.bank
        held = torch.arange(bank.capacity, device=bank.keys.device) < bank.count[:, None]  # (C, V)
        keys = bank.keys.to(pixels.dtype)
        weight = wide(self.of_vectors(keys)).masked_fill(~held, 0)
        vector = torch.einsum("cv,cvd->cd", weight, keys)
        vector = vector / weight.sum(dim=1, keepdim=True).clamp(min=1e-12)
        away = 1 - torch.einsum("cnd,cd->cn", pixels, vector)
        share = wide(self.of_pixels(pixels.detach())).masked_fill(~there, 0)
        return part_of_weighted_mean(share, away, step).masked_fill(bank.count == 0, 0).mean()

    def push(self, pixels: Tensor, there: Tensor, count: int) -> None:
        """Take the pixels (C, n, D) of each class that the slow selectors rank highest."""
        classes = torch.arange(len(pixels), device=pixels.device)[:, None].expand_as(there)
        score = wide(self.slow[0](pixels)).flatten()
        features, label, valid = pixels.flatten(0, 1), classes.flatten(), there.flatten()
        self.bank.push(features, label, score, valid=valid, top_k=count, per_class=count)


def part_of_weighted_mean(weight: Tensor, values: Tensor, step: Step) -> Tensor:
    """Return this process's part of the mean over all processes, (C,), of values (C, n).

    Its gradient is that of the mean, in which the sum of the weights changes too, though sums over
    the processes have none.
    """
    own, part = weight.sum(dim=1), (weight * values).sum(dim=1)
    whole = step.total(own.detach()).clamp(min=1e-12)
    mean = step.total(part.detach()) / whole
    return (part - (own - own.detach()) * mean) / whole


def negatives(p: Tensor, own: Tensor, unsure: Tensor, likely: int) -> Tensor:
    """Return which pixels (C, (B + U) * h * w) are negatives of each class (Wang et al., 2022).

    A labelled pixel is one if its label is another class but the class is among its `likely` most
    probable ones. An unlabelled one is, if it is unsure and the class is neither among those nor
    the least probable one.

    Args:
        p: probabilities (B + U, C, h, w), of labelled images first.
        own: classes (B + U, h, w), 255 where there is none.
        unsure: (U, h, w), of the unlabelled images.
        likely: how many classes.
    """
    n, classes = len(p) - len(unsure), p.shape[1]
    rank = p.argsort(dim=1, descending=True).argsort(dim=1)  # of each class, by probability
    truth = own[:n, None]
    other = (truth != torch.arange(classes, device=p.device)[:, None, None]) & (truth != IGNORE)
    unlikely = (rank[n:] >= likely) & (rank[n:] < classes - 1) & unsure[:, None]
    return as_pixels(torch.cat([other & (rank[:n] < likely), unlikely])).T
