"""Settings that one method alone has, `--options.NAME`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Check = tuple[str, Any, bool, str]
"""An option, its value, whether it is good, and the rule that it must keep."""


@dataclass(frozen=True)
class Options:
    """No settings: the base of all."""

    def checks(self) -> list[Check]:
        """Return what the values must fulfil."""
        return []


def at_least_0(**options: float) -> list[Check]:
    """Return a check for each option: weights, and other numbers that may be 0."""
    return [
        _check(name, value, value >= 0, "must be at least 0") for name, value in options.items()
    ]


def above_0(**options: float) -> list[Check]:
    return [_check(name, value, value > 0, "must be above 0") for name, value in options.items()]


def shares(**options: float) -> list[Check]:
    return [
        _check(name, value, 0 <= value <= 1, "must be in 0..1") for name, value in options.items()
    ]


def _check(name: str, value: float, good: bool, rule: str) -> Check:
    return f"--options.{name.replace('_', '-')}", value, good, rule


@dataclass(frozen=True)
class CriticOptions(Options):
    """Of methods with a network that judges predictions."""

    critic_lr: float = 1e-4
    """Learning rate of the critic at the start; it falls as that of the students does."""

    def checks(self) -> list[Check]:
        return above_0(critic_lr=self.critic_lr)


@dataclass(frozen=True)
class AdvSemiSegOptions(CriticOptions):
    """Values of the README's command of hfslyc/AdvSemiSeg."""

    adv: float = 0.01
    """Weight of passing for a mask on labelled images (the program's default is 0.1)."""
    adv_unlabeled: float = 0.001
    """Weight of passing for a mask on unlabelled images."""
    semi: float = 0.1
    """Weight of the student's own labels where the discriminator believes them."""
    threshold: float = 0.2
    """Probability of being a mask from which a pixel is believed."""
    start: float = 0.25
    """Share of the run before own labels are learnt (5,000 of 20,000 iterations)."""

    def checks(self) -> list[Check]:
        return [
            *super().checks(),
            *at_least_0(adv=self.adv, adv_unlabeled=self.adv_unlabeled, semi=self.semi),
            *shares(threshold=self.threshold, start=self.start),
        ]


@dataclass(frozen=True)
class S4GanOptions(CriticOptions):
    """Values of train_s4GAN.py of sud0301/semisup-semseg, for VOC; `critic_lr` is 1e-5 on
    Cityscapes."""

    fm: float = 0.1
    """Weight of feature matching."""
    st: float = 1.0
    """Weight of the student's own labels on images that the critic takes for masks."""
    threshold: float = 0.6
    """Probability of being a mask above which an image is learnt (Cityscapes: 0.7)."""

    def checks(self) -> list[Check]:
        weights = at_least_0(fm=self.fm, st=self.st)
        return [*super().checks(), *weights, *shares(threshold=self.threshold)]
