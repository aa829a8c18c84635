"""What the paper prints (Xiao et al., Neurocomputing 508, 2022): mIoU in percent.

Rows have the names that `ctt.experiments.catalog` gives them. A value that the paper does not print
is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

CITYSCAPES, VOC_AUG, VOC_CLASSIC = "cityscapes", "voc", "voc classic"

Row = Mapping[str, float]


def _row(shares: str, values: str) -> Row:
    """Return the values by share; `-` stands for none."""
    return {
        share: float(value)
        for share, value in zip(shares.split(), values.split(), strict=True)
        if value != "-"
    }


def _table(shares: str, rows: Mapping[str, str]) -> Mapping[str, Row]:
    return {name: _row(shares, values) for name, values in rows.items()}


# Tables 1 to 3, by dataset: the score of each method at each share of labels
SHARES = {
    CITYSCAPES: _table(
        "1/30 1/8 1/4 1/2 1/1",
        {
            "supervised": "48.36 57.74 61.63 63.13 66.76",
            "advsemiseg": "- 58.80 62.30 65.70 66.40",
            "s4gan": "- 59.30 61.90 - 66.00",
            "french": "51.20 60.34 63.87 - 67.53",
            "dst-cbc": "48.70 60.50 64.40 - 66.90",
            "classmix": "54.07 61.35 63.63 66.29 66.19",
            "dmt": "54.80 63.03 - - 68.16",
            "ecs": "- 60.26 63.77 - -",
            "cross-teacher": "59.53 64.04 65.83 67.83 -",
        },
    ),
    VOC_AUG: _table(
        "1/50 1/20 1/8 1/4 1/1",
        {
            "supervised": "55.69 61.36 67.14 70.20 74.26",
            "advsemiseg": "57.20 64.70 69.50 72.10 74.90",
            # the last one is so printed; the column beside it makes it 73.60
            "s4gan": "63.30 67.20 71.40 - 66.00",
            "french": "64.81 66.48 67.60 - 72.59",
            "dst-cbc": "65.50 69.30 70.70 71.80 73.60",
            "classmix": "66.15 67.77 71.00 72.45 74.13",
            "dmt": "67.15 69.92 72.70 - 74.75",
            "ecs": "- - 70.22 72.60 76.29",
            "gct": "- - 72.14 73.62 75.32",
            "semiseg-contrastive": "67.90 70.0 71.6 - 74.10",
            "cross-teacher": "69.24 72.02 73.66 75.07 -",
        },
    ),
    VOC_CLASSIC: _table(
        "92 183 366 732",
        {
            "supervised": "41.22 50.82 60.37 66.29",
            "advsemiseg": "39.69 47.58 59.97 65.27",
            "cct": "33.10 47.60 58.80 62.10",
            "gct": "46.04 54.98 64.71 70.67",
            "vat": "36.92 49.35 56.88 63.34",
            "french": "55.58 63.20 68.36 69.84",  # there as CutMix
            "pseudoseg": "57.60 65.50 69.14 72.41",
            "pc2seg": "57.00 66.28 69.78 73.05",
            "cross-teacher": "64.00 71.05 72.36 76.13",
        },
    ),
}

# The tables after them are all of Cityscapes with 1/8 of the labels. Table 4 lost the marks of its
# columns in print: the order of its rows is the likeliest one.
ELSEWHERE = "Cityscapes, 1/8"
TABLES = {
    "table4": {
        "supervised": 57.74,
        "cross teacher": 63.69,
        "high-level contrast": 60.79,
        "low-level contrast": 61.31,
        "both contrasts": 62.30,
        "cross teacher and high-level": 63.97,
        "cross teacher and low-level": 63.50,
        "all": 64.04,
    },
    "table5": {
        "direct mutual teaching": 60.35,
        "mean teacher": 61.35,
        "ensemble of two mean teachers": 61.47,
        "self-training": 60.75,
        "dual teachers": 62.42,
        "cross teacher": 63.69,
    },
    "table6": {"1 pair": 60.34, "2 pairs": 63.69, "3 pairs": 63.94},
    "table7": {"64": 60.91, "128": 62.30, "256": 61.83, "512": 62.36, "1024": 60.85},
    "table8": {"0": 60.79, "0.75": 62.30, "0.85": 62.24, "0.95": 62.16, "1": 61.31},
    "table9": {"every pixel": 61.69, "less confident pixels": 62.30},
}


def printed(experiment: str, data: str, share: str, variant: str) -> float | None:
    """Return the paper's score of a row, or None.

    Args:
        data: the dataset, of VOC's classic set `voc classic`.
        share: as `ratio` has it.
    """
    if experiment in TABLES:
        return TABLES[experiment].get(variant)
    return SHARES.get(data, {}).get(variant, {}).get(share)
