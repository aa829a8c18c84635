"""Contrast of students' pixels with banks of teachers' features (Xiao et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctt.data.dataset import IGNORE
from ctt.methods import followers, losses
from ctt.methods.base import Batch, Modules, Setup, Step
from ctt.methods.losses import to_grid
from ctt.methods.optim import make_optimizer
from ctt.methods.pseudo_labels import PseudoLabels
from ctt.methods.teacher_banks import TeacherBanks
from ctt.models.base import Output


class PixelContrast(PseudoLabels):
    """Pseudo-labels, and terms that contrast the features of students with queues of pixels that
    the teachers classify well, a bank of queues for each pair.

    The high-level contrast is for pixels that a student is sure of, the low-level contrast, against
    a peer that is surer, for the others. Where students have features of different widths, a 1x1
    convolution of each takes them to the smallest before they are contrasted, and teachers have
    running averages of these.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        loss = self.settings.loss
        self.contrasts = loss.hc > 0 or (loss.lc > 0 and len(self.students) > 1)
        widths = [student.feature_channels for student in self.students]
        self.banks = TeacherBanks(setup, min(widths))
        self.projections = Modules[nn.Module](nn.Identity() for _ in widths)
        if self.contrasts:
            self.terms = ("sup", "ct", "hc", "lc", *self.terms[2:])
            self.logged = ("lost_pixels", *TeacherBanks.LOGGED)
            if len(set(widths)) > 1:
                self.find_unused = True  # before the contrast begins
                self.following = ("teachers", "slow_projections")
                with setup.seeded("projections"):
                    self.projections = Modules[nn.Module](
                        setup.finish(nn.Conv2d(width, min(widths), 1)) for width in widths
                    )
        self.slow_projections = followers.copies(self.projections)
        self.ema = followers.EmaUpdate(
            [*self.teachers, *self.slow_projections],
            [*self.students, *self.projections],
            self.settings.ema,
        )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"students": make_optimizer(self.students, self.settings, self.projections)}

    def stage(self, iteration: int) -> int:
        return super().stage(iteration) + int(self.has_begun(iteration))

    def has_begun(self, iteration: int) -> bool:
        """Return whether a step after so many others contrasts pixels."""
        return self.contrasts and iteration >= max(self.settings.bank.start_after, self.after)

    def contrast(self, out: Sequence[Output], b: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """Return equations (6)-(9), summed over the students."""
        w, bank = self.settings.loss, self.settings.bank
        zero = out[0].features.new_zeros((), dtype=torch.float32)
        if not self.has_begun(step.iteration):
            return zero, zero
        total = None if step.alone else step.total
        # networks of different strides are compared on the coarsest grid
        coarsest = max((student.grid for student in self.students), key=lambda g: g.distance)
        grid = coarsest.every(w.contrast_stride)
        truth = to_grid(b["label"], grid)
        maps = [
            Output(*(losses.coarsen(x, student.grid, grid, truth.shape[1:]) for x in o))
            for o, student in zip(out, self.students, strict=True)
        ]
        with step.autocast():
            features = [f(m.features) for f, m in zip(self.projections, maps, strict=True)]
        counts = losses.usable_counts(list(self.banks), bank.start)
        # confidence and class that each student's own classifier gives on the grid
        own = [m.logits.detach().float().softmax(dim=1).max(dim=1) for m in maps]
        hc, lc = [zero], [zero]
        for k, anchors in enumerate(features):
            label = torch.cat([truth, to_grid(b[f"label {k}"], grid)])  # (2B, h, w)
            decisive = own[k].values
            if w.hc_confidence == "teacher":
                sure = torch.ones_like(truth, dtype=torch.float32)
                decisive = torch.cat([sure, to_grid(b[f"confidence {k}"], grid)])
            high = losses.high_level_mask(decisive, w.gamma)
            if w.hc > 0:
                args = (counts[k], w.tau_hc, w.contrast_reduction, total)
                hc.append(losses.high_level_contrast(anchors, label, high, self.banks[k], *args))
            peers = [j for j in range(len(features)) if j != k] if w.lc > 0 else []
            for j in peers:
                mask = losses.low_level_mask(high, own[k].values, own[j].values, w.directional) & (
                    label != IGNORE
                )
                if w.lc_pixels == "unlabeled":
                    mask = torch.cat([torch.zeros_like(mask[: len(truth)]), mask[len(truth) :]])
                queues = [(self.banks[i].keys, counts[i]) for i in (k, j)]
                peer = (own[j].indices, mask, queues, w.tau_lc, w.contrast_reduction, total)
                value = losses.low_level_contrast(anchors, features[j], *peer)
                lc.append(value / len(peers))
        return losses.sum_of(hc), losses.sum_of(lc)

    def report(self) -> dict[str, float]:
        return self.banks.report() if self.contrasts else {}
