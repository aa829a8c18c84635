"""One step of training, in the order of the paper.

Teachers on the weak view (first, because ClassMix cuts by their labels) -> students on labelled and
unlabelled images (strong view) -> losses -> backward -> optimiser -> EMA -> teachers' features of
the labelled images into the banks.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctt.data import mixing
from ctt.data.random import generator
from ctt.data.source import IGNORE, DatasetInfo
from ctt.data.views import PhotometricView, constant
from ctt.methods import losses
from ctt.methods.base import Method
from ctt.models.base import Output
from ctt.train.settings import Settings
from ctt.train.state import TrainState, learning_rate

TERMS = ("sup", "ct", "hc", "lc")


class Target(NamedTuple):
    """What the teachers say of the unlabelled images, mixed as the images are: (B, H, W) each."""

    label: Tensor  # int64, 255 where there is no image
    confidence: Tensor  # probability


class Step:
    """Runs one step on a `TrainState`.

    Args:
        labeled: size of the labelled set, for the number of keys pushed a step.
    """

    def __init__(self, settings: Settings, method: Method, info: DatasetInfo, labeled: int) -> None:
        self.settings, self.method, self.info = settings, method, info
        views = settings.views
        self.photometric = PhotometricView(
            views.jitter, views.jitter_probability, views.blur_probability, views.blur_sigma
        )
        bank = settings.bank
        self.per_class = bank.per_class or max(1, bank.capacity // labeled)
        self.contrast = method.contrast and (settings.loss.hc > 0 or settings.loss.lc > 0)

    def __call__(
        self,
        state: TrainState,
        labeled: tuple[Tensor, Tensor],
        unlabeled: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Train on images (B, 3, H, W) uint8 with labels (B, H, W) uint8.

        Returns:
            each term of the objective, unweighted and summed over the students, and `total`.
        """
        rate = learning_rate(self.settings, state.iteration)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        images, label = to_unit(labeled[0]), labeled[1].long()
        terms = self._losses(state, images, label, unlabeled)
        total = self._weigh(terms, state.iteration)
        self._optimize(state, total)
        state.iteration += 1
        state.ema.step(state.iteration)
        if self.contrast:
            self._fill_banks(state, images, label)
        return {name: value.detach() for name, value in {**terms, "total": total}.items()}

    def _weigh(self, terms: dict[str, Tensor], iteration: int) -> Tensor:
        """Equation (10)."""
        weights = self.settings.loss
        ramp = min(1.0, (iteration + 1) / weights.ct_ramp) if weights.ct_ramp else 1.0
        factor = {"sup": weights.sup, "ct": weights.ct * ramp, "hc": weights.hc, "lc": weights.lc}
        return torch.stack([factor[name] * value for name, value in terms.items()]).sum()

    def _optimize(self, state: TrainState, total: Tensor) -> None:
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        if self.settings.optim.clip_norm:
            state.scaler.unscale_(state.optimizer)
            for student in state.students:
                nn.utils.clip_grad_norm_(student.parameters(), self.settings.optim.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()

    def _losses(
        self,
        state: TrainState,
        images: Tensor,
        label: Tensor,
        unlabeled: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Tensor]:
        rng = self._generator("mix", state.iteration, images.device)
        weak = images.new_empty(0, *images.shape[1:])
        targets: list[Target] = []
        if unlabeled is not None:
            weak = to_unit(unlabeled[0])
            targets, keep = self._targets(state, weak, unlabeled[1] == IGNORE, rng)
            weak = weak if keep is None else mixing.mix(weak, keep)
        outputs = self._forward_students(state, images, weak)
        size = len(images)
        terms = {
            "sup": sum_of(losses.pixel_cross_entropy(out.logits[:size], label) for out in outputs)
        }
        if unlabeled is not None:
            terms["ct"] = sum_of(
                self._cross_teacher(out.logits[size:], target)
                for out, target in zip(outputs, targets, strict=True)
            )
        if self.contrast:
            terms |= self._contrast(state, outputs, label, targets)
        return terms

    def _cross_teacher(self, logits: Tensor, target: Target) -> Tensor:
        """Equations (3)-(5)."""
        loss = self.settings.loss
        label, weight = losses.weigh_pseudo_label(
            *target, loss.confidence_weight, loss.confidence_threshold
        )
        return losses.pixel_cross_entropy(logits, label, weight)

    @torch.no_grad()
    def _targets(
        self, state: TrainState, weak: Tensor, padding: Tensor, rng: torch.Generator
    ) -> tuple[list[Target], Tensor | None]:
        """Each student's target, and which pixels of each image the mix keeps (None: all)."""
        normalized = self._normalize(weak)
        size = (weak.shape[-2], weak.shape[-1])
        probability = []  # of each teacher, (B, C, H, W)
        for teacher in state.teachers:
            with self._autocast(weak.device):
                logits = teacher(normalized).logits
            probability.append(losses.upsample(logits, size).softmax(dim=1))
        keep = self._mix_mask(torch.stack(probability).mean(dim=0), padding, rng)
        targets = []
        for k in range(state.pairs):
            chosen = [probability[j] for j in self.method.teachers_of(k, state.pairs)]
            confidence, label = torch.stack(chosen).mean(dim=0).max(dim=1)
            target = Target(label.masked_fill(padding, IGNORE), confidence)
            if keep is not None:
                target = Target(*(mixing.mix(values, keep) for values in target))
            targets.append(target)
        return targets, keep

    def _mix_mask(
        self, probability: Tensor, padding: Tensor, rng: torch.Generator
    ) -> Tensor | None:
        rule = self.settings.views.mix
        if rule == "none":
            return None
        if rule == "cutmix":
            batch, _, height, width = probability.shape
            return mixing.cutmix_mask((batch, height, width), rng, probability.device)
        label = probability.argmax(dim=1).masked_fill(padding, IGNORE)
        return mixing.classmix_mask(label, probability.shape[1], rng)

    def _forward_students(self, state: TrainState, images: Tensor, weak: Tensor) -> list[Output]:
        """Of labelled and unlabelled images together: one set of batch-norm statistics."""
        outputs = []
        views = self.settings.views
        for k, student in enumerate(state.students):
            purpose = f"strong-{k}" if views.per_student else "strong"
            rng = self._generator(purpose, state.iteration, images.device)
            labeled = self.photometric(images, rng) if views.strong_labeled else images
            strong = self.photometric(weak, rng) if len(weak) else weak
            batch = self._normalize(torch.cat([labeled, strong]))
            with self._autocast(images.device):
                outputs.append(student(batch))
        return outputs

    def _contrast(
        self, state: TrainState, outputs: list[Output], label: Tensor, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Equations (6)-(9), summed over the students."""
        loss, bank_settings = self.settings.loss, self.settings.bank
        zero = outputs[0].features.new_zeros((), dtype=torch.float32)
        high_terms, low_terms = [zero], [zero]
        if state.iteration < bank_settings.start_after:
            return {"hc": zero, "lc": zero}
        grid = (outputs[0].features.shape[-2], outputs[0].features.shape[-1])
        truth = losses.to_grid(label, grid)
        counts = losses.usable_counts(state.banks, bank_settings.start)
        # confidence and class that each student's own classifier gives on the grid
        own = [out.logits.detach().float().softmax(dim=1).max(dim=1) for out in outputs]
        for k, out in enumerate(outputs):
            target = Target(*(losses.to_grid(values, grid) for values in targets[k]))
            pixel_label = torch.cat([truth, target.label])  # (B, h, w)
            confidence = own[k].values
            decisive = confidence
            if loss.hc_confidence == "teacher":
                sure = torch.ones_like(truth, dtype=torch.float32)
                decisive = torch.cat([sure, target.confidence])
            high = losses.high_level_mask(decisive, loss.gamma)
            if loss.hc > 0:
                high_terms.append(
                    losses.high_level_contrast(
                        out.features,
                        pixel_label,
                        high,
                        state.banks[k],
                        counts[k],
                        loss.tau_hc,
                        loss.contrast_reduction,
                    )
                )
            peers = [j for j in range(state.pairs) if j != k] if loss.lc > 0 else []
            for j in peers:
                mask = losses.low_level_mask(high, confidence, own[j].values, loss.directional)
                low_terms.append(
                    losses.low_level_contrast(
                        out.features,
                        outputs[j].features,
                        own[j].indices,
                        mask & (pixel_label != IGNORE),
                        [(state.banks[i].keys, counts[i]) for i in (k, j)],
                        loss.tau_lc,
                        loss.contrast_reduction,
                    )
                    / len(peers)
                )
        return {"hc": sum_of(high_terms), "lc": sum_of(low_terms)}

    @torch.no_grad()
    def _fill_banks(self, state: TrainState, images: Tensor, label: Tensor) -> None:
        """Push teacher k's features of well classified labelled pixels into bank k."""
        settings = self.settings.bank
        normalized = self._normalize(images)
        rng = self._generator("bank", state.iteration, images.device)
        for teacher, bank in zip(state.teachers, state.banks, strict=True):
            with self._autocast(images.device):
                out = teacher(normalized)
            truth = losses.to_grid(label, (out.logits.shape[-2], out.logits.shape[-1]))
            confidence, predicted = out.logits.float().softmax(dim=1).max(dim=1)
            valid = (predicted == truth) & (confidence >= settings.min_confidence)
            size = 1 if settings.per_image else len(images)
            for first in range(0, len(images), size):
                part = slice(first, first + size)
                bank.push(
                    losses.as_pixels(out.features[part]),
                    truth[part].flatten(),
                    confidence[part].flatten(),
                    valid=valid[part].flatten(),
                    top_k=settings.top_k if settings.random_choice else self.per_class,
                    per_class=self.per_class,
                    generator=rng,
                )

    def _generator(self, purpose: str, iteration: int, device: torch.device) -> torch.Generator:
        return generator(purpose, self.settings.seed, iteration, device=device)

    def _autocast(self, device: torch.device) -> torch.autocast:
        amp = self.settings.train.amp
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")

    def _normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.info)


def to_unit(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 in 0..1."""
    return images.float() / 255


def normalize(images: Tensor, info: DatasetInfo) -> Tensor:
    """Images in 0..1 -> mean 0 and deviation 1 by the data set's statistics."""
    mean, std = (constant(v, images.device)[:, None, None] for v in (info.mean, info.std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def sum_of(values: object) -> Tensor:
    return torch.stack(list(values)).sum()  # type: ignore[call-overload]
