"""The step as research programs tend to write it: loops over classes, indexing by masks, an update
of the teachers one parameter at a time, single precision, and a host that waits for the device."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.models.base import Output, SegmentationModel
from ctt.settings import Settings

Batch = tuple[Tensor, Tensor]


class PlainStep:
    """Two pairs, trained on normalised images (B, 3, H, W) with labels (B, H, W) int64."""

    def __init__(self, settings: Settings, students: list[SegmentationModel], classes: int) -> None:
        self.settings, self.classes = settings, classes
        self.students, self.stride = students, students[0].stride
        self.teachers = [copy.deepcopy(s).requires_grad_(False).eval() for s in students]
        optim = settings.optim
        self.optimizers = [
            torch.optim.SGD(
                s.parameters(), optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
            )
            for s in students
        ]
        device = next(students[0].parameters()).device
        size = (classes, settings.bank.capacity, settings.model.features)
        self.banks = [F.normalize(torch.randn(size, device=device), dim=2) for _ in students]
        self.cursors = [[0] * classes for _ in students]

    def __call__(self, labeled: Batch, weak: Tensor, strong: Tensor) -> dict[str, float]:
        images, label = labeled
        weights = self.settings.loss
        with torch.no_grad():
            size = label.shape[1:]
            pseudo = [self._upsample(t(weak).logits, size).argmax(1) for t in self.teachers]
        outputs = [student(torch.cat([images, strong])) for student in self.students]
        shown: dict[str, float] = {}
        for k, out in enumerate(outputs):
            logits = self._upsample(out.logits, label.shape[1:])
            targets = torch.cat([label, pseudo[1 - k]])
            sup = F.cross_entropy(logits[: len(label)], label, ignore_index=IGNORE)
            ct = F.cross_entropy(logits[len(label) :], pseudo[1 - k], ignore_index=IGNORE)
            hc, lc = self._contrast(k, outputs, targets)
            loss = weights.sup * sup + weights.ct * ct + weights.hc * hc + weights.lc * lc
            self.optimizers[k].zero_grad()
            loss.backward(retain_graph=k == 0)
            shown[f"loss_{k}"] = loss.item()
        for optimizer in self.optimizers:
            optimizer.step()
        for teacher, student in zip(self.teachers, self.students, strict=True):
            self._follow(teacher, student)
        with torch.no_grad():
            for k, teacher in enumerate(self.teachers):
                self._push(k, teacher(images), label)
        return shown

    def _upsample(self, logits: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)

    def _contrast(self, k: int, outputs: list[Output], targets: Tensor) -> tuple[Tensor, Tensor]:
        weights, n = self.settings.loss, self.settings.loss.contrast_stride
        label = targets[:, :: n * self.stride, :: n * self.stride].flatten()
        out, peer = (Output(*(x[..., ::n, ::n] for x in outputs[j])) for j in (k, 1 - k))
        pixels = out.features.permute(0, 2, 3, 1).flatten(0, 2)
        others = peer.features.detach().permute(0, 2, 3, 1).flatten(0, 2)
        confidence = out.logits.softmax(1).amax(1).flatten()
        peer_confidence, peer_class = peer.logits.softmax(1).max(1)
        high = confidence >= weights.gamma
        low = ~high & (confidence < peer_confidence.flatten())
        hc, lc = [], []
        for c in range(self.classes):
            rest = torch.arange(self.classes, device=label.device) != c
            chosen = pixels[(label == c) & high]
            if len(chosen):
                chosen = F.normalize(chosen, dim=1)
                positive = torch.exp(chosen @ self.banks[k][c].T / weights.tau_hc)
                negative = torch.exp(chosen @ self.banks[k][rest].flatten(0, 1).T / weights.tau_hc)
                share = positive / (positive + negative.sum(1, keepdim=True))
                hc.append(-share.log().mean())
            here = (peer_class.flatten() == c) & low
            if here.any():
                chosen, match = F.normalize(pixels[here], dim=1), F.normalize(others[here], dim=1)
                keys = torch.cat([bank[rest].flatten(0, 1) for bank in self.banks])
                positive = torch.exp((chosen * match).sum(1) / weights.tau_lc)
                negative = torch.exp(chosen @ keys.T / weights.tau_lc).sum(1)
                lc.append(-(positive / (positive + negative)).log().mean())
        zero = pixels.new_zeros(())
        return (sum(hc, zero) / max(1, len(hc)), sum(lc, zero) / max(1, len(lc)))

    def _follow(self, teacher: nn.Module, student: nn.Module) -> None:
        decay = self.settings.ema.decay
        for mean, own in zip(teacher.parameters(), student.parameters(), strict=True):
            mean.data = decay * mean.data + (1 - decay) * own.data
        for mean, own in zip(teacher.buffers(), student.buffers(), strict=True):
            mean.data.copy_(own.data)

    def _push(self, k: int, out: Output, label: Tensor) -> None:
        settings = self.settings.bank
        truth = label[:, :: self.stride, :: self.stride]
        confidence, predicted = out.logits.softmax(1).max(1)
        pixels = out.features.permute(0, 2, 3, 1)
        for c in range(self.classes):
            mask = (truth == c) & (predicted == c)
            if mask.any():
                best = confidence[mask].topk(min(settings.top_k, int(mask.sum()))).indices
                best = best[torch.randperm(len(best), device=best.device)[:1]]
                for key in F.normalize(pixels[mask][best], dim=1):
                    self.banks[k][c, self.cursors[k][c]] = key
                    self.cursors[k][c] = (self.cursors[k][c] + 1) % settings.capacity
