"""Cross-teacher training (Xiao et al., Neurocomputing 508, 2022), equation by equation."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ctt.methods import losses
from ctt.methods.base import Batch, Step, Terms
from ctt.methods.pixel_contrast import PixelContrast


class CrossTeacher(PixelContrast):
    """Each student is taught by the *other* pairs' teachers; with one pair, by its own."""

    def taught_by(self, k: int) -> list[int]:
        return [j for j in range(len(self.students)) if j != k] or [k]

    def teachings(self, probability: Sequence[Tensor]) -> Iterator[Tensor]:
        """Return what labels unlabelled images for each student: equations (3) and (4)."""
        if self.settings.loss.labels_from == "others":
            yield from super().teachings(probability)
        else:
            yield from [losses.surest_of(probability)] * len(self.students)

    def losses(self, b: Batch, step: Step) -> Terms:
        """Return the terms of equation (10)."""
        out = self.ask_students(b, step)
        terms = self.cross_entropies(out, b, step)
        if self.contrasts:
            with step.phase("contrast"):
                loss, parts = self.settings.loss, self.settings.train.accumulate
                hc, lc = self.contrast(out, b, step)
                terms |= {"hc": (loss.hc, hc / parts), "lc": (loss.lc, lc / parts)}
        return terms

    def after_step(self, b: Batch, step: Step) -> None:
        """Let the teachers follow, then push their features into the banks."""
        super().after_step(b, step)
        if self.contrasts:
            self.banks.fill(b, self.teachers, self.slow_projections, step)
