"""Label 20 images, train, rank the others, label the 20 that the run is least sure of, train again.

On the embedded digits, whose labels are all known and stay hidden until they are asked for. Beside
it stands the same loop with images drawn at random, from the same first 20:

    python examples/active_learning.py --seeds 0 1 2 --out active
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

import torch
import yaml

import ctt
from ctt.data import open_dataset
from ctt.data.dataset import Dataset
from ctt.data.options import DatasetOptions
from ctt.inference.load import load_trained
from ctt.inference.rank import Committee, order
from ctt.settings import EvalSettings


def main() -> None:
    """Run the loop for every seed, and write the mIoU after each training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=2, help="trainings after the first one")
    parser.add_argument("--labels", type=int, default=20, help="images labelled in a round")
    parser.add_argument("--pool", type=int, default=1000, help="images to choose from")
    parser.add_argument("--evaluated", type=int, default=300, help="images of the scores")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--set", nargs="*", default=[], help="more settings, such as loss.hc=0")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("active"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    dataset = open_dataset("digits", None, DatasetOptions(labeled_pool=options.pool))
    options.out.mkdir(parents=True)
    with (options.out / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "choice", "labels", "student", "teacher", "ensemble"])
        for seed in options.seeds:
            for row in rows_of(seed, dataset, options):
                writer.writerow(row)
                file.flush()
                print(*row, flush=True)


def rows_of(seed: int, dataset: Dataset, options: argparse.Namespace) -> list[tuple[object, ...]]:
    """Return what one seed gives for both ways to choose."""
    rng = random.Random(seed)
    first = rng.sample(dataset.train_ids(), options.labels)
    begun = train(first, seed, options.out / f"{seed}-first", options)
    rows: list[tuple[object, ...]] = [(seed, "first", len(first), *begun)]
    for choice in ("rank", "random"):
        labeled, run = list(first), options.out / f"{seed}-first"
        for round_number in range(1, options.rounds + 1):
            left = sorted(set(dataset.train_ids()) - set(labeled))
            if choice == "rank":
                labeled += ranked(run, dataset, labeled, left)[: options.labels]
            else:
                labeled += rng.sample(left, options.labels)
            run = options.out / f"{seed}-{choice}-{round_number}"
            rows.append((seed, choice, len(labeled), *train(labeled, seed, run, options)))
    return rows


def train(labeled: list[str], seed: int, out: Path, options: argparse.Namespace) -> list[float]:
    """Train with these labels, and return mIoU: of the better student and teacher, and of all."""
    names = out.with_suffix(".txt")
    names.write_text("".join(f"{name}\n" for name in labeled))
    done = ctt.train(
        recipe="digits",
        seed=seed,
        split_labeled=names,
        data={"labeled_pool": options.pool, "eval_images": options.evaluated},
        train={
            "iterations": options.iterations,
            "threads": options.threads,
            "eval_every": options.iterations,
            "measured_images": 0,
            "tensorboard": False,
        },
        bank={"start_after": options.iterations // 4},
        out=out,
        **{name: yaml.safe_load(value) for name, value in (x.split("=") for x in options.set)},
    )
    miou = done["miou"]
    student, teacher = (
        max(value for name, value in miou.items() if name.startswith(kind))
        for kind in ("student", "teacher")
    )
    return [student, teacher, miou["ensemble"]]


def ranked(run: Path, dataset: Dataset, labeled: list[str], left: list[str]) -> list[str]:
    """Return the unlabelled images, the one to label first in front."""
    committee = Committee(load_trained(run), torch.device("cpu"), EvalSettings())
    ratings = [committee.rate(dataset.image(name)) for name in left]
    known = [committee.features(dataset.image(name)) for name in labeled]
    return [left[place.image] for place in order(ratings, known)]


if __name__ == "__main__":
    main()
