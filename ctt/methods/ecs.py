"""Our reading of ECS, error-correcting supervision (Mendel et al., ECCV 2020).

There is no public program, and this follows what the abstract says: no number may be compared with
the paper's. A correction network sees an image and the student's class map of it. It learns on
labelled images to tell which pixels are right and to name the class of the others, and, as a
regulariser, the student learns to be found right there. On unlabelled images the student learns its
own class where the correction network finds it right and the network's class elsewhere, each pixel
weighted by the certainty of that finding.

Ours are the rest: the correction network is a second network of the run's kind and weights, whose
first convolution also reads the class map and which has one class more, "as predicted"; it is
trained as students are; the weights of the terms and the ramp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.methods import losses, ramps
from ctt.methods.base import Batch, Schedule, Setup, Step
from ctt.methods.critics import Judged, counted, frozen
from ctt.methods.optim import make_optimizer
from ctt.methods.options import Options
from ctt.models.base import BackboneModel, Grid, Output, SegmentationModel, upsample
from ctt.ranges import AT_LEAST_0, SHARE


@dataclass(frozen=True)
class EcsOptions(Options):
    """The paper's values are not known to us; these are ours."""

    agreement: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of being found right on labelled images."""
    semi: Annotated[float, AT_LEAST_0] = 1.0
    """Final weight of the corrected labels of unlabelled images."""
    ramp: Annotated[float, SHARE] = 0.1
    """Share of the run over which that weight rises, along a sigmoid."""


class Ecs(Judged):
    """Each student has a correction network of its own."""

    terms = ("sup", "agreement", "semi", "corrector")
    logged = ("corrected",)
    options: EcsOptions

    def new_critic(self, setup: Setup, k: int) -> SegmentationModel:
        """Return a network that reads C channels more than an image has and gives C + 1 scores."""
        network = setup.student(k, attempt=1)
        old = network.classifier
        network.classifier = nn.Conv2d(old.in_channels, setup.classes + 1, 1).to(old.weight)
        convolutions = (m for m in network.modules() if isinstance(m, nn.Conv2d))
        first = next(m for m in convolutions if m.in_channels == setup.info.channels)
        read = first.weight.new_empty(first.out_channels, setup.classes, *first.kernel_size)
        nn.init.kaiming_normal_(read)
        whole = torch.cat([first.weight.detach(), read], dim=1)
        first.weight = nn.Parameter(whole.contiguous(memory_format=torch.channels_last))
        first.in_channels += setup.classes
        if isinstance(network, BackboneModel) and network.own_input:
            # the backbone's own normalisation is one of the image's channels alone
            network.widen_own_input(setup.classes)
        return network

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {**super().optimizers(), "critics": make_optimizer(self.critics, self.settings)}

    def schedules(self) -> dict[str, Schedule]:
        total, length = self.settings.train.iterations, self.options.ramp
        return {"ramp": lambda iteration: ramps.sigmoid(iteration / total, length)}

    def weights(self, step: Step) -> dict[str, float | Tensor]:
        sup, o = self.settings.loss.sup, self.options
        semi = o.semi * step["ramp"]
        return {"sup": sup, "agreement": o.agreement, "semi": semi, "corrector": 1.0}

    def prepare(self, b: Batch, step: Step) -> Batch:
        return counted(b, step)

    def of_student(self, k: int, b: Batch, step: Step) -> dict[str, Tensor]:
        label, n, student = b["label"], len(b["label"]), self.students[k]
        corrector = self.critics[k]
        assert isinstance(corrector, SegmentationModel)
        grid = corrector.grid
        images = torch.cat([b["images"], b["unlabeled"]])
        logits = step.forward(student, images).logits
        size = (label.shape[-2], label.shape[-1])
        scores = upsample(logits, size, student.grid)  # (2B, C, H, W)
        seen, probability = step.normalize(images), scores.softmax(dim=1)

        def findings(network: Callable[..., Any], maps: Tensor) -> Tensor:
            with step.phase("critics"), step.autocast():
                out: Output = network(torch.cat([seen, maps], dim=1))
            return upsample(out.logits, size, grid)  # (2B, C + 1, H, W)

        as_predicted, own = scores.shape[1], scores.max(dim=1).indices
        right = torch.where(label == IGNORE, IGNORE, as_predicted)
        truth = torch.where(own[:n] == label, as_predicted, label)
        found = findings(frozen(corrector), probability)
        predicted = findings(corrector, probability.detach())
        certainty, answer = found[n:].detach().softmax(dim=1).max(dim=1)
        other = answer != as_predicted
        step.log("corrected", (other & ~b["padding"]).sum() / b["seen"] / len(self.students))
        target = torch.where(other, answer, own[n:]).masked_fill(b["padding"], IGNORE)
        semi = F.cross_entropy(scores[n:], target, ignore_index=IGNORE, reduction="none")
        sup = self.labeled(logits[:n], student.grid, b, step)
        return {
            "sup": sup,
            "agreement": losses.pixel_cross_entropy(found[:n], Grid(1), right, b["pixels"]),
            "semi": (semi * certainty).sum() / b["seen"],
            "corrector": losses.pixel_cross_entropy(predicted[:n], Grid(1), truth, b["pixels"]),
        }
