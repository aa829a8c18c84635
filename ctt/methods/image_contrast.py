"""Contrast of some pixels of each image and class with pixels of all images (Zhou et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ctt.data.dataset import IGNORE
from ctt.methods.base import Batch, Step
from ctt.methods.sampling import gathered, half_of_each, highest, put_first
from ctt.ops import info_nce


@dataclass(frozen=True)
class ImageContrast:
    """Which pixels are keys and anchors, and the loss of these.

    Images come in pairs, a labelled and an unlabelled one: maps are (B, 2, D, h, w).

    Attributes:
        classes: C.
        without: a class that takes no part; -1: none.
        count: pixels of an image and class, if it has more than so many; others take no part.
    """

    classes: int
    without: int
    count: int
    temperature: float

    def prepare(self, maps: Tensor, own: Tensor, ticket: Tensor, step: Step) -> Batch:
        """Draw the keys of all processes, and say which pixels may be anchors.

        Args:
            maps: of the network that gives the keys, normalised.
            own: classes (B, 2, h, w), 255 where there is none.
            ticket: random numbers (B, 2, h, w).

        Returns:
            `class` and `ticket` (B, 2, h, w), the first 255 where a pixel can be no anchor; in
            every image alike `keys` (B, C, V, D), normalised, and `held` (B, C), how many there
            are; `anchors` (), how many anchors all images have.
        """
        member = self._members(own)
        member &= member.sum(dim=2, keepdim=True) > self.count
        place, best = highest(member, self.count, _rows(ticket)[:, None])
        chosen = _at(maps, place)
        keys = gathered(chosen.transpose(0, 1).flatten(1, 2), step)  # (C, V, D)
        there = gathered(best.transpose(0, 1).flatten(1), step) >= 0
        keys, held = put_first(keys, there)
        return {
            "class": own.masked_fill(~member.any(dim=1).view_as(own), IGNORE),
            "ticket": ticket,
            "keys": keys.expand(len(own), *keys.shape),
            "held": held.expand(len(own), -1),
            "anchors": held.sum().clamp(min=1),
        }

    def loss(self, maps: Tensor, answer: Tensor, b: Batch) -> Tensor:
        """Return the contrast of anchors with the keys: its part of the mean over all anchors.

        Args:
            maps: of the student.
            answer: its classes (B, 2, h, w); half of the anchors are pixels that it has wrong, if
                there are so many.
            b: what `prepare` returned, or a part.
        """
        wrong = _rows(answer != b["class"])[:, None]
        ticket = _rows(b["ticket"])[:, None]
        place, there = half_of_each(self._members(b["class"]), wrong, self.count, ticket)
        label = torch.arange(self.classes, device=place.device)[:, None].expand_as(place)
        values = info_nce(
            _at(maps, place).flatten(0, 2),
            label.flatten(),
            b["keys"][0],
            b["held"][0],
            temperature=self.temperature,
            mask=there.flatten(),
            reduction="none",
        )
        return values.sum() / b["anchors"]

    def _members(self, own: Tensor) -> Tensor:
        """Return which pixels are of each class: (2B, C, h * w)."""
        classes = torch.arange(self.classes, device=own.device)[:, None]
        return (_rows(own)[:, None] == classes) & (classes != self.without)


def _rows(values: Tensor) -> Tensor:
    """Return values (B, 2, h, w) with the pixels of an image in a row: (2B, h * w)."""
    return values.flatten(0, 1).flatten(1)


def _at(maps: Tensor, place: Tensor) -> Tensor:
    """Return the pixels (2B, C, n, D) of maps (B, 2, D, h, w) at places (2B, C, n)."""
    pixels = maps.flatten(0, 1).flatten(2).mT  # (2B, h * w, D)
    return pixels[torch.arange(len(pixels), device=place.device)[:, None, None], place]
