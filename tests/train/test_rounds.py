"""Runs in rounds: when they begin, what they label, and how they go on after a crash."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from ctt import checkpoint, run
from ctt.data.packed import unpack
from ctt.data.views import GeometricView
from ctt.errors import UserError
from ctt.methods.base import Round
from ctt.methods.dst_cbc import class_thresholds
from ctt.methods.st import mean_iou
from ctt.settings import Settings, update
from ctt.train import rounds
from ctt.train.distributed import World, join
from ctt.train.dry_run import dry_run
from ctt.train.loop import Stopped, Trainer, train
from ctt.train.rounds import Labeling, Rounds
from tests.data.rasters import save, scene, write_rasters
from tests.train.processes import finish, shown, start
from tests.train.steps import make
from tests.train.test_distributed import record_steps

METHODS = ["self-training", "st", "st++", "dst-cbc", "dmt"]


def settings_of(name: str, tiny: Settings, change: dict[str, Any] | None = None) -> Settings:
    common = {
        "iterations": 24,
        "checkpoint_every": 5,
        "eval_every": 24,
        "log_every": 1,
        "tensorboard": False,
    }
    few = {"options": {"count": 2}} if name in ("dst-cbc", "dmt") else {}
    settings = update(tiny.with_method(name), {"train": common, **few}, "test")
    return update(settings, change or {}, "test")


def test_when_rounds_begin_and_the_rate_falls() -> None:
    kinds = [Round(0.1, "none"), Round(0.2, "none", restart=False), Round(0.3, "kept"), Round(0.4)]
    found = Rounds(kinds, 100)
    assert found.starts == [0, 10, 30, 60, 100]
    assert [found.at(i) for i in (0, 9, 10, 29, 30, 99, 100)] == [0, 0, 1, 1, 2, 3, 3]
    assert found.schedule(5) == found.schedule(29) == (0, 30)
    assert found.schedule(30) == (30, 30)
    assert found.schedule(99) == (60, 40)
    with pytest.raises(UserError, match="too few for the 4 rounds"):
        Rounds(kinds, 4)


def test_label_and_confidence_go_through_the_same_view() -> None:
    label = torch.arange(100).view(10, 10).remainder(5).int()
    confidence = torch.full_like(label, 51) + 51 * label
    view = GeometricView((16, 16), (0.8, 1.2), True, 20, 0.1, (0.5, 0.5, 0.5))
    image = torch.zeros(3, 10, 10, dtype=torch.uint8)
    for seed in range(5):
        own, sure = unpack(view(image, label + 256 * confidence, seed)[1])
        expected = view(image, label.to(torch.uint8), seed)[1]
        assert torch.equal(own, expected.long())
        inside = own != 255
        torch.testing.assert_close(sure[inside], (own[inside] + 1) / 5)
        assert (sure[~inside] == 0).all()


def test_two_alike_predictions_agree_wholly() -> None:
    label = torch.tensor([[0, 0, 3, 3]])
    assert float(mean_iou(label, label, 7)) == 1
    assert float(mean_iou(label, torch.tensor([[0, 0, 3, 4]]), 7)) == pytest.approx((1 + 0.5) / 3)


class Fixed:
    """A labeler whose networks give probabilities that are known."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        self.given, self.unlabeled = given, [str(i) for i in range(len(given))]

    def probabilities(self, *_: Any) -> Any:
        return ((name, [p]) for name, p in zip(self.unlabeled, self.given, strict=True))

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.mark.parametrize("scale", [0.3, 3, 8])  # of logits: networks that are ever surer
@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
def test_thresholds_keep_their_share_of_each_class(
    tiny: Settings, ratio: float, scale: float
) -> None:
    from ctt.methods.base import Networks
    from tests.train.steps import student

    rng = torch.Generator().manual_seed(0)
    given = [torch.randn(3, 40, 50, generator=rng).mul(scale).softmax(dim=0) for _ in range(3)]
    given = [torch.cat([p, torch.zeros(1, 40, 50)]) for p in given]  # a class nowhere predicted
    nothing = torch.full((4, 20, 50), torch.nan)  # as where an image has no data
    labeler: Any = Fixed([torch.cat([p, nothing], dim=1) for p in given])
    threshold = class_thresholds(Networks([student(tiny)]), labeler, ratio, 4)
    confidence, label = torch.stack(given).max(dim=1)
    for c in range(3):
        sure = confidence[label == c]
        kept = float((sure >= threshold[c]).float().mean())
        assert ratio - 1e-6 <= kept < ratio + 0.02
    assert (threshold[3] == 1) == (ratio < 1)


def labels_of_round(
    name: str, tiny: Settings, number: int, given: torch.Tensor
) -> tuple[Any, list[Any], torch.Tensor]:
    """Return the method, the networks that it asked before a round, and the label that it keeps of
    an image of which they give these probabilities."""
    method: Any = make(settings_of(name, tiny)).method
    labeler: Any = Fixed([given])
    asked: list[Any] = []
    kept: list[torch.Tensor] = []

    def probabilities(networks: Any, *_: Any) -> Any:
        asked.append(networks)
        return Fixed([given]).probabilities()

    labeler.probabilities = probabilities
    labeler.keep = lambda name, label, confidence: kept.append(label)
    labeler.use = lambda names: None
    method.round = number
    method.begin_round(labeler)
    return method, asked, kept[0]


def test_dst_cbc_labels_by_multiples_of_the_thresholds_and_at_last_by_probability(
    tiny: Settings,
) -> None:
    """Of four pixels predicted as class 0 the surer two set its threshold, 0.9; of two pixels
    predicted as class 1 the surer one, 0.3."""
    likely = [[0.95, 0.9, 0.6, 0.55, 0.1, 0.25], [0.01, 0.01, 0.01, 0.35, 0.3, 0.26]]
    p = torch.zeros(11, 1, 6)
    p[:2, 0] = torch.tensor(likely)
    p[2:] = (1 - p.sum(dim=0)) / 9
    *_, label = labels_of_round("dst-cbc", tiny, 1, p)
    assert label.tolist() == [[0, 0, 255, 1, 1, 255]]  # 0.35 is more than once 0.3
    *_, label = labels_of_round("dst-cbc", tiny, 2, p)
    assert label.tolist() == [[0, 0, 0, 0, 1, 1]]


def test_students_of_dmt_label_for_each_other_in_turns(tiny: Settings) -> None:
    p = torch.rand(11, 4, 4, generator=torch.Generator().manual_seed(0)).softmax(dim=0)
    for number, learner, half in ((1, 0, True), (2, 1, True), (3, 0, False), (4, 1, False)):
        method, asked, label = labels_of_round("dmt", tiny, number, p)
        assert method.learning == [learner]
        assert all(list(x) == [method.students[1 - learner]] for x in asked)
        assert bool((label == 255).any()) == half
        assert torch.equal(label[label != 255], p.argmax(dim=0)[label != 255])


def test_pixels_without_data_make_no_image_reliable(tiny: Settings) -> None:
    method: Any = make(settings_of("st++", tiny)).method
    agreed = torch.rand(11, 8, 8, generator=torch.Generator().manual_seed(0)).softmax(dim=0)
    empty, half = torch.full((11, 8, 8), torch.nan), agreed.clone()
    half[:, :4] = torch.nan
    labeler: Any = Fixed([empty, half, agreed])
    # of two snapshots and the last, the last has every class of the second image wrong
    answers = [[empty] * 3, [half, half, half.roll(1, dims=0)], [agreed] * 3]
    labeler.probabilities = lambda *_: zip(labeler.unlabeled, answers, strict=True)
    assert method.reliable_half(labeler) == ["2", "0"]


def test_nothing_is_labelled_where_an_image_has_no_data(tiny: Settings, tmp_path: Path) -> None:
    data = write_rasters(tmp_path / "data", labeled=4, unlabeled=1)
    image = scene((48, 48), 4)[0]
    image[:, :20] = 0
    save(data / "unlabeled" / "tile 4.tif", image, nodata=0)
    read = ["bands: [1, 2, 3, 4]", "range: [0, 3000]"]
    (data / "dataset.yaml").write_text("\n".join(["classes: [background, field]", *read]))
    change = {"dataset": "folder", "data_root": str(data), "ratio": "1/1"}
    settings = settings_of("self-training", tiny, change)
    train(settings, out=tmp_path / "run")
    path = next((tmp_path / "run" / "rounds" / "1" / "labels").rglob("*.png"))
    label = np.array(Image.open(path))
    assert (label[:20] == 255).all()
    assert (label[20:] != 255).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_is_lost_anywhere_ends_as_an_undisturbed_one(
    tiny: Settings, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(name, tiny)
    train(settings, out=tmp_path / "whole")

    class LostError(Exception):
        pass

    save, keep, count = checkpoint.save, Labeling.keep, 0

    def lost_after_saving(*arguments: Any) -> None:
        save(*arguments)
        raise LostError

    def lost_while_labeling(*arguments: Any) -> None:
        nonlocal count
        keep(*arguments)
        count += 1
        if count == 7 and lost % 2 == 1:
            raise LostError

    monkeypatch.setattr(Labeling, "keep", lost_while_labeling)
    out, folder, lost = tmp_path / "run", None, 0
    while lost < 40:
        # every second life ends at its first checkpoint, the others while images are labelled
        with monkeypatch.context() as patch:
            if lost % 2 == 0:
                patch.setattr(checkpoint, "save", lost_after_saving)
            count = 0
            try:
                train(settings, out=None if folder else out, resume=folder)
                break
            except LostError:
                lost += 1
        folder = out if run.has_checkpoint(out) else None
    assert 2 < lost < 40
    ends = [checkpoint.load(tmp_path / n / run.CHECKPOINT) for n in ("whole", "run")]
    for key, value in ends[0]["method"].items():
        assert torch.equal(value, ends[1]["method"][key]), key
    for path in sorted((tmp_path / "whole" / "rounds").rglob("*.*")):
        other = tmp_path / "run" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes()
    assert (tmp_path / "whole" / "rounds").is_dir()


def test_ctrl_c_while_images_are_labelled_ends_it_at_once(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, keep, kept = settings_of("self-training", tiny), Labeling.keep, []

    def ask(self: Labeling, name: str, *arguments: Any) -> None:
        keep(self, name, *arguments)
        kept.append(name)
        if len(kept) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train(settings, out=tmp_path / "whole")
    monkeypatch.setattr(Labeling, "keep", ask)
    with pytest.raises(Stopped):
        train(settings, out=tmp_path / "run")
    assert len(kept) == 3
    assert train(settings, resume=tmp_path / "run")["miou"] == whole["miou"]
    assert len(set(kept[3:])) == len(kept[3:]) > 3
    ends = [checkpoint.load(tmp_path / n / run.CHECKPOINT) for n in ("whole", "run")]
    for key, value in ends[0]["method"].items():
        assert torch.equal(value, ends[1]["method"][key]), key


def test_labels_of_a_round_are_those_of_the_network(tiny: Settings, tmp_path: Path) -> None:
    settings = settings_of("self-training", tiny)
    with pytest.MonkeyPatch.context() as patch:
        networks: list[dict[str, Any]] = []
        label = rounds.Labeling.probabilities

        def noted(self: Labeling, nets: Any, *arguments: Any) -> Any:
            networks.append({k: v.clone() for k, v in nets[0].state_dict().items()})
            return label(self, nets, *arguments)

        patch.setattr(rounds.Labeling, "probabilities", noted)
        train(settings, out=tmp_path / "run")
    assert len(networks) == 1
    names = (tmp_path / "run" / "rounds" / "1" / "images.txt").read_text().split()
    assert names == (tmp_path / "run" / "split" / "unlabeled.txt").read_text().split()
    from ctt.inference.predict import predictor
    from tests.train.steps import student

    network = student(settings).eval()
    network.load_state_dict(networks[0])
    dataset = settings.open_dataset()
    with torch.no_grad():
        p = predictor(network, dataset.info, settings.eval)(dataset.image(names[0])[None])[0]
    folder = tmp_path / "run" / "rounds" / "1"
    shown_label = np.array(Image.open(folder / "labels" / f"{names[0]}.png"))
    sure = np.array(Image.open(folder / "confidence" / f"{names[0]}.png"))
    assert (shown_label == p.argmax(dim=0).numpy()).mean() > 0.99  # ties of rounding
    assert np.abs(sure / 255 - p.amax(dim=0).numpy()).max() < 0.01


def test_the_reliable_half_comes_first_and_then_all(tiny: Settings, tmp_path: Path) -> None:
    train(settings_of("st++", tiny), out=tmp_path / "run")
    folder = tmp_path / "run" / "rounds"
    half, whole = ((folder / n / "images.txt").read_text().split() for n in ("3", "4"))
    assert len(half) == (len(whole) + 1) // 2
    assert set(half) < set(whole)
    for name in half:
        first, second = (folder / n / "labels" / f"{name}.png" for n in ("3", "4"))
        assert np.array_equal(np.array(Image.open(first)), np.array(Image.open(second)))


def test_loading_for_a_round_ends_with_it(tiny: Settings, tmp_path: Path) -> None:
    trainer = Trainer(settings_of("self-training", tiny), tmp_path / "run", None, World())
    before = trainer.streams.feed()
    before()
    trainer.streams.feed()()
    with pytest.raises(StopIteration):
        before()
    trainer.streams.close()


def test_divergence_in_the_last_steps_of_a_round_is_told(tiny: Settings, tmp_path: Path) -> None:
    """The images of the next round are not chosen yet."""
    trainer = Trainer(settings_of("self-training", tiny), tmp_path / "run", None, World())
    engine = trainer.engine
    engine.iteration = engine.rounds.starts[1]
    engine.drawn = 3 * engine.iteration
    trainer.losses.add({"total": torch.tensor(float("nan"))})
    with pytest.raises(UserError, match=f"Training diverged: by iteration {engine.iteration}"):
        trainer.losses.total()
    told = (tmp_path / "run" / "diverged.txt").read_text()
    assert told.startswith(f"iteration {engine.iteration}, labeled: ")


def test_too_little_memory_to_label_is_told(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(settings_of("self-training", tiny), tmp_path / "run", None, World())
    where = (tmp_path / "run", 1, torch.device("cpu"), World())
    labeling = Labeling(trainer.settings, trainer.dataset, trainer.plan.unlabeled[:1], *where)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    student = trainer.method.students[0]
    monkeypatch.setattr(student, "forward", full)
    with pytest.raises(UserError, match=r"label an unlabelled image .* smaller `data\.resize`"):
        next(labeling.probabilities([student], labeling.unlabeled, trainer.settings.eval))


def test_each_process_carries_its_own_labels(
    tiny: Settings, tmp_path: Path, no_room: Callable[[], AbstractContextManager[None]]
) -> None:
    """Two that write one file at once take its unfinished part from each other."""
    names, cpu = ["a", "b", "c"], torch.device("cpu")
    first, second = (
        Labeling(tiny, tiny.open_dataset(), names, tmp_path, 4, cpu, World(rank, 2))
        for rank in (0, 1)
    )
    label, confidence = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
    first.folder, folder = first.before, first.folder
    for name in names:
        first.keep(name, label, confidence)
    first.folder = folder
    first.carry(names)
    assert sorted(p.name for p in (folder / "labels").iterdir()) == ["a.png", "c.png"]
    second.carry(names)
    large = torch.randint(0, 10, (200, 200))
    with no_room(), pytest.raises(UserError, match=r"labels/d\.png cannot be written \(.*arge"):
        first.keep("d", large, torch.ones(200, 200))
    for path in first.before.rglob("*.png"):
        assert (folder / path.relative_to(first.before)).read_bytes() == path.read_bytes()


def label_one_each(settings: Settings, folder: Path) -> None:
    """Finish a round, with collectives that return at once as those of a GPU do."""
    names, collective, begun = ["a", "b"], dist.all_reduce, []

    def at_once(*arguments: Any) -> None:
        begun.append(collective(*arguments, async_op=True))

    with join() as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", at_once)
        cpu = torch.device("cpu")
        labeling = Labeling(settings, settings.open_dataset(), names, folder, 1, cpu, world)
        time.sleep(0.5 * world.rank)
        labeling.keep(names[world.rank], torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))
        labeling.finish()
        found = sorted(path.name for path in labeling.folder.rglob("*.*"))
        (folder / f"found-{world.rank}.txt").write_text("\n".join(found))


def test_a_round_begins_once_all_processes_have_labelled(tiny: Settings, tmp_path: Path) -> None:
    assert finish(start(2, tmp_path, label_one_each, tiny, tmp_path)) == [0, 0], shown(tmp_path)
    for rank in (0, 1):
        found = (tmp_path / f"found-{rank}.txt").read_text().split()
        assert found == ["a.png", "a.png", "b.png", "b.png", "images.txt"]


def test_what_rounds_and_their_labels_depend_on_is_fixed(
    tiny: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of("self-training", tiny)
    train(settings, out=tmp_path / "run")
    for resume in (train, dry_run):  # no longer run of these rounds is offered, being refused
        capsys.readouterr()
        resume(settings, resume=tmp_path / "run")
        assert "To train longer, start a new run" in " ".join(capsys.readouterr().out.split())
    for change, message in (
        ({"train": {"iterations": 30}}, r"`train.iterations` 30: this run was started with 24"),
        ({"options": {"first": 0.5}}, r"`options.first` 0.5: this run was started with 0.3"),
        ({"data": {"resize": [8, 8]}}, r"`data.resize` \[8, 8\]: this run was started with None"),
    ):
        for resume in (train, dry_run):
            with pytest.raises(UserError, match=message):
                resume(update(settings, change, "test"), resume=tmp_path / "run")


def test_rows_tell_the_round(tiny: Settings, tmp_path: Path) -> None:
    train(settings_of("self-training", tiny), out=tmp_path / "run")
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    place = header.split(",").index("round")
    told = [row.split(",")[place] for row in rows if row.split(",")[place]]
    assert told == ["0"] * 7 + ["1"] * 17
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["method"] == "self-training"


@pytest.mark.parametrize("name", ["dst-cbc", "st++"])
def test_two_processes_label_and_learn_as_one(tiny: Settings, tmp_path: Path, name: str) -> None:
    change = {"model": {"sync_batch_norm": True}, "views": {"mix": "cutmix"}}
    change = change if name == "dst-cbc" else {"model": {"sync_batch_norm": True}}
    settings = settings_of(name, tiny, change)
    both = start(2, tmp_path / "two", record_steps, settings, tmp_path / "two")
    (tmp_path / "one").mkdir()
    record_steps(update(settings, {"data": {"batch_size": 6}}, "test"), tmp_path / "one")
    assert finish(both) == [0, 0], shown(tmp_path / "two")
    one, first, second = (
        torch.load(tmp_path / n) for n in ("one/rank-0.pt", "two/rank-0.pt", "two/rank-1.pt")
    )
    for key, expected in one["method"].items():
        assert torch.equal(first["method"][key], second["method"][key]), key
        torch.testing.assert_close(first["method"][key], expected, rtol=1e-5, atol=1e-6, msg=key)
    for path in sorted((tmp_path / "one" / "run" / "rounds").rglob("*.txt")):
        other = tmp_path / "two" / "run" / path.relative_to(tmp_path / "one" / "run")
        assert path.read_text() == other.read_text()
