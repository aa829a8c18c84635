"""Cross pseudo supervision (Chen et al., CVPR 2021, arXiv 2106.01226): students label each other.

The paper that this package follows calls it direct mutual teaching (its Table 5). As in the form
with CutMix of the authors' program, the labels are made of the unmixed images by the networks in
training mode and mixed with the images; the labelled images are learnt from their masks alone. The
program's weight is `--loss.ct 1.5` on VOC and 6 on Cityscapes, and it drops no pixel.
"""

from ctt.methods.base import Networks
from ctt.methods.pseudo_labels import PseudoLabels


class CrossPseudoSupervision(PseudoLabels):
    """Each student is taught by the other students as they are, without an average over time."""

    @property
    def labelers(self) -> Networks:
        return self.students

    def smallest_batch(self, labeled: int, unlabeled: int) -> int:
        return unlabeled  # the weak view, which they label

    def taught_by(self, k: int) -> list[int]:
        return [j for j in range(len(self.students)) if j != k] or [k]
