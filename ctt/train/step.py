"""One step of training, in the order of the paper.

Teachers on the weak view (first, because ClassMix cuts by their labels) -> students on labelled and
unlabelled images (strong view) -> losses -> backward -> optimiser -> EMA -> teachers' features of
the labelled images into the banks.

Nothing here waits for a GPU. What a step computes depends on the tensors it is given and on those
of the state alone, so that it can be recorded and replayed as a CUDA graph.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctt.data import mixing
from ctt.data.seeding import derive_seed
from ctt.data.source import IGNORE, DatasetInfo
from ctt.data.views import PhotometricView, constant
from ctt.methods import losses
from ctt.methods.base import Method
from ctt.models.base import Output, SegmentationModel, upsample
from ctt.train.distributed import World
from ctt.train.draws import Draws, StepDraws
from ctt.train.feed import Batch
from ctt.train.phases import Phases
from ctt.train.replay import Replay
from ctt.train.settings import Settings
from ctt.train.state import TrainState, learning_rate

TERMS = ("sup", "ct", "hc", "lc")
LOST = "lost_pixels"  # share of unlabelled pixels for which a teacher gave no finite probability


class Target(NamedTuple):
    """What the teachers say of the unlabelled images, mixed as the images are: (B, H, W) each."""

    label: Tensor  # int64, 255 where there is no image
    confidence: Tensor  # probability


class Lesson(NamedTuple):
    """What a student learns of unlabelled images: equations (3)-(5)."""

    target: Target
    label: Tensor  # (B, H, W) int64, 255 also where the target is not trusted
    pixels: Tensor  # (), those of the whole batch that are not 255
    weight: Tensor | None  # (), factor of the loss
    lost: Tensor  # (), share of the batch's pixels without a label, as a teacher gave no number


class Part(NamedTuple):
    """What the students look at at once: the batch, or a share of it.

    Attributes:
        images, label: labelled, (b, 3, H, W) in 0..1 and (b, H, W). mixed: unlabelled images.
        lessons: of each student, on the mixed images; empty where there are none.
        draws_labeled, draws_mixed: (7, b) for the strong view of each student.
    """

    images: Tensor
    label: Tensor
    mixed: Tensor
    lessons: list[Lesson]
    draws_labeled: list[Tensor]
    draws_mixed: list[Tensor]


class Pace(NamedTuple):
    """What changes with the iteration alone; tensors of shape () where a graph is to read them."""

    rate: float | Tensor  # learning rate
    ramp: float | Tensor  # factor on the weight of the cross-teacher term
    decay: float | Tensor  # of the teachers


PACE_DTYPES = (torch.float32, torch.float32, torch.float64)  # of a tensor that a graph reads


class Step:
    """Runs one step on a `TrainState`.

    Args:
        labeled: size of the labelled set, for the number of keys pushed a step.
        device: that of the state. world: the processes that share the batch; None: this one alone.
    """

    def __init__(
        self,
        settings: Settings,
        method: Method,
        info: DatasetInfo,
        labeled: int,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        self.settings, self.method, self.info = settings, method, info
        self.world = world or World()
        views = settings.views
        self.photometric = PhotometricView(
            views.jitter, views.jitter_probability, views.blur_probability, views.blur_sigma
        )
        bank = settings.bank
        self.per_class = bank.per_class or max(1, bank.capacity // labeled)
        self.contrast = method.contrast and (settings.loss.hc > 0 or settings.loss.lc > 0)
        self.phases = Phases(device)
        self._replay = Replay()

    def __call__(
        self, state: TrainState, labeled: Batch, unlabeled: Batch | None
    ) -> dict[str, Tensor]:
        """Train on images (B, 3, H, W) uint8 with labels (B, H, W) uint8.

        With several processes these are the images of this one. With `train.accumulate` N they go
        through the students in N parts, one after the other, before the optimiser's step.

        Returns:
            each term of the objective, unweighted and summed over the students, `total`, and, with
            unlabelled images, `lost_pixels`, the share of their pixels that no student learns from
            because the teacher's probabilities are not finite; with several processes this one's
            part of them.
        """
        with self.phases("views"):
            draws = self._draws(state, len(labeled[0]), unlabeled is not None)
            numbers = upload(draws(state.iteration), self.phases.device)
        # layers that draw numbers, such as dropout, do so alike after a resume
        seed = derive_seed("layers", draws.seed, state.iteration, self.world.rank)
        if self.phases.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:  # torch.manual_seed takes milliseconds to note it for GPUs that may come
            torch.default_generator.manual_seed(seed)
        contrast = self.contrast and state.iteration >= self.settings.bank.start_after
        pace = self._pace(state)
        if self.settings.train.cuda_graph:
            inputs = [*labeled, *(unlabeled or ()), numbers]
            terms = self._replayed(state, inputs, draws, pace, contrast)
        else:
            terms = self._run(state, labeled, unlabeled, draws.split(numbers), pace, contrast)
        state.iteration += 1
        state.drawn += len(labeled[0]) * self.world.size
        return terms

    def _replayed(
        self, state: TrainState, inputs: list[Tensor], draws: Draws, pace: Pace, contrast: bool
    ) -> dict[str, Tensor]:
        """`_run` as a CUDA graph, recorded anew when the contrast joins."""

        def body(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
            *batches, numbers, rate, ramp, decay = tensors
            unlabeled = (batches[2], batches[3]) if len(batches) > 2 else None
            pace = Pace(rate, ramp, decay)
            labeled = (batches[0], batches[1])
            return self._run(state, labeled, unlabeled, draws.split(numbers), pace, contrast)

        numbers = [
            torch.full((), float(value), dtype=dtype, device=self.phases.device)
            for value, dtype in zip(pace, PACE_DTYPES, strict=True)
        ]
        return self._replay(contrast, [*inputs, *numbers], body)

    def _draws(self, state: TrainState, images: int, unlabeled: bool) -> Draws:
        pushes = images * self.world.size if self.settings.bank.per_image else 1
        return Draws(
            self.settings,
            state.pairs,
            len(self.info.classes),
            images,
            unlabeled,
            pushes if self.contrast and self._draws_keys else 0,
            self.world.rank,
            self.world.size,
        )

    @property
    def _draws_keys(self) -> bool:
        bank = self.settings.bank
        return bank.random_choice and bank.top_k > self.per_class

    def _pace(self, state: TrainState) -> Pace:
        ramp, iteration = self.settings.loss.ct_ramp, state.iteration
        return Pace(
            learning_rate(self.settings, iteration),
            min(1.0, (iteration + 1) / ramp) if ramp else 1.0,
            state.ema.decay(iteration + 1),
        )

    def _run(
        self,
        state: TrainState,
        labeled: Batch,
        unlabeled: Batch | None,
        draws: StepDraws,
        pace: Pace,
        contrast: bool,
    ) -> dict[str, Tensor]:
        images, label = to_unit(labeled[0]), labeled[1].long()  # (B, 3, H, W), (B, H, W)
        mixed = images.new_empty(0, *images.shape[1:])
        lessons: list[Lesson] = []
        if unlabeled is not None:
            mixed, lessons = self._teach(
                state, to_unit(unlabeled[0]), unlabeled[1] == IGNORE, draws.mix
            )
        whole = Part(images, label, mixed, lessons, draws.labeled, draws.unlabeled)
        pixels = losses.valid_pixels(label, self.world.total)
        state.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        parts = self.settings.train.accumulate
        for i, part in enumerate(split(whole, parts)):
            with state.keep_gradients(i < parts - 1):
                terms = self._losses(state, part, pixels, contrast)
                terms["total"] = self._weigh(terms, pace)
                with self.phases("backward"):
                    self._backward(state, terms["total"])
            for name, value in terms.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        if lessons:
            sums[LOST] = torch.stack([lesson.lost for lesson in lessons]).mean()
        with self.phases("optimizer"):
            self._optimize(state, pace)
        with self.phases("ema"):
            state.average_buffers(self.world)
            state.ema.step(pace.decay)
        if self.contrast:
            self._fill_banks(state, images, label, draws.bank)
        return sums

    def _weigh(self, terms: dict[str, Tensor], pace: Pace) -> Tensor:
        """Equation (10)."""
        weights = self.settings.loss
        factor = {
            "sup": weights.sup,
            "ct": weights.ct * pace.ramp,
            "hc": weights.hc,
            "lc": weights.lc,
        }
        return torch.stack([factor[name] * value for name, value in terms.items()]).sum()

    def _backward(self, state: TrainState, total: Tensor) -> None:
        # gradients are averaged over the processes, but a loss is a part of the mean over all
        state.scaler.scale(self.world.size * total).backward()  # type: ignore[no-untyped-call]

    def _optimize(self, state: TrainState, pace: Pace) -> None:
        for group in state.optimizer.param_groups:
            group["lr"] = pace.rate * group["lr_factor"]
        if self.settings.optim.clip_norm:
            state.scaler.unscale_(state.optimizer)
            for student in state.students:
                nn.utils.clip_grad_norm_(student.parameters(), self.settings.optim.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()

    def _losses(
        self, state: TrainState, part: Part, pixels: Tensor, contrast: bool
    ) -> dict[str, Tensor]:
        outputs = self._forward_students(state, part)
        size, strides = len(part.images), [student.stride for student in state.students]
        with self.phases("cross-entropy"):
            terms = {
                "sup": sum_of(
                    losses.pixel_cross_entropy(out.logits[:size], stride, part.label, pixels)
                    for out, stride in zip(outputs, strides, strict=True)
                )
            }
            if part.lessons:
                terms["ct"] = sum_of(
                    losses.pixel_cross_entropy(out.logits[size:], stride, label, count, weight)
                    for out, stride, (_, label, count, weight, _) in zip(
                        outputs, strides, part.lessons, strict=True
                    )
                )
        if self.contrast:
            with self.phases("contrast"):
                terms |= self._contrast(state, outputs, part, contrast)
        return terms

    @torch.no_grad()
    def _teach(
        self, state: TrainState, weak: Tensor, padding: Tensor, draw: Tensor
    ) -> tuple[Tensor, list[Lesson]]:
        """The mixed images (B, 3, H, W) and each student's lesson on them.

        Args:
            weak: (B, 3, H, W) in 0..1. padding: (B, H, W) bool, where there is no image.
            draw: random numbers of the mix, as `StepDraws` has them.
        """
        size = (weak.shape[-2], weak.shape[-1])
        networks = state.students if self.method.labels_by == "students" else state.teachers
        with self.phases("teachers"):
            probability = [  # of the network of each pair, (B, C, H, W)
                upsample(self._ask(net, weak).logits, size, net.stride).softmax(dim=1)
                for net in networks
            ]
        with self.phases("views"):
            keep = self._mix_mask(probability, padding, draw)
            lessons = []
            for k in range(state.pairs):
                chosen = [probability[j] for j in self.method.teachers_of(k, state.pairs)]
                confidence, label = mean_of(chosen).max(dim=1)
                # the largest of numbers that are none would be class 0, at index 0
                lost = ~(confidence > 0)
                target = Target(
                    self._mix(label.masked_fill(padding | lost, IGNORE), keep),
                    self._mix(confidence.masked_fill(lost, 0), keep),
                )
                share = (lost & ~padding).sum() / self.world.total((~padding).sum()).clamp(min=1)
                lessons.append(self._lesson(target, share))
            return self._mix(weak, keep), lessons

    def _lesson(self, target: Target, lost: Tensor) -> Lesson:
        loss, total = self.settings.loss, self.world.total
        label, weight = losses.weigh_pseudo_label(
            *target, loss.confidence_weight, loss.confidence_threshold, total
        )
        return Lesson(target, label, losses.valid_pixels(label, total), weight, lost)

    def _mix(self, values: Tensor, keep: Tensor | None) -> Tensor:
        """What is not kept of an image comes from the one before it, also across processes."""
        return values if keep is None else mixing.mix(values, self.world.roll(values), keep)

    def _mix_mask(self, probability: list[Tensor], padding: Tensor, draw: Tensor) -> Tensor | None:
        """Return which pixels (B, H, W) of each image the mix keeps; None: all.

        Args:
            probability: of each teacher, (B, C, H, W).
        """
        rule = self.settings.views.mix
        if rule == "none":
            return None
        if rule == "cutmix":
            return mixing.cutmix_mask((padding.shape[-2], padding.shape[-1]), draw)
        label = mean_of(probability).argmax(dim=1)
        return mixing.classmix_mask(label.masked_fill(padding, IGNORE), draw)

    def _ask(self, network: SegmentationModel, images: Tensor) -> Output:
        """Return a network's output for images (B, 3, H, W) in 0..1, taken in the step's parts."""
        outputs: list[Output] = []
        for some in images.chunk(self.settings.train.accumulate):
            with self._autocast(images.device):
                outputs.append(network(self._normalize(some)))
        if len(outputs) == 1:
            return outputs[0]
        return Output(*(torch.cat(maps) for maps in zip(*outputs, strict=True)))

    def _forward_students(self, state: TrainState, part: Part) -> list[Output]:
        """Of labelled and unlabelled images together: one set of batch-norm statistics."""
        outputs = []
        for k, student in enumerate(state.replicas):
            with self.phases("views"):
                labeled, mixed = part.images, part.mixed
                if part.draws_labeled:
                    labeled = self.photometric(labeled, part.draws_labeled[k])
                if len(mixed):
                    mixed = self.photometric(mixed, part.draws_mixed[k])
                batch = self._normalize(torch.cat([labeled, mixed]))
            with self.phases("students"), self._autocast(batch.device):
                outputs.append(student(batch))
        return outputs

    def _contrast(
        self, state: TrainState, outputs: list[Output], part: Part, started: bool
    ) -> dict[str, Tensor]:
        """Equations (6)-(9), summed over the students."""
        loss, bank_settings = self.settings.loss, self.settings.bank
        zero = outputs[0].features.new_zeros((), dtype=torch.float32)
        high_terms, low_terms = [zero], [zero]
        if not started:
            return {"hc": zero, "lc": zero}
        total = self.world.total if self.world.size > 1 else None
        # networks of different strides are compared on the coarsest grid
        stride = loss.contrast_stride * max(student.stride for student in state.students)
        truth = losses.to_grid(part.label, stride)
        outputs = [
            Output(*(losses.coarsen(maps, student.stride, stride, truth.shape[1:]) for maps in out))
            for out, student in zip(outputs, state.students, strict=True)
        ]
        counts = losses.usable_counts(state.banks, bank_settings.start)
        images = torch.arange(2 * len(truth), device=truth.device)[:, None, None]
        in_unlabeled = images >= len(truth)  # (2B, 1, 1)
        # confidence and class that each student's own classifier gives on the grid
        own = [out.logits.detach().float().softmax(dim=1).max(dim=1) for out in outputs]
        for k, out in enumerate(outputs):
            target = Target(*(losses.to_grid(x, stride) for x in part.lessons[k].target))
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
                        total,
                    )
                )
            peers = [j for j in range(state.pairs) if j != k] if loss.lc > 0 else []
            for j in peers:
                mask = losses.low_level_mask(high, confidence, own[j].values, loss.directional)
                if loss.lc_pixels == "unlabeled":
                    mask = mask & in_unlabeled
                low_terms.append(
                    losses.low_level_contrast(
                        out.features,
                        outputs[j].features,
                        own[j].indices,
                        mask & (pixel_label != IGNORE),
                        [(state.banks[i].keys, counts[i]) for i in (k, j)],
                        loss.tau_lc,
                        loss.contrast_reduction,
                        total,
                    )
                    / len(peers)
                )
        parts = self.settings.train.accumulate
        return {"hc": sum_of(high_terms) / parts, "lc": sum_of(low_terms) / parts}

    @torch.no_grad()
    def _fill_banks(
        self, state: TrainState, images: Tensor, label: Tensor, tickets: Tensor
    ) -> None:
        """Push teacher k's features of well classified labelled pixels into bank k.

        Args:
            images: (B, 3, H, W) in 0..1. label: (B, H, W). tickets: (K, P, C, top_k).
        """
        settings = self.settings.bank
        for k, (teacher, bank) in enumerate(zip(state.teachers, state.banks, strict=True)):
            with self.phases("teachers"):
                out = self._ask(teacher, images)
            with self.phases("banks"):
                truth = losses.to_grid(label, teacher.stride)
                confidence, predicted = out.logits.float().softmax(dim=1).max(dim=1)
                valid = (predicted == truth) & (confidence >= settings.min_confidence)
                for i, part in enumerate(self._pushes(len(images))):
                    bank.push(
                        losses.as_pixels(out.features[part]),
                        truth[part].flatten(),
                        confidence[part].flatten(),
                        valid=valid[part].flatten(),
                        top_k=settings.top_k if settings.random_choice else self.per_class,
                        per_class=self.per_class,
                        ticket=tickets[k, i] if self._draws_keys else None,
                    )

    def _pushes(self, images: int) -> Iterator[slice]:
        """Which of its images a process gives to each push: all, or one image of one process."""
        if not self.settings.bank.per_image:
            yield slice(None)
            return
        for i in range(images * self.world.size):
            rank, image = divmod(i, images)
            yield slice(image, image + 1) if rank == self.world.rank else slice(0, 0)

    def _autocast(self, device: torch.device) -> torch.autocast:
        amp = self.settings.train.amp
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")

    def _normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.info)


def split(whole: Part, parts: int) -> Iterator[Part]:
    """Shares of a batch, in order; the counts of its lessons stay those of the whole."""
    size = len(whole.images) // parts
    for first in range(0, size * parts, size):
        some = slice(first, first + size)
        lessons = [
            Lesson(Target(*(x[some] for x in target)), label[some], pixels, weight, lost)
            for target, label, pixels, weight, lost in whole.lessons
        ]
        yield Part(
            whole.images[some],
            whole.label[some],
            whole.mixed[some],
            lessons,
            [draw[:, some] for draw in whole.draws_labeled],
            [draw[:, some] for draw in whole.draws_mixed],
        )


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """The numbers on the device, copied there behind the work that it has."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


def to_unit(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 in 0..1."""
    return images.float() / 255


def normalize(images: Tensor, info: DatasetInfo) -> Tensor:
    """Images in 0..1 -> mean 0 and deviation 1 by the data set's statistics."""
    mean, std = (constant(v, images.device)[:, None, None] for v in (info.mean, info.std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def mean_of(probability: list[Tensor]) -> Tensor:
    """Return the mean over networks; that of one is itself, which saves a copy at full size."""
    return probability[0] if len(probability) == 1 else torch.stack(probability).mean(dim=0)


def sum_of(values: object) -> Tensor:
    return torch.stack(list(values)).sum()  # type: ignore[call-overload]
