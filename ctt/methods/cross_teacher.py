"""Cross-teacher training (Xiao et al., Neurocomputing 508, 2022), equation by equation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ctt.data.source import IGNORE
from ctt.methods import followers, losses
from ctt.methods.base import Batch, Modules, Setup, Step, Terms
from ctt.methods.losses import to_grid
from ctt.methods.optim import make_optimizer
from ctt.methods.pseudo_labels import PseudoLabels
from ctt.methods.teacher_banks import TeacherBanks
from ctt.models.base import Output


class CrossTeacher(PseudoLabels):
    """Each student is taught by the *other* pairs' teachers; with one pair, by its own.

    Features of students are contrasted with queues of pixels that the teachers classify well, a
    bank of queues for each pair: the high-level contrast for pixels that a student is sure of, the
    low-level contrast, against a peer that is surer, for the others.

    Where students have features of different widths, a 1x1 convolution of each takes them to the
    smallest before they are contrasted, and teachers have running averages of these.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        loss = self.settings.loss
        self.contrasts = loss.hc > 0 or loss.lc > 0
        widths = [student.feature_channels for student in self.students]
        self.banks = TeacherBanks(setup, min(widths))
        self.projects = self.contrasts and len(set(widths)) > 1
        if self.projects:
            self.add_projections(setup, widths)
            self.find_unused = True  # before the contrast begins
        if self.contrasts:
            self.terms = ("sup", "ct", "hc", "lc", *self.terms[2:])
            self.logged = ("lost_pixels", *TeacherBanks.LOGGED)

    def add_projections(self, setup: Setup, widths: Sequence[int]) -> None:
        with setup.seeded("projections"):
            self.projections = Modules[nn.Module](
                setup.finish(nn.Conv2d(width, min(widths), 1)) for width in widths
            )
        self.slow_projections = followers.copies(self.projections)
        self.following = ("teachers", "slow_projections")
        self.ema = followers.EmaUpdate(
            [*self.teachers, *self.slow_projections],
            [*self.students, *self.projections],
            self.settings.ema,
        )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        extra = self.projections if self.projects else ()
        return {"students": make_optimizer(self.students, self.settings, extra)}

    def projected(self, projections: str, k: int, features: Tensor, step: Step) -> Tensor:
        """Return features (B, D, h, w) of pair k at the width that is contrasted.

        Args:
            projections: name of those of the students or of the teachers.
        """
        if not self.projects:
            return features
        with step.autocast():
            projected: Tensor = getattr(self, projections)[k](features)
        return projected

    def taught_by(self, k: int) -> list[int]:
        return [j for j in range(len(self.students)) if j != k] or [k]

    def teachings(self, probability: Sequence[Tensor]) -> Iterator[Tensor]:
        if self.settings.loss.labels_from == "others":
            yield from super().teachings(probability)
        else:
            yield from [losses.surest_of(probability)] * len(self.students)

    def stage(self, iteration: int) -> int:
        return int(self.contrasts and iteration >= self.settings.bank.start_after)

    def losses(self, b: Batch, step: Step) -> Terms:
        out = self.ask_students(b, step)
        terms = self.cross_entropies(out, b, step)
        if self.contrasts:
            with step.phase("contrast"):
                loss, parts = self.settings.loss, self.settings.train.accumulate
                hc, lc = self.contrast(out, b, step)
                terms |= {"hc": (loss.hc, hc / parts), "lc": (loss.lc, lc / parts)}
        return terms

    def contrast(self, out: Sequence[Output], b: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """Return equations (6)-(9), summed over the students."""
        w, bank = self.settings.loss, self.settings.bank
        zero = out[0].features.new_zeros((), dtype=torch.float32)
        if not self.stage(step.iteration):
            return zero, zero
        total = None if step.alone else step.total
        # networks of different strides are compared on the coarsest grid
        coarsest = max((student.grid for student in self.students), key=lambda g: g.distance)
        grid = coarsest.every(w.contrast_stride)
        truth = to_grid(b["label"], grid)
        out = [
            Output(*(losses.coarsen(x, student.grid, grid, truth.shape[1:]) for x in maps))
            for maps, student in zip(out, self.students, strict=True)
        ]
        out = [
            o._replace(features=self.projected("projections", k, o.features, step))
            for k, o in enumerate(out)
        ]
        counts = losses.usable_counts(list(self.banks), bank.start)
        # confidence and class that each student's own classifier gives on the grid
        own = [o.logits.detach().float().softmax(dim=1).max(dim=1) for o in out]
        hc, lc = [zero], [zero]
        for k, o in enumerate(out):
            label = torch.cat([truth, to_grid(b[f"label {k}"], grid)])  # (2B, h, w)
            decisive = own[k].values
            if w.hc_confidence == "teacher":
                sure = torch.ones_like(truth, dtype=torch.float32)
                decisive = torch.cat([sure, to_grid(b[f"confidence {k}"], grid)])
            high = losses.high_level_mask(decisive, w.gamma)
            if w.hc > 0:
                args = (counts[k], w.tau_hc, w.contrast_reduction, total)
                hc.append(losses.high_level_contrast(o.features, label, high, self.banks[k], *args))
            peers = [j for j in range(len(out)) if j != k] if w.lc > 0 else []
            for j in peers:
                mask = losses.low_level_mask(high, own[k].values, own[j].values, w.directional) & (
                    label != IGNORE
                )
                if w.lc_pixels == "unlabeled":
                    mask = torch.cat([torch.zeros_like(mask[: len(truth)]), mask[len(truth) :]])
                queues = [(self.banks[i].keys, counts[i]) for i in (k, j)]
                peer = (own[j].indices, mask, queues, w.tau_lc, w.contrast_reduction, total)
                lc.append(
                    losses.low_level_contrast(o.features, out[j].features, *peer) / len(peers)
                )
        return losses.sum_of(hc), losses.sum_of(lc)

    def after_step(self, b: Batch, step: Step) -> None:
        super().after_step(b, step)
        if self.contrasts:
            self.banks.fill(b, self.teachers, partial(self.projected, "slow_projections"), step)

    def report(self) -> dict[str, float]:
        return self.banks.report() if self.contrasts else {}
