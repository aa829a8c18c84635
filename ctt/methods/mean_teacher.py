"""Mean teacher (Tarvainen and Valpola, 2017) with hard labels: the baseline of teaching."""

from ctt.methods.pseudo_labels import PseudoLabels


class MeanTeacher(PseudoLabels):
    """Each student is taught by the running average of itself."""

    def taught_by(self, k: int) -> list[int]:
        return [k]
