"""Cross-teacher training (Xiao et al., Neurocomputing 508, 2022), equation by equation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ctt.data.source import IGNORE
from ctt.methods import followers, losses
from ctt.methods.base import Batch, Modules, Setup, Step, Terms
from ctt.methods.losses import to_grid
from ctt.methods.optim import make_optimizer
from ctt.methods.pseudo_labels import PseudoLabels
from ctt.models.base import Output
from ctt.ops import MemoryBank


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
        loss, bank = self.settings.loss, self.settings.bank
        self.contrasts = loss.hc > 0 or loss.lc > 0
        self.per_class = bank.per_class or max(1, bank.capacity // setup.labeled)
        widths = [student.feature_channels for student in self.students]
        self.banks = Modules[MemoryBank](
            MemoryBank(setup.classes, bank.capacity, min(widths)) for _ in self.students
        )
        self.projects = self.contrasts and len(set(widths)) > 1
        if self.projects:
            self.add_projections(setup, widths)
            self.find_unused = True  # before the contrast begins
        if self.contrasts:
            self.terms, self.logged = (
                ("sup", "ct", "hc", "lc", *self.terms[2:]),
                (
                    "lost_pixels",
                    "queues_full",
                    "keys_alike",
                    "keys_apart",
                ),
            )

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
            self.fill_banks(b, step)

    def fill_banks(self, b: Batch, step: Step) -> None:
        """Push teacher k's features of well classified labelled pixels into bank k."""
        bank = self.settings.bank
        pushes = list(self.pushes(len(b["images"]), step))
        drawn = bank.random_choice and bank.top_k > self.per_class
        if drawn:
            shape = (len(self.banks), len(pushes), self.banks[0].num_classes, bank.top_k)
            tickets = step.rand("bank", shape)
        for k, (teacher, queues) in enumerate(zip(self.teachers, self.banks, strict=True)):
            out = step.forward(teacher, b["images"])
            with step.phase("banks"):
                truth = to_grid(b["label"], teacher.grid)
                features = self.projected("slow_projections", k, out.features, step)
                confidence, predicted = out.logits.float().softmax(dim=1).max(dim=1)
                valid = (predicted == truth) & (confidence >= bank.min_confidence)
                for i, part in enumerate(pushes):
                    queues.push(
                        losses.as_pixels(features[part]),
                        truth[part].flatten(),
                        confidence[part].flatten(),
                        valid=valid[part].flatten(),
                        top_k=bank.top_k if bank.random_choice else self.per_class,
                        per_class=self.per_class,
                        ticket=tickets[k, i] if drawn else None,
                    )

    def pushes(self, images: int, step: Step) -> Iterator[slice]:
        """Say which of its images a process gives to each push: all, or one of one process."""
        if not self.settings.bank.per_image:
            yield slice(None)
            return
        for i in range(images * step.processes):
            rank, image = divmod(i, images)
            yield slice(image, image + 1) if rank == step.rank else slice(0, 0)

    def report(self) -> dict[str, float]:
        if not self.contrasts:
            return {}
        full = torch.stack([bank.full.float().mean() for bank in self.banks]).mean()
        similar = torch.stack([torch.stack(similarities(bank)) for bank in self.banks]).mean(dim=0)
        alike, apart = similar.tolist()
        return {"queues_full": float(full), "keys_alike": alike, "keys_apart": apart}


def similarities(bank: MemoryBank) -> tuple[Tensor, Tensor]:
    """Return the mean cosine of two keys of one class, and of two classes; 0 of no such two."""
    sums = bank.keys.sum(dim=1)  # (C, D); places that hold no key are 0
    count = bank.count.to(sums.dtype)
    pairs = count * (count - 1)
    within = ((sums.square().sum(dim=1) - count) / pairs.clamp(min=1))[pairs > 0]
    means = sums[bank.count > 0] / count[bank.count > 0, None]
    between = means @ means.T
    others = len(means) * (len(means) - 1)
    apart = (between.sum() - between.diagonal().sum()) / max(1, others)
    return within.sum() / max(1, len(within)), apart
