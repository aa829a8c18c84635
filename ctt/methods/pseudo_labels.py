"""What methods with hard pseudo-labels of mixed, strongly augmented images have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ctt.data.dataset import IGNORE
from ctt.data.views import PhotometricView
from ctt.methods import catalog, followers, losses
from ctt.methods.base import Batch, Method, Networks, Schedule, Setup, Step, Terms
from ctt.methods.mask_teacher import TERM, MaskTeacher
from ctt.models.base import Output


def sometimes(
    mix: Callable[[Tensor], Tensor], share: float | Tensor, step: Step
) -> Callable[[Tensor], Tensor]:
    """Return what mixes in this share of the steps, and changes nothing in the others."""
    does = step.rand("whether mixed", (1,), None) < share
    return lambda values: torch.where(does, mix(values), values)


class PseudoLabels(Method):
    """Students learn labels, and pseudo-labels that networks give to the unmixed weak view.

    A method of this kind says which networks give student k its pseudo-labels: `taught_by`, and
    `labelers`, which are the teachers unless it says otherwise. Every student has a teacher, if
    only to be evaluated.

    Batch, besides what every method has: `mixed` (B, 3, H, W); for each student k `label k` and
    `confidence k` (B, H, W), the pseudo-label, 255 where there is none, and its probability;
    `trusted k` (B, H, W), the label without the pixels below a threshold; `pixels`, `pixels k` and
    `weight k` (), and the numbers `draw k` (B, views, 7) of its strong views.
    """

    terms: tuple[str, ...] = ("sup", "ct")
    logged: tuple[str, ...] = ("lost_pixels",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        loss = self.settings.loss
        self.mix: str = self.settings.views.mix
        self.unlabeled_mean: str = loss.unlabeled_mean
        self.confidence_weight: str = loss.confidence_weight
        self.threshold = loss.confidence_threshold
        about = catalog.get(self.settings.method)
        self.after = about.steps_without_unlabeled(self.settings)
        self.teachers = followers.copies(self.students)
        self.ema = followers.EmaUpdate(self.teachers, self.students, self.settings.ema)
        self.masks: MaskTeacher | None = None
        if self.settings.masks.folder is not None:
            self.masks = MaskTeacher(self.settings.masks, self.settings.train.iterations)
            self.terms = (*self.terms, TERM)

    def taught_by(self, k: int) -> list[int]:
        """Return the labelers whose mean probability labels unlabelled images for student k."""
        raise NotImplementedError

    def teachings(self, probability: Sequence[Tensor]) -> Iterator[Tensor]:
        """Return the probabilities (B, C, H, W) that label unlabelled images for each student.

        Args:
            probability: of each labeler.
        """
        for k in range(len(self.students)):
            yield losses.mean_of([probability[j] for j in self.taught_by(k)])

    @property
    def labelers(self) -> Networks:
        """Return the networks that label; students do so in training mode, without gradient."""
        return self.teachers

    @property
    def learning(self) -> Sequence[int]:
        """Return the students that learn in this round."""
        return range(len(self.students))

    def schedules(self) -> dict[str, Schedule]:
        length = self.settings.loss.ct_ramp

        def ramp(iteration: int) -> float:
            return min(1.0, max(0, iteration - self.after + 1) / length) if length else 1.0

        return {
            "ramp": ramp,
            "decay": self.ema.decay,
            **({TERM: self.masks.weight} if self.masks is not None else {}),
        }

    def stage(self, iteration: int) -> int:
        return int(iteration >= self.after)

    def prepare(self, b: Batch, step: Step) -> Batch:
        """Add equations (3)-(5): labels of the unlabelled images, mixed as the images are."""
        if step.iteration < self.after:
            return b | {"pixels": step.count(b["label"])} | self.draws(b, step)
        padding = b["padding"]
        probability = [step.probability(net, b["unlabeled"]) for net in self.labelers]
        with step.phase("views"):
            mix = self.mixing(probability, padding, step)
            b = b | {"mixed": mix(b["unlabeled"]), "pixels": step.count(b["label"])}
            b |= self.draws(b, step)
            if self.masks is not None:
                b |= self.masks.mixed(b, mix, step)
            all_lost = []
            for k, taught in enumerate(self.teachings(probability)):
                confidence, label = taught.max(dim=1)
                # max of NaNs returns index 0, which would label these pixels as class 0
                lost = ~(confidence > 0)
                all_lost.append(lost)
                label = mix(label.masked_fill(padding | lost, IGNORE))
                confidence = mix(confidence.masked_fill(lost, 0))
                trusted, weight = losses.weigh_pseudo_label(
                    label, confidence, self.confidence_weight, self.threshold, step.total
                )
                b |= {f"label {k}": label, f"confidence {k}": confidence, f"trusted {k}": trusted}
                b[f"pixels {k}"] = self.divisor(trusted, label, step)
                if weight is not None:
                    b[f"weight {k}"] = weight
            self.log_lost(all_lost, padding, step)
        return b

    def log_lost(self, lost: Sequence[Tensor], padding: Tensor, step: Step) -> None:
        """Log the share of pixels (B, H, W) with NaN probabilities, the mean over the students."""
        seen = step.total((~padding).sum()).clamp(min=1)
        step.log("lost_pixels", torch.stack([(x & ~padding).sum() / seen for x in lost]).mean())

    def mixing(
        self, given: Sequence[Tensor], padding: Tensor, step: Step
    ) -> Callable[[Tensor], Tensor]:
        """Return what mixes images and labels, see `Step.mixer`."""
        return step.mixer(given, padding, self.mix)

    def divisor(self, trusted: Tensor, label: Tensor, step: Step) -> Tensor:
        """Return what the sum over pseudo-labelled pixels is divided by, see `unlabeled_mean`."""
        if self.unlabeled_mean == "all":
            return step.total(torch.ones_like(label).sum())
        return step.count(trusted if self.unlabeled_mean == "kept" else label)

    def draws(self, b: Batch, step: Step, unlabeled: int = 1) -> Batch:
        """Return the numbers of every student's strong views: `labeled draw k` (B, numbers), if
        labelled images have such views, and `draw k` (B, views, numbers).

        Args:
            unlabeled: views of each unlabelled image.
        """
        views, draws = self.settings.views, {}
        numbers = PhotometricView.DRAWS if views.grey_probability else PhotometricView.DRAWS - 1
        kinds: dict[str, tuple[int, ...]] = {}
        if views.strong_labeled:
            kinds["labeled draw"] = (numbers, len(b["images"]))
        if unlabeled:
            # a step asks for as many numbers as the one before, also while these have not joined
            given = b.get("unlabeled")
            images = self.settings.data.unlabeled_images if given is None else len(given)
            kinds["draw"] = (unlabeled, numbers, images)
        for k in range(len(self.students)):
            name = f"strong-{k}" if views.per_student else "strong"
            for kind, draw in zip(
                kinds, step.rand_each(name, list(kinds.values()), -1), strict=True
            ):
                draws[f"{kind} {k}"] = draw.movedim(-1, 0)
        return draws

    def ask_students(self, b: Batch, step: Step) -> list[Output]:
        """Return the output of each that learns for labelled and mixed images, in one batch."""
        out = []
        for k in self.learning:
            images = [self.labeled_view(k, b, step)]
            if "mixed" in b:
                images.append(self.unlabeled_view(k, b, step))
            out.append(step.forward(self.students[k], torch.cat(images)))
        return out

    def labeled_view(self, k: int, b: Batch, step: Step) -> Tensor:
        """Return the labelled images as student k sees them."""
        if not self.settings.views.strong_labeled:
            return b["images"]
        return step.strong(b["images"], b[f"labeled draw {k}"])

    def unlabeled_view(self, k: int, b: Batch, step: Step) -> Tensor:
        """Return the mixed images as student k sees them."""
        return step.strong(b["mixed"], b[f"draw {k}"][:, -1])

    def losses(self, b: Batch, step: Step) -> Terms:
        return self.cross_entropies(self.ask_students(b, step), b, step)

    def cross_entropies(self, out: Sequence[Output], b: Batch, step: Step) -> Terms:
        """Return equations (1)-(5), summed over the students."""
        n, sup, ct, external = len(b["images"]), [], [], []
        with step.phase("cross-entropy"):
            for k, o in zip(self.learning, out, strict=True):
                sup.append(self.labeled(o.logits[:n], self.students[k].grid, b, step))
                if "mixed" in b:
                    ct.append(self.unlabeled_loss(k, o.logits[n:], b))
                    if self.masks is not None:
                        external.append(self.masks.loss(o.logits[n:], self.students[k].grid, b))
            terms: Terms = {"sup": (self.settings.loss.sup, losses.sum_of(sup))}
            if ct:
                terms["ct"] = (self.unlabeled_weight(step), losses.sum_of(ct))
            if external:
                terms[TERM] = (step[TERM], losses.sum_of(external))
        return terms

    def unlabeled_weight(self, step: Step) -> float | Tensor:
        """Return the weight of what students learn from unlabelled images."""
        return self.settings.loss.ct * step["ramp"]

    def unlabeled_loss(self, k: int, logits: Tensor, b: Batch) -> Tensor:
        """Return what student k learns from the mixed images, of which it gives the logits."""
        taught = (b[f"trusted {k}"], b[f"pixels {k}"], b.get(f"weight {k}"))
        return losses.pixel_cross_entropy(logits, self.students[k].grid, *taught)

    def after_step(self, b: Batch, step: Step) -> None:
        with step.phase("ema"):
            self.ema.step(step["decay"])
