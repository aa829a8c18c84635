"""What is known of each method without loading it: `--help` and `--list-methods` must be quick."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ctt.errors import UserError
from ctt.files import expanded
from ctt.methods.options import Options

if TYPE_CHECKING:
    from ctt.methods.base import Method
    from ctt.settings import Settings

GROUP = "ctt.methods"  # of entry points, by which packages offer methods
LABELING = (
    "loss.ct",
    "loss.ct_ramp",
    "loss.ct_after",
    "loss.confidence_weight",
    "loss.confidence_threshold",
    "loss.unlabeled_mean",
)
LOW_LEVEL = ("loss.lc", "loss.tau_lc", "loss.directional", "loss.lc_pixels")
CONTRAST = (
    "bank",
    "loss.hc",
    "loss.tau_hc",
    "loss.gamma",
    "loss.hc_confidence",
    "loss.contrast_stride",
    "loss.contrast_reduction",
)
TAUGHT = ("ema", "loss.sup", "labeled", "masks", "views", "views.mix", *LABELING)
SHARED = (*TAUGHT, "loss.labels_from", "teacher", *CONTRAST, *LOW_LEVEL)
KEPT = (
    "ema",
    "views",
    "loss.sup",
    "labeled",
    "loss.ct",
    "loss.confidence_weight",
    "loss.confidence_threshold",
    "loss.unlabeled_mean",
    "views.mix",
)


@dataclass(frozen=True)
class About:
    """Facts of a method.

    Attributes:
        paper: its source, in one line.
        target: where it is, `module:Class` or `file.py:Class`.
        pairs: K if the user gives none.
        unlabeled: whether it takes unlabelled images.
        paired: whether it pairs each labelled image with an unlabelled one, and so takes as many.
        uses: settings of the run, or groups of them, that it reads among those that only some
            methods read.
        options: class of the settings that it alone has; by its name, `module:Class`, where its
            module is not to be imported before it is chosen.
        contrast: whether the high-level and low-level contrast belong to it.
        extra: what is trained or kept beside the students and their teachers, in words.
        cost: of a step with its own number of pairs, as a multiple of a mean teacher's (measured
            on a CPU); 0: not measured.
    """

    paper: str = ""
    target: str = ""
    pairs: int = 1
    unlabeled: bool = True
    paired: bool = False
    uses: tuple[str, ...] = ()
    options: type[Options] | str = Options
    contrast: bool = False
    extra: str = ""
    cost: float = 0.0

    def unused(self, pairs: int) -> tuple[str, ...]:
        """Return the settings, or groups of settings, that change nothing under this method."""
        # one student has no peer
        lonely = (*LOW_LEVEL, "loss.labels_from") if pairs == 1 else ()
        found = [name for name in SHARED if name not in self.uses or name in lonely]
        if self.paired or not self.unlabeled:
            found.append("data.unlabeled_batch_size")
        return tuple(found)

    def reads(self, name: str, pairs: int = 0) -> bool:
        """Return whether a setting, such as `bank.capacity`, may change something.

        Args:
            pairs: K; 0: that of the method.
        """
        unused = self.unused(pairs or self.pairs)
        return name not in unused and name.partition(".")[0] not in unused

    def contrasts(self, settings: Settings) -> bool:
        """Return whether steps of the run contrast pixels: the low-level contrast needs a peer."""
        loss, pairs = settings.loss, settings.pairs or self.pairs
        return self.contrast and (loss.hc > 0 or (loss.lc > 0 and pairs > 1))

    def steps_without_unlabeled(self, settings: Settings) -> int:
        """Return how many steps of the run see labelled images alone, see `loss.ct_after`."""
        if not self.reads("loss.ct_after", settings.pairs):
            return 0
        return int(settings.loss.ct_after * settings.train.iterations)

    def option_class(self) -> type[Options]:
        """Return the class of the settings that the method alone has."""
        if not isinstance(self.options, str):
            return self.options
        module, _, name = self.options.partition(":")
        found: type[Options] = getattr(import_module(module), name)
        return found

    def load(self) -> type[Method]:
        """Return the class.

        Raises:
            UserError: it is none of a method, or its file cannot be run.
        """
        return load(self.target)


METHODS = {
    "cross-teacher": About(
        "Xiao et al., Neurocomputing 508, 2022",
        "ctt.methods.cross_teacher:CrossTeacher",
        pairs=2,
        uses=(*TAUGHT, "loss.labels_from", *CONTRAST, *LOW_LEVEL),
        contrast=True,
        extra="banks of features",
        cost=2.4,
    ),
    "supervised": About(
        "the labelled images alone",
        "ctt.methods.supervised:Supervised",
        unlabeled=False,
        uses=("ema", "views", "loss.sup", "labeled"),
        cost=0.5,
    ),
    "mean-teacher": About(
        "Tarvainen and Valpola, NeurIPS 2017, with hard labels",
        "ctt.methods.mean_teacher:MeanTeacher",
        uses=TAUGHT,
        cost=1.0,
    ),
    "mean-teacher-soft": About(
        "Tarvainen and Valpola, NeurIPS 2017",
        "ctt.methods.mean_teacher_soft:MeanTeacherSoft",
        uses=("ema", "views", "loss.sup", "labeled", "views.mix"),
        options="ctt.methods.mean_teacher_soft:MeanTeacherSoftOptions",
        cost=1.0,
    ),
    "mean-teacher-ensemble": About(
        "Xiao et al., 2022, Table 5: two mean teachers",
        "ctt.methods.mean_teacher:MeanTeacher",
        pairs=2,
        uses=TAUGHT,
        cost=2.0,
    ),
    "french": About(
        "French et al., BMVC 2020: CutMix, Cutout, CowMix",
        "ctt.methods.french:French",
        uses=("ema", "views", "loss.sup", "labeled"),
        options="ctt.methods.french:FrenchOptions",
        cost=1.0,
    ),
    "vat": About(
        "Miyato et al., TPAMI 2018, as in the program of French et al.",
        "ctt.methods.vat:Vat",
        uses=("ema", "views", "loss.sup", "labeled"),
        options="ctt.methods.vat:VatOptions",
        cost=1.5,
    ),
    "classmix": About(
        "Olsson et al., WACV 2021",
        "ctt.methods.classmix:ClassMix",
        uses=("ema", "views", "loss.sup", "labeled"),
        options="ctt.methods.classmix:ClassMixOptions",
        cost=1.0,
    ),
    "self-training": About(
        "Xiao et al., 2022, Table 5: labels of a first training",
        "ctt.methods.self_training:SelfTraining",
        uses=KEPT,
        options="ctt.methods.self_training:SelfTrainingOptions",
        extra="rounds",
        cost=0.8,
    ),
    "st": About(
        "Yang et al., CVPR 2022, ST",
        "ctt.methods.st:St",
        uses=("ema", "views", "loss.sup", "labeled", "loss.ct"),
        options="ctt.methods.st:StOptions",
        extra="rounds",
        cost=0.9,
    ),
    "st++": About(
        "Yang et al., CVPR 2022, ST++",
        "ctt.methods.st:StPlusPlus",
        uses=("ema", "views", "loss.sup", "labeled", "loss.ct"),
        options="ctt.methods.st:StPlusPlusOptions",
        extra="rounds, two copies of each student",
        cost=0.9,
    ),
    "dst-cbc": About(
        "Feng et al., 2020, arXiv 2004.08514v1",
        "ctt.methods.dst_cbc:DstCbc",
        uses=("ema", "views", "loss.sup", "labeled", "loss.ct", "views.mix"),
        options="ctt.methods.dst_cbc:DstCbcOptions",
        extra="rounds",
        cost=0.8,
    ),
    "dmt": About(
        "Feng et al., Pattern Recognition 130, 2022",
        "ctt.methods.dmt:Dmt",
        pairs=2,
        uses=("ema", "views", "loss.sup", "labeled", "loss.ct", "views.mix"),
        options="ctt.methods.dmt:DmtOptions",
        extra="rounds",
        cost=0.9,
    ),
    "distill": About(
        "Hinton et al., 2015: a finished run teaches",
        "ctt.methods.distill:Distill",
        uses=("ema", "loss.sup", "labeled", "views", "views.mix", "teacher"),
        options="ctt.methods.distill:DistillOptions",
        extra="the networks of the run that teaches",
    ),
    "cps": About(
        "Chen et al., CVPR 2021",
        "ctt.methods.cps:CrossPseudoSupervision",
        pairs=2,
        uses=TAUGHT,
        cost=2.1,
    ),
    "dual-teachers": About(
        "Xiao et al., 2022, Table 5",
        "ctt.methods.dual_teachers:DualTeachers",
        pairs=2,
        uses=TAUGHT,
        cost=1.9,
    ),
    "unimatch": About(
        "Yang et al., CVPR 2023, as in its program",
        "ctt.methods.unimatch:UniMatch",
        uses=("ema", "views", "loss.sup", "labeled", "masks"),
        options="ctt.methods.unimatch:UniMatchOptions",
        cost=1.9,
    ),
    "unimatch-v2": About(
        "Yang et al., TPAMI 2025, as in its program",
        "ctt.methods.unimatch_v2:UniMatchV2",
        uses=("ema", "views", "loss.sup", "labeled", "masks"),
        options="ctt.methods.unimatch_v2:UniMatchV2Options",
        cost=1.4,
    ),
    "pseudoseg": About(
        "Zou et al., ICLR 2021, as in its program",
        "ctt.methods.pseudoseg:PseudoSeg",
        uses=("ema", "views", "loss.sup", "labeled"),
        options="ctt.methods.pseudoseg:PseudoSegOptions",
        extra="a classifier of images and an attention module",
        cost=1.4,
    ),
    "semiseg-contrastive": About(
        "Alonso et al., ICCV 2021",
        "ctt.methods.semiseg_contrastive:SemiSegContrastive",
        uses=("ema", "views", "loss.sup", "labeled"),
        options="ctt.methods.semiseg_contrastive:ContrastiveOptions",
        extra="heads, selectors, memories of features",
        cost=2.0,
    ),
    "pc2seg": About(
        "Zhong et al., ICCV 2021, our reading",
        "ctt.methods.pc2seg:Pc2Seg",
        uses=("ema", "views", "loss.sup", "labeled"),
        options="ctt.methods.pc2seg:Pc2SegOptions",
        extra="projections, memories of features",
        cost=1.6,
    ),
    "c3-semiseg": About(
        "Zhou et al., ICCV 2021",
        "ctt.methods.c3_semiseg:C3SemiSeg",
        paired=True,
        uses=("ema", "views", "loss.sup", "labeled"),
        options="ctt.methods.c3_semiseg:C3Options",
        extra="embedding heads, a threshold for each class",
        cost=2.6,
    ),
    "u2pl": About(
        "Wang et al., CVPR 2022",
        "ctt.methods.u2pl:U2pl",
        uses=("ema", "views", "loss.sup", "labeled"),
        options="ctt.methods.u2pl:U2plOptions",
        extra="representation heads, banks of negatives",
        cost=2.2,
    ),
    "cct": About(
        "Ouali et al., CVPR 2020, without guided cutout",
        "ctt.methods.cct:Cct",
        uses=(
            "loss.sup",
            "labeled",
        ),
        options="ctt.methods.cct:CctOptions",
        extra="24 auxiliary decoders",
        cost=1.5,
    ),
    "fixmatch": About(
        "Sohn et al., NeurIPS 2020",
        "ctt.methods.fixmatch:FixMatch",
        uses=TAUGHT,
        cost=1.0,
    ),
    "advsemiseg": About(
        "Hung et al., BMVC 2018, as in its program",
        "ctt.methods.advsemiseg:AdvSemiSeg",
        uses=(
            "loss.sup",
            "labeled",
        ),
        options="ctt.methods.advsemiseg:AdvSemiSegOptions",
        extra="a discriminator for each student",
        cost=1.2,
    ),
    "s4gan": About(
        "Mittal et al., TPAMI 2021, the GAN branch alone",
        "ctt.methods.s4gan:S4Gan",
        uses=(
            "loss.sup",
            "labeled",
        ),
        options="ctt.methods.s4gan:S4GanOptions",
        extra="a discriminator of images for each student",
        cost=1.1,
    ),
    "gct": About(
        "Ke et al., ECCV 2020, as in PixelSSL",
        "ctt.methods.gct:Gct",
        pairs=2,
        uses=(
            "loss.sup",
            "labeled",
        ),
        options="ctt.methods.gct:GctOptions",
        extra="a flaw detector",
        cost=3.8,
    ),
    "ecs": About(
        "Mendel et al., ECCV 2020, our reading of the abstract",
        "ctt.methods.ecs:Ecs",
        uses=(
            "loss.sup",
            "labeled",
        ),
        options="ctt.methods.ecs:EcsOptions",
        extra="a correction network for each student",
        cost=2.2,
    ),
}


def names() -> list[str]:
    """Return the names of the methods that come with the package."""
    return list(METHODS)


def installed() -> dict[str, EntryPoint]:
    """Return the methods that other installed packages offer, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def get(name: str) -> About:
    """Return the facts of a method.

    Args:
        name: one of `names`, or of `installed`, or a class in a file, `my_method.py:MyMethod`.

    Raises:
        UserError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    if own_file(name) is not None:
        return dataclasses.replace(load(name).about, target=name)
    others = installed()
    if name in others:
        target = others[name].value
        return dataclasses.replace(load(target).about, target=target)
    raise UserError(
        f"`method` {name}: no such method. Methods: {', '.join([*names(), *others])}; or give a "
        f"class of your own as my_method.py:MyMethod."
    )


def own_file(name: str) -> tuple[Path, str] | None:
    """Return the file and the class of a method given as file.py:Class; None of other names."""
    place, _, found = name.rpartition(":")
    return (Path(place), found) if place.endswith(".py") else None


def absolute(name: str) -> str:
    """Return the name of a method; that of a class in a file with the whole path of the file."""
    own = own_file(name)
    return f"{expanded(own[0], '`method`').absolute()}:{own[1]}" if own else name


@functools.cache
def load(target: str) -> type[Method]:
    """Return the class that a target names.

    Args:
        target: `module:Class`, or `file.py:Class`, whose file is run.

    Raises:
        UserError: it is none of a method, or its file cannot be run.
    """
    from ctt.methods.base import Method

    place, _, name = target.rpartition(":")
    own = own_file(target)
    try:
        module = run_file(own[0]) if own else import_module(place)
    except FileNotFoundError:
        raise UserError(f"`method` {target}: there is no file {place}.") from None
    except (Exception, SystemExit) as error:  # code of the user can raise anything
        raise UserError(
            f"`method` {target}: {place} cannot be run ({type(error).__name__}: {error})."
        ) from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(
            f"`method` {target}: {place} has no class {name} that is a ctt.methods.base.Method."
        )
    if fault := _fault_of(found.about):
        raise UserError(f"`method` {target}: {fault}")
    return found


def _fault_of(about: object) -> str:
    """Return what is wrong with the facts that a method states of itself, if anything."""
    if not isinstance(about, About):
        return "`about` must be an About, such as About('Author, Venue Year')."
    options: Any = about.options
    if not isinstance(options, type | str):
        return f"`options` of `about` is {options!r}, no class. Give the class itself."
    if not isinstance(options, str) and not issubclass(options, Options):
        return f"`options` of `about` is {options.__name__}, no subclass of Options."
    if isinstance(about.uses, tuple | list) and all(name in SHARED for name in about.uses):
        return ""
    return (
        f"`uses` of `about` must be a tuple of {', '.join(SHARED)}; got {about.uses!r}. Other "
        f"settings count for every method."
    )


def run_file(path: Path) -> ModuleType:
    """Return the module that a file makes, which can be found again under its name."""
    if not path.is_file():
        raise FileNotFoundError(path)
    name = f"ctt_method_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module
