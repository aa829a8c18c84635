"""What a data set is to the rest: names of images, and an image or a label for a name."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

IGNORE = 255  # label of pixels that belong to no class


@dataclass(frozen=True)
class DatasetInfo:
    """Facts that do not depend on an image.

    Attributes:
        classes: C names. palette: C colours (r, g, b) in 0..255.
        mean, std: of the channels in 0..1, for normalisation.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Source(ABC):
    """A data set. `image` and `label` are called from loader processes and must not keep state."""

    info: DatasetInfo

    @abstractmethod
    def train_ids(self) -> list[str]:
        """Names of the training images, sorted."""

    @abstractmethod
    def eval_ids(self) -> list[str]:
        """Names of the images to evaluate on, sorted."""

    @abstractmethod
    def image(self, name: str) -> Tensor:
        """(3, H, W) uint8."""

    @abstractmethod
    def label(self, name: str) -> Tensor:
        """(H, W) uint8, class or 255. Never asked for of an unlabelled image."""
