"""Training on the labelled images alone: the floor that every other method is held against."""

from ctt.methods.base import Batch, Step
from ctt.methods.pseudo_labels import PseudoLabels


class Supervised(PseudoLabels):
    """Equations (1)(2); the teacher is then a mere running average of its student."""

    terms = ("sup",)
    logged = ()

    def prepare(self, b: Batch, step: Step) -> Batch:
        return b | {"pixels": step.count(b["label"])} | self.draws(b, step, unlabeled=0)
