"""What a newcomer is told: before a run, while it trains, and at its end."""

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import yaml

from ctt import data, methods, recipes
from ctt.cli import train
from ctt.console import plain_console
from ctt.data import fit
from ctt.data.options import DatasetOptions
from ctt.errors import UserError
from ctt.settings import Settings, update
from ctt.train import pace
from ctt.train.engine import Engine
from ctt.train.plan import Plan
from ctt.train.step_log import StepLog
from tests.data import trees

QUICK = (
    "--model.width 4 --model.features 8 --data.batch-size 2 --data.workers 0 --train.threads 1 "
    "--train.iterations 4 --train.log-every 1 --train.no-tensorboard --bank.start-after 2"
)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_folder_on_a_cpu_is_trained_and_told_of_from_start_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("ctt.train.step_log.WORTH_TELLING", 0.0)
    root = trees.write_folder(tmp_path / "mine", size=(44, 60))
    base = [*shlex.split(QUICK), "--dataset", "folder", "--data-root", str(root)]
    out = tmp_path / "my run"
    cache = tmp_path / "cache"
    assert train._main([*base, "--dry-run", "--data.cache", str(cache)]) == 0
    assert not cache.exists()
    shown = told(capsys)
    assert "There is no GPU here, so the recipe is folder-small" in shown
    assert "would start with 6 labelled and 4 unlabelled images" in shown
    sketch = (
        r"Network small \(0\.0 million weights\), crops of 40x56 pixels, 2 labelled and as many "
        r"unlabelled images a step\. The contrast begins after iteration 2, once its queues"
    )
    assert re.search(sketch, shown)
    assert re.search(r"The 4 iterations take about .+ here \(\S+ s each\)", shown)
    assert not out.exists()
    assert train._main([*base, "--out", str(out)]) == 0
    shown = told(capsys)
    assert re.search(sketch, shown)
    assert len(re.findall(r"About [^.]+ to go[^.]+, without evaluation", shown)) == 1
    classes = "background, red thing, green thing, blue thing"
    best = rf"Best network: \w+ after iteration \d, mIoU \d+\.\d over {classes} on 2 images\."
    assert re.search(
        rf"{best} Next: ctt-predict '{re.escape(str(out))}' IMAGES --out predictions$", shown
    )
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["data"]["crop"] == [0, 0]  # for which a resumed run finds the same
    more = ["--resume", str(out), "--train.iterations", "6", "--dry-run"]
    assert train._main(more) == 0
    assert "crops of 40x56" in told(capsys)


def test_a_folder_without_unlabelled_images_is_told_where_they_go(tmp_path: Path) -> None:
    root = trees.write_folder(tmp_path / "mine")
    shutil.rmtree(root / "unlabeled")
    words = ["--dataset", "folder", "--data-root", str(root), "--recipe", "folder-small"]
    place = (
        r"Put images without masks into unlabeled/. Or lower `ratio`, or use `method` supervised"
    )
    with pytest.raises(UserError, match=place):
        train._main([*words, "--dry-run"])


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ("--dataset folder --train.device cpu", "folder-small"),
        ("--dataset folder --train.device cuda:1", "folder"),
        ("--dataset folder --recipe folder --train.device cpu", "folder"),
        ("--dataset digits --train.device cpu", "digits"),
    ],
)
def test_own_images_have_a_recipe_for_machines_without_a_gpu(arguments: str, recipe: str) -> None:
    assert train.parse(arguments.split()).recipe == recipe


def test_a_large_network_on_a_cpu_is_told(tmp_path: Path) -> None:
    root = trees.write_folder(tmp_path)
    change = {"data_root": str(root), "train": {"device": "cpu", "threads": 1}}
    settings = update(update(Settings(), recipes.load("folder"), "recipe"), change, "test")
    warnings = Plan.of(settings, None).warnings()
    assert any("there is no GPU for deeplabv3plus. `recipe` folder-small" in w for w in warnings)


@pytest.mark.parametrize(
    ("size", "crop"),
    [((40, 48), (40, 48)), ((60, 900), (56, 96)), ((500, 400), (96, 96)), ((9, 3), (8, 8))],
)
def test_a_crop_that_fits_the_images(
    tmp_path: Path, size: tuple[int, int], crop: tuple[int, int]
) -> None:
    root = trees.write_folder(tmp_path, labeled=2, size=(max(9, size[0]), max(9, size[1])))
    dataset = data.open_dataset("folder", root, DatasetOptions())
    assert fit.fitting_crop(dataset, dataset.train_ids(), size) == crop
    if min(size) >= 9:
        assert fit.fitting_crop(dataset, dataset.train_ids(), None) == crop


def test_a_crop_is_two_numbers_from_8_on_or_fits() -> None:
    for crop in ("0 8", "8 0", "7 7"):
        with pytest.raises(UserError, match="at least 8 8, or 0 0 for one that fits the images"):
            train.read(["--data.crop", *crop.split()])


TIMES = {
    0.2: "a second",
    40: "40 seconds",
    89: "89 seconds",
    720: "12 minutes",
    12_600: "3.5 hours",
    100_000: "28 hours",
    181_440: "2.1 days",
}


@pytest.mark.parametrize(("seconds", "text"), TIMES.items())
def test_times_are_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert pace.duration(seconds) == text


def test_the_time_of_a_step_is_none_where_memory_is_short(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.of(tiny, None)
    seconds = pace.seconds_of_step(plan, {})
    assert seconds is not None
    assert 0 < seconds < 60
    monkeypatch.setattr(pace, "LONG", 0.0)  # as if a step of two images took long
    assert (pace.seconds_of_step(plan, {}) or 0) > 0

    def too_large(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    parts = {"activations": 10**15, "teachers": 10**9}
    assert pace.seconds_of_step(plan, parts) is None
    assert (pace.seconds_of_step(plan, {"activations": 10**9}) or 0) > 0
    monkeypatch.setattr(pace, "_timed", too_large)
    assert pace.seconds_of_step(plan, {}) is None


def test_every_kind_of_step_is_timed(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first 3 of 10 steps there are no unlabelled images."""
    timed, of_stretch = [], pace._timed_stretch

    def noted(plan: Plan, engine: Engine, number: int, first: int, end: int) -> float:
        assert of_stretch(plan, engine, number, first, end) > 0
        timed.append((number, first, end))
        return 10.0 if first else 1.0

    monkeypatch.setattr(pace, "_timed_stretch", noted)
    for method, number in (("self-training", 1), ("mean-teacher", 0)):
        change = {"train": {"iterations": 10}, "loss": {"ct_after": 0.3}}
        plan = Plan.of(update(tiny.with_method(method), change, "test"), None)
        assert pace.seconds_of_step(plan, {}) == pytest.approx(3 / 2 * (0.3 * 1 + 0.7 * 10))
        assert pace.seconds_of_step(plan, {}, done=4) == pytest.approx(3 / 2 * 10)
        assert timed == [(0, 0, 3), (number, 3, 10), (number, 3, 10)]
        timed.clear()


def test_the_help_lists_what_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(["--dataset", "folder", "--recipe", "folder-small", "--help"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for name in (*data.names(), *methods.names(), *recipes.names()):
        assert f" {name}," in shown or f" {name}." in shown, name
    assert "of the training crop, in pixels; 0 0" in shown
    assert "(default: 0 0)" in shown  # of this recipe
    assert "(default: folder-small)" in shown


@pytest.mark.parametrize(
    ("device", "log_every", "told_after"), [("cpu", 20, 5), ("cuda", 20, 20), ("cpu", 1, 2)]
)
def test_the_time_left_is_told_early_where_nothing_must_be_waited_for(
    device: str, log_every: int, told_after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    method = SimpleNamespace(stage=lambda _: 0)
    engine = SimpleNamespace(iteration=0, device=torch.device(device), method=method)
    log, spent = StepLog(cast(Engine, engine), plain_console(), None), 8.0  # of the first step
    for engine.iteration in range(1, 41):
        log.time_left(1000, spent, engine.iteration % log_every == 0)
        shown = told(capsys)
        spent += 1.25
        assert bool(shown) == (engine.iteration == told_after)
        left = round((1000 - engine.iteration) * 1.25 / 60)
        assert not shown or shown == f"About {left} minutes to go, without evaluation."


def test_the_time_left_is_told_again_when_steps_do_more(capsys: pytest.CaptureFixture[str]) -> None:
    """From iteration 20 on a step takes twice as long, and the first one longer."""
    method = SimpleNamespace(stage=lambda iteration: int(iteration >= 20))
    engine = SimpleNamespace(iteration=0, device=torch.device("cpu"), method=method)
    log, spent, shown = StepLog(cast(Engine, engine), plain_console(), None), 0.0, {}
    for engine.iteration in range(1, 41):
        spent += {1: 8.0, 21: 30.0}.get(engine.iteration, 2.0 + 2.0 * (engine.iteration > 20))
        log.time_left(1000, spent, False)
        if text := told(capsys):
            shown[engine.iteration] = text
    assert shown == {
        4: "About 33 minutes to go at this speed, without evaluation; from iteration 20 on a step "
        "does more.",
        24: "About 65 minutes to go, without evaluation.",
    }


def test_images_of_a_step_are_told(tiny: Settings) -> None:
    more = update(tiny, {"data": {"unlabeled_batch_size": 5}}, "test")
    for settings, told in (
        (tiny, "3 labelled and as many unlabelled images a step"),
        (more, "3 labelled and 5 unlabelled images a step"),
        (more.with_method("c3-semiseg"), "3 labelled and as many unlabelled images a step"),
    ):
        plan = Plan.of(settings, None)
        assert told in plan.sketch(plan.build())
