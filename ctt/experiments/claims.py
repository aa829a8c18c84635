"""The orders that the paper argues with in Tables 4 to 9, beside the differences measured here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ctt.experiments import paper, results
from ctt.experiments.results import Difference, Row

# By table, what the text of the paper compares: a row and the one that it is set against.
CLAIMS = {
    "table4": (
        ("cross teacher", "supervised"),
        ("high-level contrast", "supervised"),
        ("low-level contrast", "supervised"),
        ("both contrasts", "supervised"),
        ("cross teacher and high-level", "cross teacher"),
        ("cross teacher and low-level", "cross teacher"),
        ("all", "cross teacher"),
    ),
    "table5": (
        ("cross teacher", "mean teacher"),
        ("cross teacher", "ensemble of two mean teachers"),
        ("cross teacher", "dual teachers"),
        ("cross teacher", "direct mutual teaching"),
        ("cross teacher", "self-training"),
    ),
    "table6": (("2 pairs", "1 pair"), ("3 pairs", "2 pairs")),
    "table7": (("128", "64"), ("128", "1024")),
    "table8": (("0.75", "0"), ("0.75", "1")),
    "table9": (("less confident pixels", "every pixel"),),
}
COLUMNS = ("comparison", f"paper: {paper.ELSEWHERE}", "here", "seeds", "what these runs show")
LEGEND = (
    "The paper prints one score for each row. Its differences are beside the mean differences of "
    "these runs, seed by seed, with their 95 % confidence intervals, of which about one of twenty "
    "misses the true difference by chance. Two rows have the same iterations, but not always the "
    "same cost."
)


def compared(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Yield a line for each claim of a table: the comparison, the paper's difference, the one
    measured, the number of seeds, and what it shows. Claims without runs are left out.

    Args:
        rows: finished runs of one experiment with the same labels and budget.
    """
    experiment = rows[0]["experiment"]
    own = {variant: some for (variant,), some in results.groups(rows, "variant").items()}
    for ours, other in CLAIMS.get(experiment, ()):
        found = results.difference(own.get(ours, []), own.get(other, []), "last")
        if found is not None:
            printed = paper.TABLES[experiment][ours] - paper.TABLES[experiment][other]
            name = f"{experiment.replace('table', 'Table ')}: {ours} above {other}"
            yield name, f"{printed:+.2f}", str(found), str(found.pairs), shown(found, printed)


def shown(found: Difference, printed: float) -> str:
    """Return in words what a measured difference says of one that the paper prints."""
    if found.low is None or found.high is None:
        return "nothing with one seed"
    if found.low <= 0 <= found.high:
        if found.low <= printed <= found.high:
            return "no order; the paper's difference is possible"
        return f"no order; {'less' if printed > found.high else 'more'} than in the paper"
    return "the paper's order" if (found.low > 0) == (printed > 0) else "the opposite order"
