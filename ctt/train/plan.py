"""What a run is made of before its first step: method, data, split and networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ctt import methods, run
from ctt.configure import listed
from ctt.data.balance import class_pixels
from ctt.data.check import check_quickly, handful, not_evaluated
from ctt.data.dataset import IGNORE, Dataset, DatasetInfo, first_difference
from ctt.data.external_masks import ExternalMasks
from ctt.data.files import FEW
from ctt.data.fit import FITTING, fitting_crop
from ctt.data.split import make_split, read_list
from ctt.device import pick_device
from ctt.errors import UserError
from ctt.files import expanded, is_on_hub
from ctt.inference.evaluate import ENSEMBLE
from ctt.inference.load import load_trained
from ctt.methods.base import M, Method, Setup, unchanged
from ctt.methods.labeled import class_weights
from ctt.models.base import SegmentationModel
from ctt.settings import Settings, to_dict
from ctt.train.distributed import World, synchronize
from ctt.train.setup import set_up_torch

# settings whose k-th value is that of pair k
PER_PAIR = (
    *("model.pair_name", "model.backbone", "model.weights", "model.drop_path"),
    *("optim.pair_lr", "optim.pair_head_lr_factor"),
)


@dataclass(frozen=True)
class Plan:
    """The parts of a run, for training and for the dry run alike.

    Attributes:
        settings: as they are trained with.
        asked: as they were asked for, with what the data decides left open, such as a crop that
            fits. The run folder keeps these, and the run is known by their hash.
        pairs: K.
        labeled, unlabeled: names of the training images; `unlabeled` are all that have no label,
            whether or not the method takes them.
        origins: a sentence for each student that starts from published weights, once it is made.
        masks: of the unlabelled images, that another model made, if there are any.
        processes: how many train the run.
        class_pixels: (N, C) of each class in each labelled image, if something needs it.
    """

    settings: Settings
    asked: Settings
    about: methods.About
    pairs: int
    device: torch.device
    dataset: Dataset
    labeled: list[str]
    unlabeled: list[str]
    fresh: bool
    origins: list[str] = field(default_factory=list)
    masks: ExternalMasks | None = None
    processes: int = 1
    class_pixels: Tensor | None = None

    @classmethod
    def of(cls, settings: Settings, resume: Path | None, processes: int = 1) -> Plan:
        """Look at settings, data and lists, and set up PyTorch; nothing is written.

        Args:
            resume: the run folder to resume; None: a new run.

        Raises:
            UserError: settings, lists or files that cannot be used, or nothing to learn from.
        """
        device = pick_device(settings.train.device)
        check_cuda_graph(settings, device, processes)
        set_up_torch(settings)
        about = methods.get(settings.method)
        dataset = settings.open_dataset()
        if resume is None:
            labeled, unlabeled = new_split(settings, dataset, about.unlabeled)
        else:
            labeled, unlabeled = split_of_run(run.find(resume), dataset, about.unlabeled)
        asked = settings
        settings = as_read(settings, about)
        if settings.data.crop == FITTING:
            crop = fitting_crop(dataset, labeled, settings.data.resize)
            settings = replace(settings, data=replace(settings.data, crop=crop))
        if about.paired:
            data = replace(settings.data, unlabeled_batch_size=0)
            settings = replace(settings, data=data)
        pairs = settings.pairs or about.pairs
        masks = external_masks(settings, dataset, unlabeled)
        parts = (about, pairs, device, dataset, labeled, unlabeled)
        return cls(settings, asked, *parts, resume is None, masks=masks, processes=processes)

    def counted(self, world: World) -> Self:
        """Return the plan with the pixels of each class, and a new run's class weights from them.

        Each process reads its share of the masks. A run that goes on keeps the weights it has.

        Raises:
            UserError: a mask is missing or broken.
        """
        s, labeled = self.settings, self.settings.labeled
        weighs = labeled.class_weights != "none" and (self.fresh or not labeled.weights)
        if not weighs and not s.data.rare_crops:
            return self
        own = slice(world.rank, None, world.size)
        pixels = torch.zeros(len(self.labeled), len(self.dataset.info.classes), dtype=torch.int64)
        pixels[own] = class_pixels(self.dataset, self.labeled[own], s.data.workers)
        pixels = world.total(pixels.to(self.device)).cpu()
        if weighs:
            counts = (pixels.sum(dim=0).tolist(), (pixels > 0).sum(dim=0).tolist())
            weights = class_weights(labeled.class_weights, *counts, labeled.beta)
            labeled = replace(labeled, weights=weights)
        settings, asked = replace(s, labeled=labeled), replace(self.asked, labeled=labeled)
        return replace(self, settings=settings, asked=asked, class_pixels=pixels)

    def build(self, finish: bool = True) -> Method:
        """Return the method with its networks.

        Args:
            finish: bring the networks to the device, in the layout in which they train.

        Raises:
            UserError: no such network or weights, or batches that a batch norm cannot take.
        """
        settings = self.settings
        ready = partial(ready_to_train, settings=settings, device=self.device)
        setup = Setup(
            settings,
            self.dataset.info,
            self.pairs,
            len(self.labeled),
            self.fresh,
            finish=ready if finish else unchanged,
            finished_teachers=teachers_of_run(settings, self.dataset.info),
            origins=self.origins,
        )
        made = self.about.load()
        if settings.train.cuda_graph and not made.recordable:
            raise UserError(
                f"`train.cuda_graph`: a step of `method` {settings.method} waits for the device, "
                f"so it cannot be recorded. Leave it out."
            )
        method = made(setup)
        check_crop(method.students, settings)
        for student in method.students:
            check_batch_norm(student, settings, self.fewest_images(method))
        return method

    def fewest_images(self, method: Method) -> int:
        """Return how many images the smallest batch has that a student of one process trains on."""
        s, about = self.settings, self.about
        labeled, unlabeled = s.data.batch_size, s.data.unlabeled_images
        together = [method.smallest_batch(labeled, unlabeled)] if about.unlabeled else []
        first = about.steps_without_unlabeled(s) > 0
        first |= any(kind.images == "none" for kind in method.rounds())
        alone = [labeled] if first or not about.unlabeled else []
        return min(together + alone) // s.train.accumulate

    def notes(self, broken: str) -> list[str]:
        """Return a sentence for each thing that the user should know before a run.

        Args:
            broken: what is wrong with the last checkpoint, if anything.
        """
        told = [f"Warning: {broken}"] if broken else []
        return [*told, *self.dataset.notes, *self.warnings(), *dict.fromkeys(self.origins)]

    def sketch(self, method: Method) -> str:
        """Return the network, the crop and the batch of the run, and when its contrast begins."""
        s, model = self.settings, self.settings.model
        weights = sum(p.numel() for p in method.students[0].parameters()) / 1e6
        backbone = f" with {', '.join(model.backbone)}" if model.backbone else ""
        networks = " and ".join(dict.fromkeys(model.names))
        beside = ""
        if self.about.unlabeled:
            same = s.data.unlabeled_images == s.data.batch_size
            beside = f" and {'as many' if same else s.data.unlabeled_images} unlabelled"
        text = (
            f"Network {networks}{backbone} ({weights:.1f} million weights), crops of "
            f"{s.data.crop[0]}x{s.data.crop[1]} pixels, {s.data.batch_size} labelled{beside} "
            f"images a step."
        )
        if alone := self.about.steps_without_unlabeled(s):
            text += f" The unlabelled ones join after iteration {alone}."
        begins = max(s.bank.start_after, alone)
        if self.about.contrasts(s) and begins < s.train.iterations:
            after = f"after iteration {begins}" if begins else "at once"
            text += f" The contrast begins {after}, once its queues are full."
        return text

    def warnings(self) -> list[str]:
        """Return a sentence for each thing that is allowed and probably not what the user meant."""
        found = []
        loss, total = self.settings.loss, self.settings.train.iterations
        if self.about.contrasts(self.settings) and self.settings.bank.start_after >= total:
            found.append(
                f"Warning: the contrast never begins, because `bank.start_after` "
                f"{self.settings.bank.start_after} is not below `train.iterations` {total}."
            )
        alone = self.about.steps_without_unlabeled(self.settings)
        if self.about.reads("loss.ct_ramp", self.pairs) and alone + loss.ct_ramp > total:
            after = f" after {alone} iterations without unlabelled images" if alone else ""
            found.append(
                f"Warning: the weight of the pseudo-labels never reaches its full value, because "
                f"`loss.ct_ramp` {loss.ct_ramp}{after} is above `train.iterations` {total}."
            )
        if self.settings.optim.warmup >= total:
            found.append(
                f"Warning: the learning rate never reaches its full value, because `optim.warmup` "
                f"{self.settings.optim.warmup} is not below `train.iterations` {total}."
            )
        mix, images = self.settings.views.mix, self.settings.data.unlabeled_images * self.processes
        if mix != "none" and images == 1 and self.about.reads("views.mix", self.pairs):
            found.append(
                f"Warning: `views.mix` {mix} changes nothing, because a step has a single "
                f"unlabelled image and none to mix it with. Give `data.unlabeled_batch_size` 2 or "
                f"more, or a larger `data.batch_size`."
            )
        for name in PER_PAIR:
            group, _, option = name.partition(".")
            values = getattr(getattr(self.settings, group), option)
            if unused := values[self.pairs :]:
                found.append(
                    f"Warning: `{name}` has {len(values)} values and `pairs` is {self.pairs}, so "
                    f"{listed(unused)} changes nothing."
                )
        labeled, pixels = self.settings.labeled, math.prod(self.settings.data.crop)
        if labeled.ohem and labeled.ohem_kept >= pixels and self.about.reads("labeled"):
            found.append(
                f"Warning: `labeled.ohem` changes nothing, because `labeled.ohem_kept` "
                f"{labeled.ohem_kept} is not below the {pixels} pixels of a crop, so all of them "
                f"are learnt. Give a part of them there, such as {pixels // 16}."
            )
        networks = self.settings.model.names
        own = self.settings.dataset == "folder" and self.device.type == "cpu"
        if own and "small" not in networks:
            found.append(
                f"Warning: there is no GPU for {networks[0]}. `recipe` folder-small trains a small "
                f"network in minutes."
            )
        if missing := classes_without_label(self.dataset, self.labeled):
            found.append(
                f"Warning: none of the {len(self.labeled)} labelled images shows "
                f"{', '.join(missing)}, so no network can learn it. Give more labelled images or "
                f"`split_labeled`, or check the masks by ctt-data check."
            )
        if missing := classes_without_label(self.dataset, self.dataset.eval_ids()):
            found.append(not_evaluated(self.dataset, missing))
        return found


def as_read(settings: Settings, about: methods.About) -> Settings:
    """Return the settings without masks and a teacher that the method does not read.

    The config.yaml of a run holds every setting, and may be given with another method; what `masks`
    or `teacher` name there is then neither looked at nor learnt from.
    """
    unread = {
        name: getattr(Settings(), name)
        for name in ("masks", "teacher")
        if not about.reads(name, settings.pairs)
    }
    return replace(settings, **unread)


def new_split(
    settings: Settings, dataset: Dataset, uses_unlabeled: bool
) -> tuple[list[str], list[str]]:
    """Return the labelled and unlabelled images of a new run, after a quick look at their files.

    Raises:
        UserError: lists or files that cannot be used, or nothing left to learn from.
    """
    s = settings
    labeled, unlabeled = make_split(dataset, s.ratio, s.seed, s.split_labeled, s.split_unlabeled)
    check_quickly(dataset, labeled, unlabeled if uses_unlabeled else [])
    masks = len(dataset.train_ids())
    if s.dataset == "folder" and s.split_labeled is None and len(labeled) < masks:
        dataset.notes += (
            f"`ratio` {s.ratio} takes {len(labeled)} of the {masks} training images with masks as "
            f"labelled, and leaves the masks of the others unused; `ratio` 1/1 uses all.",
        )
    if uses_unlabeled and not unlabeled:
        add = "Put images without masks into unlabeled/. Or lower"
        advice = add if s.dataset == "folder" else "Lower"
        raise UserError(
            f"`method` {s.method} learns from unlabelled images, but all {len(labeled)} training "
            f"images are labelled. {advice} `ratio`, or use `method` supervised."
        )
    return labeled, unlabeled


def teachers_of_run(
    settings: Settings, info: DatasetInfo
) -> tuple[Sequence[SegmentationModel], DatasetInfo] | None:
    """Return the networks that `teacher` names, and the dataset that they know.

    Of a run these are its teachers, or else its students.

    Raises:
        UserError: there are none, or they know other classes, or take other inputs.
    """
    if settings.teacher is None:
        return None
    path = expanded(settings.teacher, "`teacher`")
    if not (path.exists() or is_on_hub(path)):
        raise UserError(
            f"`teacher` {path}: it is not there. Give the folder of a finished run, or a file of "
            f"weights. If it was moved, a resumed run takes its new path."
        )
    trained = load_trained(path)
    if ENSEMBLE in trained.names():
        trained = trained.choose([ENSEMBLE])
    if trained.info.classes != info.classes:
        raise UserError(
            f"`teacher` {settings.teacher}: its networks know the {len(trained.info.classes)} "
            f"classes of {trained.info.name}, and {settings.dataset} has {len(info.classes)} of "
            f"its own. Give a run with the same classes in the same order."
        )
    # `distill` shows the teachers the images that the student sees, by their own mean and deviation
    same = trained.info.channels == info.channels
    alike = replace(trained.info, mean=info.mean, std=info.std) if same else trained.info
    if difference := first_difference(alike, info):
        raise UserError(
            f"`teacher` {settings.teacher}: its networks see other images than this run reads: "
            f"{difference}. Give both datasets the same bands, range and white in dataset.yaml, "
            f"or another teacher; mean and std may differ."
        )
    return list(trained.networks.values()), trained.info


def external_masks(
    settings: Settings, dataset: Dataset, unlabeled: list[str]
) -> ExternalMasks | None:
    """Return the masks that another model made of the unlabelled images, after a quick look.

    Raises:
        UserError: some are missing, or wrong among a handful of them.
    """
    s = settings.masks
    if s.folder is None:
        return None
    masks = ExternalMasks(dataset, s.folder, s.confidence)
    masks.check(unlabeled, handful(unlabeled))
    return masks


def split_of_run(
    folder: Path, dataset: Dataset, uses_unlabeled: bool
) -> tuple[list[str], list[str]]:
    """Return `new_split` for a run that goes on: the lists that it was started with."""
    run.hold_out(folder, dataset)
    run.check_evaluated(folder, dataset)
    labeled = read_list(folder / run.LABELED_LIST, dataset, labeled=True)
    path = folder / run.UNLABELED_LIST
    unlabeled = run.read_names(path)
    if uses_unlabeled and unlabeled:
        unlabeled = read_list(path, dataset, labeled=False)
    check_quickly(dataset, labeled, unlabeled if uses_unlabeled else [])
    return labeled, unlabeled


def classes_without_label(dataset: Dataset, names: list[str]) -> list[str]:
    """Return the names of the classes that the masks of none of these images show.

    Only lists of up to `FEW` images are read through; in longer ones a class is seldom missing, and
    reading them takes minutes.
    """
    if len(names) > FEW:
        return []
    seen: set[int] = set()
    for name in names:
        seen.update(torch.bincount(dataset.label(name).flatten()).nonzero().flatten().tolist())
        if len(seen - {IGNORE}) == len(dataset.info.classes):
            break
    return [name for c, name in enumerate(dataset.info.classes) if c not in seen]


def ready_to_train(network: M, settings: Settings, device: torch.device) -> M:
    """Return the network ready to train: on its device, channels_last, batch norms synchronised."""
    if settings.model.sync_batch_norm:
        network = synchronize(network, device)
    # a quarter less time on the CPU, tensor cores on GPUs, pixels as rows without a copy
    return network.to(memory_format=torch.channels_last).to(device)


def check_batch_norm(student: SegmentationModel, settings: Settings, images: int) -> None:
    """Refuse a batch that leaves a batch norm of the student a single value per channel.

    Args:
        images: of the smallest batch that it trains on.
    """
    if images > 1:
        return
    probe = copy.deepcopy(student).train()
    device = student.classifier.weight.device
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            channels = int(student.options["channels"])
            probe(torch.zeros(1, channels, *settings.data.crop, device=device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        data = settings.data
        beside = methods.get(settings.method).unlabeled
        more = f" with {data.unlabeled_images} unlabelled images" if beside else ""
        raise UserError(
            f"`data.batch_size` {data.batch_size}{more}: with one image at a time, as `method` "
            f"{settings.method} has it, a batch norm of {settings.model.name} gets a single value "
            f"per channel, which has no variance. Give at least two images"
            f"{', labelled and unlabelled (`data.unlabeled_batch_size`),' if beside else ''} to "
            f"each part of a step (`train.accumulate` {settings.train.accumulate}), or a larger "
            f"`data.crop`."
        ) from None


def check_crop(students: Iterable[SegmentationModel], settings: Settings) -> None:
    """Refuse crops that are not whole patches, for networks whose grid needs whole patches.

    Raises:
        UserError: names the crops that fit every network.
    """
    patches = {student.multiple for student in students if student.grid.cells}
    multiple = math.lcm(*patches)
    if any(side % multiple for side in settings.data.crop):
        near = (max(1, round(side / multiple)) * multiple for side in settings.data.crop)
        raise UserError(
            "`data.crop` {} {}: `model.name` dpt trains on whole patches of {} pixels. "
            "Give multiples of {}, such as {} {}.".format(
                *settings.data.crop, " and ".join(map(str, sorted(patches))), multiple, *near
            )
        )


def check_cuda_graph(settings: Settings, device: torch.device, processes: int) -> None:
    """Refuse a CUDA graph without a GPU or with several processes."""
    if settings.train.cuda_graph and (device.type != "cuda" or processes > 1):
        raise UserError(
            f"`train.cuda_graph` records the work of one process on a GPU, and this run has "
            f"{processes} on {device.type}. Leave it out."
        )


def check_iterations(settings: Settings, done: int) -> None:
    """Refuse to train for fewer iterations than a run has done.

    Raises:
        UserError: names both numbers.
    """
    total = settings.train.iterations
    if done > total:
        raise UserError(
            f"`train.iterations` {total}: the run has been trained for {done} iterations already. "
            f"Give at least {done}."
        )


def check_rounds(old: dict[str, Any], new: Settings) -> None:
    """Refuse settings that would move the rounds of a resumed run, or that its labels do not fit.

    Args:
        old: settings that the run has, as its checkpoint holds them.

    Raises:
        UserError: names the setting.
    """
    values = to_dict(new)
    resize = old["data"].get("resize")  # kept labels have the size that images had
    found: list[tuple[str, Any, Any]] = [
        ("`train.iterations`", old["train"]["iterations"], new.train.iterations),
        ("`data.resize`", resize and list(resize), values["data"]["resize"]),
    ]
    found += [
        (f"`options.{name}`", value, values["options"].get(name))
        for name, value in old.get("options", {}).items()
    ]
    for name, before, after in found:
        if before != after:
            raise UserError(
                f"{name} {after}: this run was started with {before}, and the rounds of "
                f"{new.method} depend on it. Leave it out, or start a new run."
            )


def check_joined(old: dict[str, Any], new: Settings, done: int) -> None:
    """Refuse to take the unlabelled images away from a resumed run that has seen them.

    Args:
        old: settings that the run has, as its checkpoint holds them.
        done: its iterations.

    Raises:
        UserError: names the setting, and the value that leaves them where they are.
    """
    total = new.train.iterations
    joined = int(old["loss"].get("ct_after", 0.0) * old["train"]["iterations"])
    again = methods.get(new.method).steps_without_unlabeled(new)
    if joined <= done < again:
        share = math.ceil(joined / total * 1e6) / 1e6  # rounded up, as steps are cut
        raise UserError(
            f"`loss.ct_after` {new.loss.ct_after:g} of `train.iterations` {total}: students would "
            f"see labelled images alone until iteration {again}, but the unlabelled images joined "
            f"this run after iteration {joined}. Give `loss.ct_after` {share:g}."
        )
