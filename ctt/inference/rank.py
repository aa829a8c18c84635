"""Which unlabelled images to label next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data.views import normalize, to_unit
from ctt.inference.load import TrainedNetworks
from ctt.inference.predict import best_class, for_images, predictor, reraise_out_of_memory
from ctt.models.base import SegmentationModel
from ctt.settings import EvalSettings

LONGEST = 512  # side of an image of which features are compared, in pixels
CHOSEN = 1000  # places that are given one by one; the images after them go by their scores


@dataclass(frozen=True)
class Rating:
    """What networks say of one image.

    Attributes:
        disagreement: mean over the pixels of the mutual information between the class and the
            choice of the network, as a share of the largest entropy.
        entropy: mean entropy of the mean of their probabilities, as the same share.
        features: (D,), mean over the image.
    """

    disagreement: float
    entropy: float
    features: Tensor


@dataclass(frozen=True)
class Place:
    """An image in the order.

    Attributes:
        image: its number among those that were rated.
        score: disagreement and entropy, each relative to the mean of all images, summed.
        distance: of its features from those of the nearest image before it or with a label,
            relative to the mean distance of two images; NaN where images go by their scores.
    """

    image: int
    score: float
    distance: float


class Committee:
    """The networks of a run that rate images, and how each sees an image.

    These are the teachers of a run with several pairs, else all its networks.

    Args:
        trained: networks of a run, or one network, whose disagreement is 0.
        settings: how images are shown to them.
    """

    def __init__(
        self, trained: TrainedNetworks, device: torch.device, settings: EvalSettings
    ) -> None:
        teachers = [name for name in trained.networks if name.startswith("teacher")]
        self.names = teachers if len(teachers) > 1 else list(trained.networks)
        self.info, self.device, self.settings = trained.info, device, for_images(settings)
        self.networks = [trained.networks[name].to(device).eval() for name in self.names]
        self.predicts = [predictor(net, self.info, self.settings) for net in self.networks]
        self.largest = math.log(len(self.info.classes))

    @torch.no_grad()
    def look(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return label (H, W), disagreement and entropy (H, W) of an image (C, H, W), on the CPU.

        Where an image has no data the label is 255 and both are 0.
        """
        with reraise_out_of_memory(self.settings):
            batch = image[None].to(self.device)
            total, within = torch.zeros(()), torch.zeros(())
            for predict in self.predicts:
                probability = predict(batch)[0].cpu()  # (C, H, W)
                total = total + probability / len(self.predicts)
                within = within + entropy(probability) / len(self.predicts)
            whole = entropy(total)
            missing = image.isnan().any(dim=0)
            _, label = best_class(total, image)
            maps = [((whole - within) / self.largest).clamp(min=0), whole / self.largest]
            return label, maps[0].masked_fill(missing, 0), maps[1].masked_fill(missing, 0)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Return the mean over an image (C, H, W) of the first network's features: (D,)."""
        network: SegmentationModel = self.networks[0]
        with reraise_out_of_memory(self.settings):
            normal = normalize(to_unit(image[None].to(self.device)), self.info)
            height, width = normal.shape[-2:]
            if (factor := LONGEST / max(height, width)) < 1:
                size = (max(1, round(factor * height)), max(1, round(factor * width)))
                normal = F.interpolate(normal, size, mode="bilinear", antialias=True)
            features: Tensor = network(normal).features
            return features[0].float().mean(dim=(1, 2)).cpu()

    def rate(self, image: Tensor) -> Rating:
        """Return the rating of an image (C, H, W)."""
        _, disagreement, uncertain = self.look(image)
        seen = max(1, int((~image.isnan().any(dim=0)).sum()))
        return Rating(
            float(disagreement.sum() / seen), float(uncertain.sum() / seen), self.features(image)
        )


def entropy(probability: Tensor) -> Tensor:
    """Return the entropy (H, W) of probabilities (C, H, W)."""
    summed: Tensor = torch.special.entr(probability).sum(dim=0)
    return summed


def rate(
    committee: Committee, images: Iterable[Tensor], advance: Callable[[], object] = lambda: None
) -> list[Rating]:
    """Return the ratings of images (C, H, W), whatever their sizes."""
    ratings = []
    for image in images:
        ratings.append(committee.rate(image))
        advance()
    return ratings


def order(
    ratings: Sequence[Rating], labeled: Sequence[Tensor] = (), chosen: int = CHOSEN
) -> list[Place]:
    """Return the images, the one to label first in front.

    Each place goes to the image with the largest product of its score and its distance from the
    images before it and from those with a label, so that neither sure images nor copies of what is
    known come first. Distances are those of features with mean 0 and deviation 1 over all images.

    Args:
        labeled: features (D,) of images that have a label.
        chosen: places that are given like this; the images after them go by their scores.
    """
    if not ratings:
        return []
    scores = sum(
        values / values.mean().clamp(min=1e-12)
        for values in (
            torch.tensor([getattr(rating, name) for rating in ratings])
            for name in ("disagreement", "entropy")
        )
    )
    assert isinstance(scores, Tensor)
    every = torch.stack([*(rating.features for rating in ratings), *labeled])
    every = (every - every.mean(dim=0)) / every.std(dim=0, correction=0).clamp(min=1e-6)
    own, known = every[: len(ratings)], every[len(ratings) :]
    # of independent standardised features two are sqrt(2 D) apart in the mean square
    unit = math.sqrt(2 * max(1, every.shape[1]))
    nearest = torch.full((len(ratings),), math.inf)
    for features in known:
        nearest = torch.minimum(nearest, (own - features).norm(dim=1) / unit)
    places, left = [], torch.ones(len(ratings), dtype=torch.bool)
    for _ in range(min(chosen, len(ratings))):
        gain = scores * nearest if nearest.isfinite().all() else scores
        best = int(gain.masked_fill(~left, -math.inf).argmax())
        places.append(Place(best, float(scores[best]), float(nearest[best])))
        left[best] = False
        nearest = torch.minimum(nearest, (own - own[best]).norm(dim=1) / unit)
    rest = [i for i in scores.argsort(descending=True).tolist() if left[i]]
    return [*places, *(Place(i, float(scores[i]), math.nan) for i in rest)]
