"""What unlabelled images are worth: ways of training on the embedded digits, three seeds each.

    python -m benchmarks.digits run      trains what has not been trained yet, and appends the rows
    python -m benchmarks.digits table    prints the table of the rows

All runs share the recipe, the iterations and, seed by seed, the labelled images and the order of
the data. Scores are those after the last iteration on the validation images.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "training" / "digits.csv"
METHODS = {
    "supervised": ["--method", "supervised"],
    "mean teacher": ["--method", "mean-teacher"],
    "cross teacher": ["--method", "cross-teacher", "--loss.hc", "0", "--loss.lc", "0"],
    "cross teacher + contrast": ["--method", "cross-teacher"],
    "the same, compiled and in bfloat16": ["--train.compile", "network", "--train.amp", "bf16"],
}
NETWORKS = ("student_1", "student_2", "teacher_1", "teacher_2", "ensemble")
COLUMNS = (
    "method",
    "seed",
    *NETWORKS,
    "labeled",
    "unlabeled",
    "iterations",
    "seconds",
    "recipe",
    "settings_hash",
    "ctt",
    "torch",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--recipe", default="digits-long")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs") / "digits-comparison")
    arguments = parser.parse_args()
    if arguments.action == "run":
        run_all(arguments)
    print(table([row for row in read_rows() if row["recipe"] == arguments.recipe]))


def run_all(arguments: argparse.Namespace) -> None:
    recipe: str = arguments.recipe
    # the longest first, so that no core waits at the end
    wanted = [(name, seed) for name in reversed(arguments.methods) for seed in arguments.seeds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = pool.map(lambda job: train(recipe, *job, arguments.out), wanted)
        for (name, seed), summary in zip(wanted, done, strict=True):
            append(name, seed, recipe, summary)


def train(recipe: str, name: str, seed: int, out: Path) -> dict[str, object]:
    """Train one run, or go on with it, or take what it has left behind."""
    folder = out / f"{recipe}-{name.replace(' + ', '-').replace(' ', '-')}-{seed}"
    if not (folder / "summary.json").is_file():
        program = [sys.executable, "-c", "from ctt.cli.train import main; main()"]
        if (folder / "checkpoints" / "last.pt").is_file():
            arguments = ["--resume", str(folder)]
        else:
            arguments = ["--recipe", recipe, "--seed", str(seed), "--out", str(folder)]
            arguments += [*METHODS[name], "--train.threads", "1"]
        subprocess.run([*program, *arguments], check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return summary


def append(name: str, seed: int, recipe: str, summary: dict[str, object]) -> None:
    """One row of the results, unless these settings stand there already."""
    if any(row["settings_hash"] == summary["settings_hash"] for row in read_rows()):
        return
    versions, miou = summary["versions"], summary["miou"]
    assert isinstance(versions, dict)
    assert isinstance(miou, dict)
    row = {**summary, **versions, **miou, "method": name, "seed": seed, "recipe": recipe}
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_rows() -> list[dict[str, str]]:
    if not RESULTS.is_file():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """Mean and standard deviation over the seeds of each method, as markdown."""
    latest = {(row["method"], row["seed"]): row for row in rows}
    lines = [
        "| method | better student | better teacher | ensemble | seeds | iterations |",
        "|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        chosen = [row for (method, _), row in latest.items() if method == name]
        if chosen:
            cells = [spread([best(row, kind) for row in chosen]) for kind in ("student", "teacher")]
            pairs = sum(bool(chosen[0][f"teacher_{k}"]) for k in (1, 2))
            cells.append(spread([float(r["ensemble"]) for r in chosen]) if pairs > 1 else "")
            seeds = ", ".join(sorted(row["seed"] for row in chosen))
            cells += [seeds, chosen[0]["iterations"]]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in ("supervised", "mean teacher"):
        leads = [
            float(row["ensemble"]) - max(best(other, "student"), best(other, "teacher"))
            for (method, seed), row in sorted(latest.items())
            if method == "cross teacher + contrast" and (other := latest.get((name, seed)))
        ]
        shown = ", ".join(f"{lead:.1f}" for lead in leads)
        lines += ["", f"Lead of the ensemble with contrast over {name}, seed by seed: {shown}"]
    return "\n".join(lines)


def best(row: dict[str, str], kind: str) -> float:
    """Of the better student or teacher of a run."""
    return max(float(row[name]) for name in (f"{kind}_1", f"{kind}_2") if row[name])


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
