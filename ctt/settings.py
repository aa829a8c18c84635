"""Every setting of a run, in one typed place. Imports nothing heavy: `--help` must be quick.

Defaults are those of the paper (Xiao et al., Neurocomputing 2022) where it prints one; the recipes
in `ctt/recipes` set what differs for a dataset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from ctt import fingerprint, methods
from ctt.data.options import DatasetOptions
from ctt.errors import UserError
from ctt.files import expanded
from ctt.methods.labeled_settings import LabeledSettings
from ctt.methods.mask_settings import MaskSettings
from ctt.methods.options import Check, Options
from ctt.ranges import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    SHARE,
    SHARE_BELOW_1,
    Range,
    outside,
)
from ctt.text import brief

if TYPE_CHECKING:
    from ctt.data.dataset import Dataset

# settings that say where and how a run is computed, not what
WITHOUT_EFFECT = {
    "": ("data_root",),
    "data": ("cache", "workers"),
    "train": (
        "device",
        "threads",
        "gradient_checkpointing",
        "shard_optimizer",
        "cuda_graph",
        "profile",
        "log_every",
        "measured_images",
        "checkpoint_every",
        "tensorboard",
        "loggers",
    ),
}
PROFILE_WARM_UP = 10  # steps of a run before those that are looked at


@dataclass(frozen=True)
class DataSettings(DatasetOptions):
    crop: tuple[int, int] = (321, 321)
    """Height and width of the training crop, in pixels; 0 0: what fits the images, their median
    height and width, at most 96 each."""
    batch_size: Annotated[int, AT_LEAST_1] = 10
    """Labelled images a step and process. With N processes a step sees N times as many, and the
    learning rate is used as it is given."""
    unlabeled_batch_size: Annotated[int, AT_LEAST_0] = 0
    """Unlabelled images a step and process; 0: as many as labelled ones."""
    workers: Annotated[int, AT_LEAST_0] = 2
    """Processes that load images; 0 loads in the main process."""
    resize: Annotated[tuple[int, int] | None, Range(8)] = None
    """Height and width to which training images and labels are resized first (Cityscapes
    in the paper: 512 1024). Evaluation is not changed by it: see --eval.protocol half."""
    cache: Path | None = None
    """Folder in which decoded (and resized) training images are kept: 3 bytes a pixel of an image
    and 1 of a label, written when first read, shared by all processes and runs that name it. In
    /dev/shm it is memory."""
    scale: Annotated[tuple[float, float], ABOVE_0] = (0.5, 1.6)
    """Range of the random resize before the crop."""
    flip: bool = True
    """Mirror half of the images left to right."""
    rotation: Annotated[float, Range(0, 180)] = 10.0
    """Largest random rotation, in degrees."""
    translation: Annotated[float, SHARE] = 0.1
    """Largest random shift, as a share of the image's sides."""
    rare_crops: Annotated[float, SHARE] = 0.0
    """Share of the labelled crops that are drawn for a class, the rarer the more often: of an image
    that shows it, around one of its pixels. All labelled masks are read at the start."""

    @property
    def unlabeled_images(self) -> int:
        """Return how many unlabelled images a step and process takes, where it takes any."""
        return self.unlabeled_batch_size or self.batch_size


@dataclass(frozen=True)
class ViewSettings:
    jitter: Annotated[float, SHARE] = 0.25
    """Strength of the colour jitter of the strong view: brightness, contrast and saturation change
    by up to this share."""
    hue: Annotated[float | None, Range(0, 0.5)] = None
    """Largest change of the hue in the colour jitter, as a share of the colour circle; by default a
    quarter of --views.jitter. UniMatch V2: jitter 0.5 and hue 0.25."""
    jitter_probability: Annotated[float, SHARE] = 0.8
    """Share of the images whose colours are jittered in the strong view."""
    blur_probability: Annotated[float, SHARE] = 0.5
    """Share of the images blurred in the strong view."""
    blur_sigma: Annotated[tuple[float, float], Range(0, 100, above=True)] = (0.1, 2.0)
    """Range of the blur, in pixels."""
    grey_probability: Annotated[float, SHARE] = 0.0
    """Share of the images that lose their colours in the strong view."""
    mix: Literal[
        "none",
        "classmix",
        "classmix-fewer",
        "cutmix",
        "half-area",
        "half-width",
        "small-box",
        "cowmix",
    ] = "none"
    """How unlabelled images are mixed; every student sees the same mix. classmix pastes half of the
    classes of an image, of an odd number the larger half or (classmix-fewer) the smaller; cutmix a
    box of 1/4 to 1/2 of the area; half-area and half-width a box of 1/2, as the programs of French
    et al. and of ClassMix draw it; small-box, into every other image, one of 2 to 40 %, as the
    programs of UniMatch do; cowmix blobs that make one half."""
    strong_labeled: bool = False
    """Also give the labelled images the colour jitter and blur."""
    per_student: bool = True
    """Draw colour jitter and blur anew for each student; geometry and mix are always shared."""


@dataclass(frozen=True)
class ModelSettings:
    name: str = "small"
    """Architecture: small, deeplabv2, deeplabv3plus, vit, dpt, or smp:NAME, one of
    segmentation_models_pytorch such as smp:unet (extra `smp`)."""
    pair_name: tuple[str, ...] = ()
    """Architectures of the pairs instead of --model.name, where they differ. If you give several,
    pair k takes the k-th (cycling)."""
    backbone: tuple[str, ...] = ()
    """Name of a timm model, with or without the tag of its weights, such as resnet101 or
    resnet101.tv_in1k; by default resnet101, vit_small_patch14_dinov2 for vit and dpt, resnet34 for
    smp. If you give several, pair k takes the k-th (cycling)."""
    weights: tuple[str, ...] = ("none",)
    """What students start from: `none`, fresh weights; `imagenet`, the weights that timm publishes
    for the backbone, once `ctt-data fetch weights` has brought them; or a file (.safetensors, or
    .pth that holds tensors) of the whole network or of the backbone. If you give several, pair k
    takes the k-th (cycling)."""
    normalization: Literal["data", "weights"] = "data"
    """How a backbone takes images. data: by mean and deviation of the dataset. weights: by those
    with which the published weights of the backbone were trained, of each pair its own (CLIP,
    SigLIP and DINOv2 have different ones)."""
    output_stride: int = 0
    """Stride of a dilated backbone: 8 or 16; 0: 8 for deeplabv2, 16 for deeplabv3plus. Swins cannot
    be dilated and have 32."""
    grid: Literal["aligned", "legacy"] = "aligned"
    """Where the cells of a network's features lie in an image. aligned: where the network looks,
    pixel r * stride for cell r of convolutions, the middle of the patch for patches. legacy: as
    versions did that had no such setting: labels from pixel r * stride, but logits half a stride
    further on. Runs and weights of such versions keep it."""
    freeze_backbone: bool = False
    """Train the head alone: the backbone stays as --model.weights has it, and nothing is kept of it
    for the backward pass."""
    freeze_batch_norm: bool = False
    """Keep statistics, scale and shift of the backbone's batch norms from --model.weights;
    for batches too small to estimate statistics from. Those of the head are trained."""
    sync_batch_norm: bool = False
    """Batch-norm statistics of the batches of all processes together; without effect in one.
    Otherwise each process normalises its own batch, and the running statistics, which the teachers
    take over, are the mean over the processes."""
    features: Annotated[int, AT_LEAST_0] = 0
    """D, channels of the features that the last 1x1 classifier reads and that contrast compares; 0:
    256, and of dpt what is published for the width of its backbone (64 for ViT-S, 128 for B, 256
    for L)."""
    drop_path: Annotated[tuple[float, ...], SHARE_BELOW_1] = (0.0,)
    """Rate of stochastic depth in the last block of the backbone, falling to 0 in the first; its
    teacher has none. If you give several, pair k takes the k-th (cycling)."""
    width: Annotated[int, AT_LEAST_1] = 32
    """small: channels of the first stage."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the architectures, one for each pair (cycling)."""
        return self.pair_name or (self.name,)

    def of_pair(self, k: int) -> dict[str, Any]:
        """Return arguments of `ctt.models.build` for the networks of pair k, counted from 0."""
        from ctt.models import OUTPUT_STRIDES

        name = self.names[k % len(self.names)]
        strides = not self.pair_name or name in OUTPUT_STRIDES
        return {
            "name": name,
            "features": self.features,
            "width": self.width,
            "backbone": self.backbone[k % len(self.backbone)] if self.backbone else "",
            "output_stride": self.output_stride if strides else 0,
            "grid": self.grid,
            "normalization": self.normalization,
            "drop_path": self.drop_path[k % len(self.drop_path)],
        }


@dataclass(frozen=True)
class OptimSettings:
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, ABOVE_0] = 2.5e-4
    """Learning rate of the students, at the start of its schedule."""
    pair_lr: Annotated[tuple[float, ...], ABOVE_0] = ()
    """Learning rates of the pairs instead of --optim.lr, where they differ. If you give several,
    pair k takes the k-th (cycling)."""
    head_lr_factor: Annotated[float, ABOVE_0] = 1.0
    """Learning rate of the classifier head relative to the rest (DeepLabV2: 10)."""
    pair_head_lr_factor: Annotated[tuple[float, ...], ABOVE_0] = ()
    """Values of --optim.head-lr-factor for the pairs, where they differ (cycling)."""
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Learning rate of a layer of the backbone relative to the next one; 1: all learn alike."""
    momentum: Annotated[float, SHARE_BELOW_1] = 0.9
    """sgd: momentum, the decay of the mean over past gradients."""
    nesterov: bool = False
    """sgd: Nesterov's momentum."""
    betas: Annotated[tuple[float, float], SHARE_BELOW_1] = (0.9, 0.999)
    """adamw: decay of the means of past gradients and of their squares."""
    weight_decay: Annotated[float, AT_LEAST_0] = 5e-4
    """Weight decay: added to the gradient in sgd, decoupled in adamw."""
    decay_vectors: bool = True
    """Decay also what has one axis: scales and shifts of norms, and biases."""
    schedule: Literal["poly", "cosine"] = "poly"
    """How the learning rate falls over the run: lr * (1 - t / iterations) ** power, or half a
    cosine."""
    power: Annotated[float, AT_LEAST_0] = 0.9
    """poly: the exponent."""
    warmup: Annotated[int, AT_LEAST_0] = 0
    """Iterations of linear warm-up of the learning rate."""
    clip_norm: Annotated[float, AT_LEAST_0] = 0.0
    """Largest norm of the gradient of a student, and of the modules beside the students; 0 does not
    clip."""


@dataclass(frozen=True)
class EmaSettings:
    decay: Annotated[float, SHARE] = 0.99
    """Decay a of the teachers: teacher <- a teacher + (1 - a) student after every step; the first
    steps use min(1 - 1/(t+1), a)."""
    buffers: Literal["copy", "average"] = "copy"
    """Whether a teacher copies the batch-norm statistics of its student, or averages them, too."""


@dataclass(frozen=True)
class LossSettings:
    sup: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the supervised cross-entropy, equations (1)(2)."""
    ct: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the cross-entropy against the teachers' labels, equations (3)-(5)."""
    labels_from: Literal["others", "all"] = "others"
    """Who labels the unlabelled images for a student of cross-teacher. others: the teachers of the
    other pairs. all: every teacher, each pixel's probabilities weighted by how sure each is of it.
    """
    ct_ramp: Annotated[int, AT_LEAST_0] = 0
    """Iterations over which --loss.ct rises from 0 to its value."""
    ct_after: Annotated[float, SHARE_BELOW_1] = 0.0
    """Share of the run in which students see labelled images alone, before the unlabelled ones join
    and the ramp begins. Such a step costs less than half, and teachers seldom label well so early.
    """
    hc: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of the high-level contrast, equation (6)."""
    lc: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of the low-level contrast, equation (8)."""
    tau_hc: Annotated[float, ABOVE_0] = 0.5
    """Temperature of the high-level contrast."""
    tau_lc: Annotated[float, ABOVE_0] = 0.5
    """Temperature of the low-level contrast."""
    gamma: Annotated[float, SHARE] = 0.75
    """Confidence from which a pixel belongs to the high-level contrast, equation (7)."""
    hc_confidence: Literal["student", "teacher"] = "student"
    """Whose confidence decides: the student's own (paper), or, as in the authors' program, that of
    the teacher which labels the unlabelled pixels, with every labelled pixel kept."""
    directional: bool = True
    """Low-level contrast only where the peer is more confident, equation (9)."""
    lc_pixels: Literal["all", "unlabeled"] = "all"
    """Pixels of the low-level contrast: of all images (paper), or of the unlabelled ones alone
    (authors' program)."""
    contrast_stride: Annotated[int, AT_LEAST_1] = 1
    """Contrast only every n-th pixel of the features in both directions, which costs less. The
    banks are filled from all pixels."""
    contrast_reduction: Literal["class", "mean"] = "class"
    """Mean over the pixels of each class and then over classes, or over all pixels at once."""
    confidence_weight: Literal["none", "uniform", "threshold"] = "none"
    """How teachers' confidence weighs the cross-teacher term: not at all (paper), all pixels by the
    share of confident ones (authors' program), or only confident pixels."""
    confidence_threshold: Annotated[float, SHARE] = 0.968
    """Confidence from which a pixel counts, for --loss.confidence-weight uniform and threshold."""
    unlabeled_mean: Literal["kept", "valid", "all"] = "kept"
    """What the sum over pixels with a pseudo-label is divided by: their number, that of all pixels
    that show an image, or that of all pixels. The last two lower the weight of the term while few
    pixels are confident."""


@dataclass(frozen=True)
class BankSettings:
    capacity: Annotated[int, AT_LEAST_1] = 128
    """V, keys of each class."""
    top_k: Annotated[int, AT_LEAST_1] = 256
    """Most confident pixels of a class and batch that may be pushed."""
    per_class: Annotated[int, AT_LEAST_0] = 0
    """K_push, pixels of a class pushed a step, drawn from the top k; 0: max(1, V // labelled)."""
    per_image: bool = False
    """Select and push for each labelled image of the batch by itself."""
    every: Annotated[int, AT_LEAST_1] = 1
    """Fill the banks from every N-th labelled image of a batch; the teachers then see only these.
    Of a batch that N does not divide, from every M-th, with its largest divisor M below N."""
    random_choice: bool = True
    """Draw the pushed pixels from the top k at random, else take the most confident."""
    min_confidence: Annotated[float, SHARE] = 0.0
    """Teacher's confidence that a pixel needs to be pushed."""
    start: Literal["class", "all"] = "class"
    """When contrast begins: for each class when its own queue is full, or when every one is."""
    start_after: Annotated[int, AT_LEAST_0] = 0
    """Iterations before the contrast may begin."""


@dataclass(frozen=True)
class TrainSettings:
    iterations: Annotated[int, AT_LEAST_1] = 80_000
    """Steps of the run."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """CPU threads of a process; 0: one for each core, shared with the other processes."""
    accumulate: Annotated[int, AT_LEAST_1] = 1
    """Parts in which a process takes the images of a step through the students, for batches that
    memory does not hold at once; --data.batch-size counts all parts together. Cross-entropies are
    exact means over the step, the contrast is the mean over the parts, and batch norm sees a part.
    The optimiser, the teachers and the banks move once a step."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Automatic mixed precision."""
    compile: Literal["off", "network", "blocks"] = "off"
    """Compile the networks by torch.compile: as a whole, or each repeated block once, which gives a
    faster start and slightly slower steps. Evaluation runs them as they are."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of a student's repeated blocks, and compute the rest again in the
    backward pass: much less memory for about a third more time. Gradients are the same."""
    shard_optimizer: bool = False
    """Share the states of the optimiser out among the processes (ZeRO, stage 1): each remembers its
    part of the weights alone, which N processes then hold an N-th of. Without effect in one."""
    cuda_graph: bool = False
    """Record a step as a CUDA graph and replay it, which frees the host from starting every kernel;
    one process and GPU. The memory of a step stays allocated, and the graph is recorded again when
    the contrast begins."""
    profile: Annotated[int, AT_LEAST_0] = 0
    """Steps to look at after the first ten: prints the time of each phase of a step, and writes as
    many more to trace.json in the run folder, with an evaluation or checkpoint that falls among
    them under its name; 0: none."""
    deterministic: bool = False
    """Only deterministic algorithms; a resumed run then ends bit-equal to one never stopped."""
    log_every: Annotated[int, AT_LEAST_1] = 20
    """Iterations between rows of metrics.csv."""
    eval_every: Annotated[int, AT_LEAST_0] = 0
    """Iterations between evaluations; 0: ten in a run."""
    checkpoint_every: Annotated[int, AT_LEAST_0] = 0
    """Iterations between checkpoints; 0: at every evaluation."""
    measured_images: Annotated[int, AT_LEAST_0] = 16
    """Unlabelled images on which each evaluation also measures how sure the teachers are, how often
    they and the students agree, and, where the dataset knows the labels that are hidden from
    training, how often the teachers are right: see "Look inside a run" in docs/training.md. Nothing
    learns from it; 0: none."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    loggers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Also send the numbers of the run to W&B (extra `wandb`) or MLflow (extra `mlflow`)."""
    backend: Literal["auto", "cuda", "triton", "chunked", "cpu", "torch", "reference"] = "auto"
    """Implementation of the operations of `ctt.ops`, wherever it can run."""


@dataclass(frozen=True)
class EvalSettings:
    protocol: Literal["whole", "sliding", "center-crop", "half"] = "whole"
    """What is scored: whole images at their own size; the same, seen through overlapping windows;
    a crop from the middle; or images and labels at half their height and width (Cityscapes at
    512x1024, the paper's numbers)."""
    window: Annotated[tuple[int, int], Range(8)] = (801, 801)
    """sliding and center-crop: height and width of the window, cut to the image's."""
    stride: Annotated[float, ABOVE_0] = 2 / 3
    """sliding: step from window to window, as a share of the window, or above 1 in pixels."""
    fit: Literal["pad", "resize"] = "pad"
    """How images, windows or scaled images whose sides are no multiples of the patch go through a
    ViT. pad: with the mean colour, below and on the right. resize: to the nearest multiples, and
    the logits back to their size (as UniMatch V2 does). Other networks take them as they are."""
    flip: bool = False
    """Mean of the probabilities of an image and its mirror image."""
    scales: Annotated[tuple[float, ...], Range(0.1, 10, kind="factors")] = (1.0,)
    """Mean of the probabilities of an image at several sizes, as factors: 0.75 1 1.25."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision of the network; probabilities are always float32."""
    batch_pixels: Annotated[int, AT_LEAST_1] = 2**18
    """Images or windows of one size go through the network together up to this many pixels."""


@dataclass(frozen=True)
class Settings:
    dataset: str = "digits"
    """One of `ctt.data.names()`."""
    data_root: Path | None = None
    """Folder of the images, for datasets that have one."""
    ratio: str = "1/20"
    """Labelled share of the training images: a fraction `1/20`, a share `0.05` or a count `50`."""
    split_labeled: Path | None = None
    """List of labelled images, instead of --ratio: a name, a path, or the paths of image and mask
    on each line."""
    split_unlabeled: Path | None = None
    """List of unlabelled images; without it all training images that are not labelled."""
    method: str = "cross-teacher"
    """Training method: a name of --list-methods, or a class in a file, my_method.py:MyMethod."""
    teacher: Path | None = None
    """distill: the finished run that teaches, by its ensemble, or one network: a file of weights
    such as its best.safetensors, or hf:OWNER/NAME on the Hugging Face hub."""
    pairs: Annotated[int, Range(0, 8)] = 0
    """K, pairs of student and teacher; 0: what the method uses by default."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the choice of labelled images, the initial weights and the augmentation."""
    data: DataSettings = field(default_factory=DataSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    labeled: LabeledSettings = field(default_factory=LabeledSettings)
    masks: MaskSettings = field(default_factory=MaskSettings)
    bank: BankSettings = field(default_factory=BankSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    options: Options = field(default_factory=Options)
    """Settings that the method alone has."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", methods.absolute(self.method))
        with contextlib.suppress(UserError):  # of a method that does not exist; `validate` tells
            wanted = methods.get(self.method).option_class()
            if type(self.options) is not wanted:
                object.__setattr__(self, "options", wanted())

    def with_method(self, name: str) -> Self:
        """Return the settings with another method, whose own options have their defaults."""
        return dataclasses.replace(self, method=name)

    def open_dataset(self) -> Dataset:
        """Return the dataset.

        Raises:
            UserError: there is none of that name, or its folder cannot be used.
        """
        from ctt import data

        return data.open_dataset(self.dataset, self.data_root, self.data)

    def network(self, k: int) -> dict[str, Any]:
        """Return the arguments of `ctt.models.build` for the networks of pair k, from 0 on."""
        return {**self.model.of_pair(k), "image": self.data.crop}

    def hash(self) -> str:
        """Return twelve hex digits that name these settings.

        The same experiment has the same ones on another machine: what does not change its result,
        such as the path of the data, is left out, and files count by what they hold, folders by
        their images' names and sizes and the content of some. What is not there counts by its name.
        """
        values = to_dict(self)
        if own := methods.own_file(self.method):
            values["method"] = f"{fingerprint.of_file(str(own[0]))}:{own[1]}"
        with contextlib.suppress(UserError):  # a method of one's own whose file is gone
            values["pairs"] = self.pairs or methods.get(self.method).pairs
        for option in ("split_labeled", "split_unlabeled"):
            values[option] = values[option] and fingerprint.of_file(values[option])
        values["teacher"] = values["teacher"] and fingerprint.of_teacher(values["teacher"])
        masks = values["masks"]
        for option in ("folder", "confidence"):
            masks[option] = masks[option] and fingerprint.of_folder(masks[option])
        values["model"]["weights"] = [fingerprint.of_file(w) for w in self.model.weights]
        for group, names in WITHOUT_EFFECT.items():
            for name in names:
                del (values[group] if group else values)[name]
        if self.labeled.class_weights != "none":  # they follow, once the run begins
            values["labeled"]["weights"] = []
        root = self.data_root if self.dataset == "folder" else None
        if root is not None and (data := fingerprint.of_dataset(root)):
            values["data"]["root"] = data
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def field_names(owner: type, prefix: str = "") -> Iterator[str]:
    """Yield the names of all settings: groups such as `data`, and fields such as `data.crop`."""
    hints = typing.get_type_hints(owner)
    for f in dataclasses.fields(owner):
        yield f"{prefix}{f.name}"
        if dataclasses.is_dataclass(hints[f.name]):
            yield from field_names(hints[f.name], f"{prefix}{f.name}.")


S = TypeVar("S", bound=Settings)


def to_dict(settings: Any) -> dict[str, Any]:
    """Return plain numbers, strings and lists, as YAML and JSON take them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    result: dict[str, Any] = plain(dataclasses.asdict(settings))
    return result


def update(settings: S, values: dict[str, Any], source: str) -> S:
    """Return `settings` with the nested `values` of a YAML file put over them.

    Args:
        source: where the values come from, for the message.

    Raises:
        UserError: a name that is no setting, or a value of another type.
    """
    if "method" in values and "options" in values:
        settings = dataclasses.replace(settings, method=str(values["method"]))
    result: S = _update(settings, values, source, "")
    return result


def _update(settings: Any, values: dict[str, Any], source: str, prefix: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(settings)}
    types_of = typing.get_type_hints(type(settings))
    changes = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(
                f"{source}: there is no setting {prefix}{key}. "
                f"Settings at this place: {', '.join(sorted(known))}."
            )
        if name in changes:
            both = " and ".join(str(k) for k in values if str(k).replace("-", "_") == name)
            raise UserError(
                f"{source}: {both} are two spellings of the setting {prefix}{name}. Take one of "
                f"them out."
            )
        current = getattr(settings, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {prefix}{name} must hold settings, got {brief(value)}.")
            changes[name] = _update(current, value, source, f"{prefix}{name}.")
        else:
            changes[name] = _coerce(value, types_of[name], f"{source}: {prefix}{name}")
    return dataclasses.replace(settings, **changes)


def _coerce(value: Any, kind: Any, where: str) -> Any:
    """YAML knows neither paths nor tuples, and reads 5e-4 as a string and 1 as an integer."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _coerce(value, next(o for o in options if o is not type(None)), where)
    if origin is Literal:
        # YAML 1.1 reads the word off as false
        value = "off" if value is False and "off" in options else value
        if value not in options:
            raise UserError(f"{where} must be one of {', '.join(options)}, got {brief(value)}.")
        return value
    if origin is tuple and options[-1] is Ellipsis:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(item, options[0], where) for item in items)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(options):
            raise UserError(
                f"{where} must be a list of {len(options)} numbers, got {brief(value)}."
            )
        return tuple(_coerce(v, o, where) for v, o in zip(value, options, strict=True))
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{where} must be true or false, got {brief(value)}.")
        return value
    try:
        # `kind` makes 1.0 of a yes, and a word of anything; a method of one's own may have lists
        plain = value is not None and not isinstance(value, bool | list | tuple | dict)
        if kind in (int, float, str) and not plain:
            raise TypeError
        if kind is int and float(value) != int(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where} must be of type {kind.__name__}, got {brief(value)}.") from None


def validate(settings: Settings) -> None:
    """Refuse values that cannot work, before anything is loaded or written.

    Raises:
        UserError: names the field, the value and the range.
    """
    from ctt import data

    data.check_name(settings.dataset)
    s, rising = settings, "must be two numbers above 0, the lower first"
    iterations, profile = s.train.iterations, s.train.profile
    checks: list[Check] = [
        (
            "data.crop",
            s.data.crop,
            min(s.data.crop) >= 8 or s.data.crop == (0, 0),
            "must be at least 8 8, or 0 0 for one that fits the images",
        ),
        ("data.scale", s.data.scale, 0 < s.data.scale[0] <= s.data.scale[1], rising),
        (
            "views.blur_sigma",
            s.views.blur_sigma,
            0 < s.views.blur_sigma[0] <= s.views.blur_sigma[1],
            rising,
        ),
        (
            "model.drop_path",
            s.model.drop_path,
            len(s.model.drop_path) > 0,
            "must be one number, or several",
        ),
        (
            "model.output_stride",
            s.model.output_stride,
            s.model.output_stride in (0, 8, 16),
            "must be 8 or 16, or 0 for the architecture's own",
        ),
        (
            "optim.nesterov",
            s.optim.nesterov,
            not s.optim.nesterov or s.optim.momentum > 0,
            "needs `optim.momentum` above 0",
        ),
        (
            "train.accumulate",
            s.train.accumulate,
            s.train.accumulate > 0
            and s.data.batch_size % s.train.accumulate == 0
            and s.data.unlabeled_images % s.train.accumulate == 0,
            f"must divide `data.batch_size` {s.data.batch_size} and "
            f"`data.unlabeled_batch_size` {s.data.unlabeled_images}",
        ),
        (
            "train.profile",
            profile,
            0 <= 2 * profile <= max(0, iterations - PROFILE_WARM_UP),
            f"must be at least 0, and {PROFILE_WARM_UP} and twice as many steps must fit into "
            f"`train.iterations` {iterations}",
        ),
        (
            "train.cuda_graph",
            s.train.cuda_graph,
            not (s.train.cuda_graph and profile),
            "excludes `train.profile`: a replayed step has no phases",
        ),
        (
            "train.gradient_checkpointing",
            s.train.gradient_checkpointing,
            not s.train.gradient_checkpointing
            or not (s.train.cuda_graph or s.train.compile != "off"),
            "excludes `train.cuda_graph` and `train.compile`, which choose by themselves what is "
            "kept",
        ),
        *_eval_checks(s.eval),
    ]
    _refuse([*checks, *s.labeled.checks(), *s.options.checks()])
    refuse_outside(s)
    if s.data.cache is not None:
        expanded(s.data.cache, "`data.cache`")
    if not s.model.weights:
        raise UserError("`model.weights` needs none, imagenet or a file.")
    for option, kept, frozen in (
        ("batch_norm", "statistics", s.model.freeze_batch_norm),
        ("backbone", "backbone", s.model.freeze_backbone),
    ):
        if frozen and "none" in s.model.weights:
            raise UserError(
                f"`model.freeze_{option}` keeps the {kept} of trained weights, and with "
                f"`model.weights` none there are none. Give imagenet or a file there."
            )


def validate_eval(settings: EvalSettings) -> None:
    """Validate the settings of evaluation alone, as `validate` does."""
    _refuse(_eval_checks(settings))
    refuse_outside(settings, "eval.")


def _eval_checks(e: EvalSettings) -> list[Check]:
    stride_fits = 0 < e.stride <= 1 or 1 < e.stride <= min(e.window)
    return [
        ("eval.window", e.window, min(e.window) >= 8, "must be at least 8 8"),
        (
            "eval.stride",
            e.stride,
            stride_fits,
            "must be a share of the window in 0..1, or a number of pixels that its sides reach",
        ),
        ("eval.scales", e.scales, len(e.scales) > 0, "must be factors in 0.1..10"),
    ]


def _refuse(checks: list[Check]) -> None:
    for name, value, good, rule in checks:
        numbers = value if isinstance(value, tuple) else (value,)
        if not good or not all(math.isfinite(number) for number in numbers):
            raise UserError(f"{_named(name)} {rule}, got {value}.")


def refuse_outside(settings: Any, prefix: str = "") -> None:
    """Refuse fields of a dataclass, and of those in it, that lie outside the ranges beside them.

    Raises:
        UserError: names the field, after `prefix`, the value and the range.
    """
    for name, rule, value in outside(settings, prefix):
        raise UserError(f"{_named(name)} {rule}, got {value}.")


def _named(name: str) -> str:
    """Return a field as messages name it; methods of others may say `--options.my-weight`."""
    return f"`{name.removeprefix('--').replace('-', '_')}`"
