"""What methods with hard pseudo-labels of mixed, strongly augmented images have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ctt.data.source import IGNORE
from ctt.data.views import PhotometricView
from ctt.methods import followers, losses
from ctt.methods.base import Batch, Method, Networks, Schedule, Setup, Step, Terms
from ctt.models.base import Output


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
        self.teachers = followers.copies(self.students)
        self.ema = followers.EmaUpdate(self.teachers, self.students, self.settings.ema)

    def taught_by(self, k: int) -> list[int]:
        """Return the labelers whose mean probability labels unlabelled images for student k."""
        raise NotImplementedError

    @property
    def labelers(self) -> Networks:
        """The networks that label; students do so in training mode, without gradient."""
        return self.teachers

    def schedules(self) -> dict[str, Schedule]:
        ramp = self.settings.loss.ct_ramp
        return {
            "ramp": lambda iteration: min(1.0, (iteration + 1) / ramp) if ramp else 1.0,
            "decay": self.ema.decay,
        }

    def prepare(self, b: Batch, step: Step) -> Batch:
        """Equations (3)-(5): labels of the unlabelled images, mixed as the images are."""
        loss, padding = self.settings.loss, b["padding"]
        probability = [step.probability(net, b["unlabeled"]) for net in self.labelers]
        with step.phase("views"):
            mix = step.mixer(probability, padding)
            b = b | {"mixed": mix(b["unlabeled"]), "pixels": step.count(b["label"])}
            b |= self.draws(len(padding), step)
            seen, shares = step.total((~padding).sum()).clamp(min=1), []
            for k in range(len(self.students)):
                chosen = [probability[j] for j in self.taught_by(k)]
                confidence, label = losses.mean_of(chosen).max(dim=1)
                # the largest of numbers that are none would be class 0, at index 0
                lost = ~(confidence > 0)
                shares.append((lost & ~padding).sum() / seen)
                label = mix(label.masked_fill(padding | lost, IGNORE))
                confidence = mix(confidence.masked_fill(lost, 0))
                trusted, weight = losses.weigh_pseudo_label(
                    label, confidence, loss.confidence_weight, loss.confidence_threshold, step.total
                )
                b |= {f"label {k}": label, f"confidence {k}": confidence, f"trusted {k}": trusted}
                b[f"pixels {k}"] = step.count(trusted)
                if weight is not None:
                    b[f"weight {k}"] = weight
            step.log("lost_pixels", torch.stack(shares).mean())
        return b

    def draws(self, images: int, step: Step, unlabeled: bool = True) -> Batch:
        """Return the numbers of every student's strong views, of labelled images first."""
        views, b = self.settings.views, {}
        kinds = views.strong_labeled + unlabeled
        for k in range(len(self.students)):
            name = f"strong-{k}" if views.per_student else "strong"
            draw = step.rand(name, (kinds, PhotometricView.DRAWS, images), 2)
            b[f"draw {k}"] = draw.movedim(2, 0)
        return b

    def ask_students(self, b: Batch, step: Step) -> list[Output]:
        """Return each student's output for labelled and mixed images, in one batch."""
        out = []
        for k, student in enumerate(self.students):
            images, draw = [b["images"]], b[f"draw {k}"]
            if self.settings.views.strong_labeled:
                images = [step.strong(b["images"], draw[:, 0])]
            if "mixed" in b:
                images.append(step.strong(b["mixed"], draw[:, -1]))
            out.append(step.forward(student, torch.cat(images)))
        return out

    def losses(self, b: Batch, step: Step) -> Terms:
        return self.cross_entropies(self.ask_students(b, step), b, step)

    def cross_entropies(self, out: Sequence[Output], b: Batch, step: Step) -> Terms:
        """Equations (1)-(5), summed over the students."""
        n, w, sup, ct = len(b["images"]), self.settings.loss, [], []
        with step.phase("cross-entropy"):
            for k, (o, student) in enumerate(zip(out, self.students, strict=True)):
                logits, stride = o.logits, student.stride
                args = (b["label"], b["pixels"])
                sup.append(losses.pixel_cross_entropy(logits[:n], stride, *args))
                if "mixed" in b:
                    taught = (b[f"trusted {k}"], b[f"pixels {k}"], b.get(f"weight {k}"))
                    ct.append(losses.pixel_cross_entropy(logits[n:], stride, *taught))
            terms: Terms = {"sup": (w.sup, losses.sum_of(sup))}
            if ct:
                terms["ct"] = (w.ct * step["ramp"], losses.sum_of(ct))
        return terms

    def after_step(self, b: Batch, step: Step) -> None:
        with step.phase("ema"):
            self.ema.step(step["decay"])
