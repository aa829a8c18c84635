"""U2PL (Wang et al., CVPR 2022, arXiv 2203.03884): unreliable pseudo-labels as negatives.

A mean teacher labels the weak view; pixels of the highest entropy, a share that falls to 0 over the
run, teach no class. Features of a representation head are contrasted: anchors of a class, pixels
that the teacher is fairly sure of, with the mean of the teacher's features of the class, and with
negatives out of the class's queue: pixels that are surely not of the class. These are labelled
pixels of other classes that the teacher takes for likely to be of it, and unlabelled pixels of high
entropy for which the class is an unlikely one.

This is the paper's rule; in the program, conditions that contradict each other leave the queues all
but empty. The teacher is in evaluation mode and an average from the first step on; in the program
its features and entropies are those of training mode, and it is one from the second phase on. Keys
are pushed from the first step on, also while students learn from labels alone; in the program in
the second phase alone. The head, on the features that the classifier reads and as wide as they are,
is a 3x3 convolution with batch norm and ReLU, and a 1x1 convolution; the program's, beside a
classifier of the same kind, has two 3x3 convolutions and a 1x1, of 256 channels, with dropout of
0.1. Means are of normalised features. Queues are shorter than the program's 30,000. The contrast is
the mean over the classes that have anchors and negatives; in the program those without count as 0.
The program changes no colours: --views.jitter 0 --views.blur-probability 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.methods import losses, sampling
from ctt.methods.base import Batch, Modules, Schedule, Setup, Step, Terms
from ctt.methods.class_memory import negatives
from ctt.methods.heads import EmbeddingTeacher, embed, normed_embedding, without_lost
from ctt.methods.losses import to_grid
from ctt.methods.options import Options
from ctt.methods.pseudo_labels import sometimes
from ctt.methods.sampling import entropy, quantile, tickets
from ctt.models.base import Output, upsample, wide
from ctt.ops import MemoryBank
from ctt.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE


@dataclass(frozen=True)
class U2plOptions(Options):
    """Settings of U2PL; the defaults are those of the authors' program for VOC, unless said."""

    unlabeled: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the pseudo-labels."""
    contrast: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the contrast (0.1 in the paper)."""
    start: Annotated[float, SHARE] = 0.0125
    """Share of the run that learns from labels alone (one of 80 epochs)."""
    drop: Annotated[float, SHARE] = 0.2
    """Share of the pixels of highest entropy that teach no class at the start; it falls to 0. The
    same share of the lowest entropy are anchors, and of the highest negatives."""
    mix: Literal["half-width", "classmix-fewer", "none"] = "half-width"
    """How unlabelled images are mixed, in half of the steps."""
    sure: Annotated[float, SHARE] = 0.3
    """Probability of its class that an anchor needs from the teacher."""
    likely: Annotated[int, AT_LEAST_0] = 3
    """Classes of which the teacher may take a labelled pixel to be, to be a negative of them. An
    unlabelled pixel is a negative of the classes after these but the least probable one: of none if
    the data has at most one class more than this."""
    anchors: Annotated[int, AT_LEAST_1] = 256
    """Anchors of a class and step."""
    negatives: Annotated[int, AT_LEAST_1] = 50
    """Negatives of an anchor."""
    capacity: Annotated[int, AT_LEAST_1] = 1024
    """Keys in the queue of a class (30,000 in the program)."""
    pushed: Annotated[int, AT_LEAST_1] = 256
    """Keys that a class takes at most in a step (not in the program)."""
    temperature: Annotated[float, ABOVE_0] = 0.5


class U2pl(EmbeddingTeacher):
    """A mean teacher whose unsure pixels are negatives.

    Batch, besides that of `PseudoLabels`: for each student k `class k` (B, h, w), of pixels of the
    labelled images, and `slot k`, their numbers among the anchors of the class; `class k mixed` and
    `slot k mixed`, those of the mixed images; in every labelled image alike `positive k` (B, C, D),
    and `drawn k` (B, C), how many anchors there are.
    """

    terms = ("sup", "ct", "contrast")
    options: U2plOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.confidence_weight, self.classes = "none", setup.classes
        self.add_heads(setup, lambda dim: normed_embedding(dim, 3))
        self.banks = Modules[MemoryBank](
            MemoryBank(setup.classes, self.options.capacity, student.feature_channels)
            for student in self.students
        )

    def schedules(self) -> dict[str, Schedule]:
        total, o = self.settings.train.iterations, self.options
        return super().schedules() | {
            "on": lambda i: float(i >= o.start * total),
            "drop": lambda i: o.drop * (1 - i / total),
        }

    def prepare(self, b: Batch, step: Step) -> Batch:
        padding, n = b["padding"], len(b["images"])
        b = b | {"pixels": step.count(b["label"])} | self.draws(b, step)
        given = [step.probability(teacher, b["unlabeled"]) for teacher in self.teachers]
        mix = sometimes(step.mixer(given, padding, self.options.mix), 0.5, step)
        b["mixed"] = mix(b["unlabeled"])
        lost = [~(p.amax(dim=1) > 0) for p in given]  # where the probabilities are NaN
        self.log_lost(lost, padding, step)
        for k, p in enumerate(given):
            label = mix(p.max(dim=1).indices.masked_fill(padding | lost[k], IGNORE))
            out = step.forward(self.teachers[k], torch.cat([b["images"], b["mixed"]]))
            size = (padding.shape[-2], padding.shape[-1])
            scores = upsample(out.logits[n:], size, self.teachers[k].grid)
            unsure = entropy(scores)
            top = quantile(unsure, label != IGNORE, 1 - step["drop"], step)
            b[f"trusted {k}"] = label.masked_fill(unsure >= top, IGNORE)
            # the mean over the pixels kept, and larger by the share that is dropped
            kept = step.count(b[f"trusted {k}"])
            b[f"pixels {k}"] = kept * kept / step.count(label)
            b |= self.samples(k, out, b["label"], label, step)
        return b

    def samples(self, k: int, out: Output, truth: Tensor, label: Tensor, step: Step) -> Batch:
        """Choose anchors and positives, and push negatives.

        Args:
            out: of the teacher, for labelled and mixed images.
            truth, label: of these, (B, H, W).
        """
        o, grid, n = self.options, self.students[k].grid, len(truth)
        maps = embed(self.head_teachers[k], out.features, step)
        own = torch.cat([to_grid(truth, grid), to_grid(label, grid)])
        maps, own = without_lost(maps, out.logits, own)
        features = losses.as_pixels(maps)  # ((B + U) * h * w, D)
        p = wide(out.logits).softmax(dim=1)
        truth, label = own.tensor_split((n,))
        unsure, valid = entropy(wide(out.logits[n:])), label != IGNORE
        low = quantile(unsure, valid, step["drop"], step)
        high = quantile(unsure, valid, 1 - step["drop"], step)
        own = torch.cat([truth, label.masked_fill(unsure > low, IGNORE)])  # (B + U, h, w)
        member = sampling.class_members(own, self.classes)
        positive = sampling.class_means(features, member, step)
        anchor = member & (o.sure < losses.as_pixels(p).T)
        ticket = tickets(f"anchors {k}", own, n, step)
        slot, drawn = sampling.numbered(anchor, o.anchors, ticket, step)
        negative = negatives(p, own, valid & (unsure >= high), o.likely)
        ticket = tickets(f"pushed {k}", own, n, step)
        sampling.push(self.banks[k], negative, features, o.pushed, ticket, step)
        return {
            **by_kind(f"slot {k}", slot.view_as(own), n),
            **by_kind(f"class {k}", own, n),
            f"positive {k}": F.normalize(positive, dim=1).expand(n, -1, -1),
            f"drawn {k}": drawn.expand(n, -1),
        }

    def unlabeled_weight(self, step: Step) -> float | Tensor:
        return self.options.unlabeled * step["on"]

    def losses(self, b: Batch, step: Step) -> Terms:
        out = self.ask_students(b, step)
        terms = self.cross_entropies(out, b, step)
        with step.phase("contrast"):
            values = [self.contrast(k, o, b, step) for k, o in enumerate(out)]
            terms["contrast"] = (self.options.contrast * step["on"], losses.sum_of(values))
        return terms

    def contrast(self, k: int, out: Output, b: Batch, step: Step) -> Tensor:
        """Return the InfoNCE loss: the mean over the anchors of each class, then over the
        classes."""
        o, bank = self.options, self.banks[k]
        own, slot = (
            torch.cat([b[f"{name} {k}"], b[f"{name} {k} mixed"]]) for name in ("class", "slot")
        )
        maps = embed(self.heads[k], out.features, step)
        anchors, there = sampling.sample_of(maps, own, slot, self.classes, o.anchors)
        draw = step.rand(f"negatives {k}", (*there.shape, o.negatives), None)
        loss = sampling.sampled_info_nce(anchors, b[f"positive {k}"][0], bank, draw, o.temperature)
        count = b[f"drawn {k}"][0]  # (C,), of all processes
        present = (count > 0) & (bank.count > 0)
        loss = loss.masked_fill(~(there & present[:, None]), 0).sum(dim=1)
        return (loss / count.clamp(min=1)).sum() / present.sum().clamp(min=1)


def by_kind(name: str, values: Tensor, labeled: int) -> Batch:
    """Return values of the labelled images, which come first, and of the mixed ones by names."""
    return {name: values[:labeled], f"{name} mixed": values[labeled:]}
