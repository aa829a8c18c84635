"""FixMatch (Sohn et al., NeurIPS 2020, arXiv 2001.07685) for segmentation.

The student labels the weak view itself and learns the strong view. Its labels come from a forward
pass of their own in training mode; programs often take them from the pass on the labelled images.
The threshold is a setting: `--loss.confidence-weight threshold --loss.confidence-threshold 0.95` is
usual on VOC, and published programs use none on Cityscapes. The mean is over the pixels kept.
"""

from ctt.methods.base import Networks
from ctt.methods.pseudo_labels import PseudoLabels


class FixMatch(PseudoLabels):
    """Each student is taught by itself."""

    @property
    def labelers(self) -> Networks:
        return self.students

    def smallest_batch(self, labeled: int, unlabeled: int) -> int:
        return unlabeled  # the weak view, which they label

    def taught_by(self, k: int) -> list[int]:
        return [k]
