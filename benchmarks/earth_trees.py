"""What a network has to beat on the dataset earth: boosted trees on colour and local statistics.

    python -m benchmarks.earth_trees --eval-split tune

trains them on one core in minutes, prints the table and writes benchmarks/results/training/
earth-trees.csv.

The labelled tiles of a seed are those that `ctt-train --dataset earth` draws. A pixel is described
by its colour, and by mean and standard deviation of each channel in windows around it.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from sklearn.ensemble import HistGradientBoostingClassifier

from ctt.data.dataset import IGNORE
from ctt.data.earth import Earth
from ctt.data.split import make_split
from ctt.experiments.results import groups, numbers, spread
from ctt.inference.evaluate import count, score

RESULTS = Path(__file__).parent / "results" / "training" / "earth-trees.csv"
WINDOWS = (3, 7, 15)  # pixels
PIXELS = 40_000  # that the trees learn from, at most
COLUMNS = ("eval_split", "share", "seed", "labeled", "miou", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shares", nargs="+", default=["20", "50", "1/1"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval-split", choices=("val", "tune"), default="val")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    dataset = Earth(arguments.eval_split)
    for share in arguments.shares:
        for seed in arguments.seeds:
            labeled, _ = make_split(dataset, share, seed, None, None)
            start = time.perf_counter()
            miou = train_and_score(dataset, labeled, seed)
            values = (share, seed, len(labeled), f"{miou:.2f}")
            seconds = f"{time.perf_counter() - start:.1f}"
            rows.append(
                dict(zip(COLUMNS, map(str, (arguments.eval_split, *values, seconds)), strict=True))
            )
            print(rows[-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("| labelled tiles | mIoU | seconds |\n|---|---|---|")
    for (tiles,), own in groups(rows, "labeled").items():
        print(f"| {tiles} | {spread(numbers(own, 'miou'))} | {spread(numbers(own, 'seconds'))} |")


def train_and_score(dataset: Earth, labeled: list[str], seed: int) -> float:
    """Return the mIoU in percent on the images to evaluate on."""
    x, y = zip(*(pixels(dataset, name) for name in labeled), strict=True)
    features, label = np.concatenate(x), np.concatenate(y)
    known = np.flatnonzero(label != IGNORE)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(known, min(PIXELS, len(known)), replace=False)
    # early stopping, without which few tiles give bad trees, wants two pixels of every class
    shown = np.bincount(label[chosen], minlength=IGNORE)
    chosen = chosen[shown[label[chosen]] > 1]
    trees = HistGradientBoostingClassifier(early_stopping=True, random_state=seed)
    trees.fit(features[chosen], label[chosen])
    classes = len(dataset.info.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for name in dataset.eval_ids():
        x_one, y_one = pixels(dataset, name)
        predicted = torch.from_numpy(trees.predict(x_one).astype(np.int64))
        count(matrix, predicted, torch.from_numpy(y_one.astype(np.int64)))
    return score(matrix).miou


def pixels(dataset: Earth, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return features (N, 21) float32 and labels (N,) uint8 of the N pixels of a tile."""
    image, label = dataset.pair(name)
    channels = image.numpy().astype(np.float32) / 255  # (3, H, W)
    found = [channels]
    for window in WINDOWS:
        mean = uniform_filter(channels, (0, window, window))
        square = uniform_filter(channels**2, (0, window, window))
        found += [mean, np.sqrt(np.maximum(square - mean**2, 0))]
    return np.concatenate(found).reshape(21, -1).T, label.numpy().ravel()


if __name__ == "__main__":
    main()
