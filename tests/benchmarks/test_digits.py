from benchmarks.digits import NETWORKS, table


def row(method: str, seed: int, *scores: float) -> dict[str, str]:
    values = dict(zip(NETWORKS, (str(s or "") for s in scores), strict=True))
    return {"method": method, "seed": str(seed), "iterations": "9", "seconds": "2", **values}


def test_means_and_leads() -> None:
    rows = [
        row("mean teacher", 0, 40, 0, 41, 0, 41),
        row("mean teacher", 1, 44, 0, 43, 0, 43),
        row("cross teacher + contrast", 0, 1, 1, 1, 1, 1),  # an older row of the same run
        row("cross teacher + contrast", 0, 50, 51, 52, 49, 53),
        row("cross teacher + contrast", 1, 50, 51, 54, 49, 55),
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| mean teacher | 42.0 ± 2.8 | 42.0 ± 1.4 |  | 0, 1 | 9 |"
    assert lines[3].startswith(
        "| cross teacher + contrast | 51.0 ± 0.0 | 53.0 ± 1.4 | 54.0 ± 1.4 |"
    )
    assert lines[-1].endswith("over mean teacher, seed by seed: 12.0, 11.0")
