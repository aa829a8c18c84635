"""The experiments by name: the paper's tables, and the questions that the paper leaves open."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from ctt.errors import UserError
from ctt.experiments import paper
from ctt.settings import Settings

NO_CONTRAST = ("--loss.hc", "0", "--loss.lc", "0")
EQUAL_ITERATIONS = "equal iterations"


@dataclass(frozen=True)
class Variant:
    """One way of training, a row of a table.

    Attributes:
        options: those of `ctt-train` that make it.
    """

    name: str
    options: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """Return the name of its method."""
        return dict(itertools.pairwise(self.options)).get("--method", Settings.method)


@dataclass(frozen=True)
class Experiment:
    """Runs that are compared.

    Attributes:
        what: what it asks, in one line.
        source: where it comes from.
        variants: the first is what the others are compared with, unless `baseline` names another.
        shares: labelled shares by dataset (of VOC's classic set `voc classic`); none: that of the
            recipe.
        budgets: costs of the runs, as shares of the costliest variant's with the iterations of the
            recipe; every variant gets the iterations that it can do for it (`budgets.iterations`).
            None: the iterations of the recipe for all.
    """

    what: str
    source: str
    variants: tuple[Variant, ...]
    baseline: str = ""
    shares: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    budgets: tuple[Fraction, ...] = ()

    @property
    def compared_with(self) -> str:
        """Return the name of the variant that the others are compared with."""
        return self.baseline or self.variants[0].name

    def chosen(self, names: Sequence[str]) -> list[Variant]:
        """Return the variants of these names; all for no name.

        Raises:
            UserError: there is none of a name.
        """
        known = {variant.name: variant for variant in self.variants}
        for name in names:
            if name not in known:
                raise UserError(f"`only` {name}: no such row. Rows: {', '.join(known)}.")
        return [v for v in self.variants if not names or v.name in names]


def plain(*names: str) -> tuple[Variant, ...]:
    """Return a variant for each of these methods."""
    return tuple(Variant(name, ("--method", name)) for name in names)


def values(option: str, *numbers: str) -> tuple[Variant, ...]:
    """Return a variant for each value of an option."""
    return tuple(Variant(number, (option, number)) for number in numbers)


SUPERVISED = Variant("supervised", ("--method", "supervised"))
MEAN_TEACHER = Variant("mean teacher", ("--method", "mean-teacher"))
ENSEMBLE = Variant("ensemble of two mean teachers", ("--method", "mean-teacher-ensemble"))
CROSS_TEACHER = Variant("cross teacher", NO_CONTRAST)
ALL = Variant("cross teacher and contrast")
LADDER = (SUPERVISED, MEAN_TEACHER, ENSEMBLE, CROSS_TEACHER, ALL)
# encoders whose ImageNet weights Python packages bring
IMAGENET_ENCODERS = (
    *("--model.name", "deeplabv3plus", "--model.output-stride", "16"),
    *("--model.weights", "imagenet", "--model.normalization", "weights"),
)
WITHOUT_CT = ("--loss.ct", "0")  # what Tables 7 to 9 vary is measured without the cross teacher
# Tables 4 to 9 are all of Cityscapes with an eighth of the labels
PAPER_SHARE = {paper.CITYSCAPES: ("1/8",)}

EXPERIMENTS = {
    "shares": Experiment(
        "every method of the paper's tables at several shares of labels",
        "Tables 1 to 3",
        plain(
            "supervised",
            "mean-teacher",
            "advsemiseg",
            "s4gan",
            "french",
            "vat",
            "dst-cbc",
            "classmix",
            "dmt",
            "ecs",
            "cct",
            "gct",
            "pseudoseg",
            "pc2seg",
            "semiseg-contrastive",
            "cross-teacher",
        ),
        shares={
            paper.CITYSCAPES: ("1/30", "1/8", "1/4", "1/2", "1/1"),
            paper.VOC_AUG: ("1/50", "1/20", "1/8", "1/4", "1/1"),
            paper.VOC_CLASSIC: ("92", "183", "366", "732"),
            "digits": ("20", "50", "100", "200", "1/1"),
            "earth": ("20", "50", "100", "200", "1/1"),
        },
    ),
    "table4": Experiment(
        "which parts of the objective are worth what",
        "Table 4",
        (
            SUPERVISED,
            CROSS_TEACHER,
            Variant("high-level contrast", (*WITHOUT_CT, "--loss.lc", "0")),
            Variant("low-level contrast", (*WITHOUT_CT, "--loss.hc", "0")),
            Variant("both contrasts", WITHOUT_CT),
            Variant("cross teacher and high-level", ("--loss.lc", "0")),
            Variant("cross teacher and low-level", ("--loss.hc", "0")),
            Variant("all"),
        ),
        shares=PAPER_SHARE,
    ),
    "table5": Experiment(
        "which networks should label for which",
        "Table 5",
        (
            Variant("direct mutual teaching", ("--method", "cps")),
            MEAN_TEACHER,
            ENSEMBLE,
            Variant("self-training", ("--method", "self-training")),
            Variant("dual teachers", ("--method", "dual-teachers")),
            CROSS_TEACHER,
        ),
        baseline="mean teacher",
        shares=PAPER_SHARE,
    ),
    "table6": Experiment(
        "how many pairs of student and teacher",
        "Table 6",
        tuple(
            Variant(f"{k} pair{'s' * (k > 1)}", ("--pairs", str(k), "--loss.hc", "0", *no_peer))
            for k, no_peer in ((1, ()), (2, ("--loss.lc", "0")), (3, ("--loss.lc", "0")))
        ),
        baseline="2 pairs",
        shares=PAPER_SHARE,
    ),
    "table7": Experiment(
        "how many keys of each class a bank holds",
        "Table 7",
        tuple(
            Variant(v.name, (*v.options, *WITHOUT_CT))
            for v in values("--bank.capacity", "64", "128", "256", "512", "1024")
        ),
        baseline="128",
        shares=PAPER_SHARE,
    ),
    "table8": Experiment(
        "from which confidence on a pixel belongs to the high-level contrast",
        "Table 8",
        tuple(
            Variant(v.name, (*v.options, *WITHOUT_CT))
            for v in values("--loss.gamma", "0", "0.75", "0.85", "0.95", "1")
        ),
        baseline="0.75",
        shares=PAPER_SHARE,
    ),
    "table9": Experiment(
        "low-level contrast of every pixel, or of those where the peer is more confident",
        "Table 9",
        (
            Variant("every pixel", ("--loss.no-directional", *WITHOUT_CT)),
            Variant("less confident pixels", ("--loss.directional", *WITHOUT_CT)),
        ),
        shares=PAPER_SHARE,
    ),
    "tau": Experiment(
        "the temperature of both contrasts, which the paper does not print",
        "Open question",
        tuple(
            Variant(t, ("--loss.tau-hc", t, "--loss.tau-lc", t))
            for t in ("0.05", "0.1", "0.2", "0.5", "1")
        ),
        baseline="0.5",
    ),
    "top-k": Experiment(
        "among how many confident pixels keys are drawn, which the paper does not print",
        "Open question",
        (
            *values("--bank.top-k", "16", "64", "256", "1024"),
            Variant("the most confident", ("--bank.no-random-choice",)),
        ),
        baseline="256",
    ),
    "averaging": Experiment(
        "means over the pixels of each class or over all; teachers' batch norm copied or averaged",
        "Open question",
        (
            Variant("pixels of each class", ("--loss.contrast-reduction", "class")),
            Variant("all pixels", ("--loss.contrast-reduction", "mean")),
            Variant("averaged batch norm", ("--ema.buffers", "average")),
        ),
    ),
    "confidence": Experiment(
        "how teachers' confidence weighs their labels, and what the sum is divided by",
        "Open question",
        (
            Variant("none", ("--loss.confidence-weight", "none")),
            Variant("uniform", ("--loss.confidence-weight", "uniform")),
            *(
                Variant(
                    f"threshold, mean over {mean} pixels",
                    ("--loss.confidence-weight", "threshold", "--loss.unlabeled-mean", mean),
                )
                for mean in ("kept", "valid", "all")
            ),
        ),
    ),
    "mask": Experiment(
        "whose confidence decides which contrast a pixel belongs to",
        "Open question",
        values("--loss.hc-confidence", "student", "teacher"),
    ),
    "labelers": Experiment(
        "whose labels a student of two pairs learns",
        "Open question",
        (
            Variant("the other teacher's", NO_CONTRAST),
            Variant("its own teacher's", ("--method", "mean-teacher-ensemble")),
            Variant("both teachers'", ("--method", "dual-teachers")),
            Variant("the other student's", ("--method", "cps")),
        ),
    ),
    "ladder": Experiment(
        "what each step from supervised to cross-teacher training with contrast is worth",
        "Open question",
        LADDER,
    ),
    "encoders": Experiment(
        "whether two different encoders teach each other better than two of the same kind",
        "Open question",
        tuple(
            Variant(name, (*IMAGENET_ENCODERS, "--model.backbone", *backbones))
            for name, *backbones in (
                ("one of each", "tf_efficientnet_lite0", "mobilenetv2_100"),
                ("two EfficientNet-Lite0", "tf_efficientnet_lite0"),
                ("two MobileNetV2", "mobilenetv2_100"),
            )
        ),
    ),
    "cost": Experiment(
        "what a method is worth for the same iterations, and for the same cost",
        "Open question",
        LADDER,
        baseline="mean teacher",
        budgets=(Fraction(1, 4), Fraction(1, 2), Fraction(1)),
    ),
}


def get(name: str) -> Experiment:
    """Return an experiment.

    Raises:
        UserError: there is none of that name.
    """
    if name not in EXPERIMENTS:
        raise UserError(f"{name}: no such experiment. Experiments: {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[name]
