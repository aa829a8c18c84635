import contextlib
import csv
import dataclasses
import json
import math
import os
import re
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from ctt import checkpoint, methods, run
from ctt.data.loader import ViewDataset
from ctt.data.split import make_split
from ctt.device import pick_device
from ctt.errors import UserError
from ctt.settings import Settings, update
from ctt.train import measures
from ctt.train.distributed import World
from ctt.train.dry_run import dry_run
from ctt.train.engine import Engine
from ctt.train.loop import Stopped, Trainer, train
from ctt.train.plan import Plan, check_batch_norm
from ctt.train.record import read_rows
from ctt.train.setup import restored_torch, set_up_torch
from ctt.train.signals import interrupt_flag
from tests.train.steps import batch, make, student, unlabelled, with_teacher


def stop_after(
    monkeypatch: pytest.MonkeyPatch, iteration: int, number: int = signal.SIGINT
) -> None:
    """Send the signal to this process during the step after which the run has to stop."""
    original = Engine.__call__

    def call(self: Engine, *batches: Any) -> dict[str, torch.Tensor]:
        result = original(self, *batches)
        if self.iteration == iteration:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Engine, "__call__", call)


def assert_equal_states(a: Any, b: Any, place: str = "") -> None:
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_equal_states(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_states(x, y, f"{place}.{i}")
    else:
        assert a == b, place


# The others are stopped and resumed as engines in tests/methods/test_contract.py.
IN_EVERY_SUITE = ("cross-teacher", "mean-teacher", "s4gan", "u2pl", "unimatch")
IN_ROUNDS = [name for name in methods.names() if "rounds" in methods.get(name).extra]


# those in rounds, which need more iterations, are lost and resumed in test_rounds.py
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=[] if m in IN_EVERY_SUITE else pytest.mark.slow)
        for m in methods.names()
        if m not in IN_ROUNDS
    ],
)
def test_a_resumed_run_ends_bit_equal(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    settings = with_teacher(dataclasses.replace(tiny, method=method), tmp_path)
    settings = update(settings, {"data": {"unlabeled_batch_size": 4}}, "test")  # beside three
    whole = train(settings, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped) as stopped:
            train(settings, out=tmp_path / "parts")
    assert stopped.value.iteration == 3
    torch.rand(7)  # the random state of another process
    parts = train(settings, resume=stopped.value.folder)
    states = [checkpoint.load(tmp_path / name / run.CHECKPOINT) for name in ("whole", "parts")]
    for state in states:
        del state["seconds"], state["waited"]
    assert_equal_states(*states)
    assert whole["miou"] == parts["miou"]
    about = methods.get(method)
    beside = 6 * 3 if about.paired else 6 * 4 if about.unlabeled else 0
    assert whole["images_drawn"] == 6 * 3 + beside
    rows = []
    for name in ("whole", "parts"):
        with (tmp_path / name / "metrics.csv").open() as file:
            rows.append(
                [{**row, "images_per_second": "", "input_wait": ""} for row in csv.DictReader(file)]
            )
    assert rows[0] == rows[1]
    for table in rows:
        order = [int(r["iteration"]) for r in table]
        assert order == sorted(order)


@pytest.mark.parametrize("stop", [2, 3])
def test_unlabelled_images_are_read_from_when_they_join_on(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    read: list[tuple[str, str, int]] = []
    original = ViewDataset.__getitem__

    def note(self: ViewDataset, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        read.append((self.purpose, *key))
        return original(self, key)

    monkeypatch.setattr(ViewDataset, "__getitem__", note)
    settings = update(tiny, {"loss": {"ct_after": 0.5}}, "test")
    assert train(settings, out=tmp_path / "whole")["images_drawn"] == 6 * 3 + 3 * 3
    whole, read = read, []
    assert [draw for purpose, _, draw in whole if purpose == "unlabeled"] == list(range(9))
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Stopped):
            train(settings, out=tmp_path / "parts")
    train(settings, resume=tmp_path / "parts")
    assert read == whole
    states = [checkpoint.load(tmp_path / name / run.CHECKPOINT) for name in ("whole", "parts")]
    assert_equal_states(*(state["method"] for state in states))


def test_sigterm_stops_like_ctrl_c(
    tiny: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 2, signal.SIGTERM)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        train(tiny, out=out)
    assert checkpoint.load(out / run.CHECKPOINT)["iteration"] == 2
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_operation_without_a_deterministic_form_is_told(
    tiny: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(self: Engine, *batches: Any) -> dict[str, torch.Tensor]:
        raise RuntimeError(
            "resize_backward_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'."
        )

    monkeypatch.setattr(Engine, "__call__", call)
    with pytest.raises(UserError, match=r"`train.deterministic`: .* form of resize_backward_cuda"):
        train(tiny, out=out)


@pytest.mark.figures
def test_run_folder_holds_everything(tiny: Settings, out: Path) -> None:
    summary = train(tiny, out=out)
    assert run.read_settings(out) == tiny
    labeled, unlabeled = (
        (out / file).read_text().split() for file in (run.LABELED_LIST, run.UNLABELED_LIST)
    )
    assert (len(labeled), len(unlabeled)) == (6, 18)
    assert not set(labeled) & set(unlabeled)
    written = json.loads((out / "summary.json").read_text())
    assert written == summary
    networks = ["student_1", "student_2", "teacher_1", "teacher_2", "ensemble"]
    assert list(written["miou"]) == networks
    assert list(written["class_iou"]["ensemble"])[:2] == ["background", "0"]
    for key in ("protocol", "iterations", "seconds", "images_per_second", "settings_hash"):
        assert written[key], key
    assert written["versions"]["torch"] == torch.__version__
    assert written["device"]
    # six steps of two students with 3 labelled and 3 unlabelled images, of two teachers with the
    # unlabelled ones for their labels and the labelled ones for the banks
    assert written["images_drawn"] == 6 * 6
    assert written["forwards"] == {"trained": 6 * 12, "untrained": 6 * 12}
    for picture in ("curves.png", "samples.png"):
        with Image.open(out / picture) as image:
            assert image.width > 400
    assert any(out.glob("events.out.tfevents.*"))
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {int(r["iteration"]) for r in rows if r["loss_total"]} == {2, 4, 6}
    network, info, note = checkpoint.load_network(out / run.WEIGHTS)
    assert note.startswith(written["best"]["network"])
    assert len(info.classes) == network.classifier.out_channels
    assert torch.load(out / run.CHECKPOINT, weights_only=True)["iteration"] == 6


def test_a_finished_run_is_not_trained_again(tiny: Settings, out: Path) -> None:
    first = train(tiny, out=out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = train(tiny, resume=out)
    assert again == first
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_cannot_happen_within_the_run_is_told(
    tiny: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(tiny)
    assert "never" not in capsys.readouterr().out
    change = {"bank": {"start_after": 6}, "loss": {"ct_ramp": 7}, "optim": {"warmup": 6}}
    late = update(tiny, change, "test")
    dry_run(late)
    shown = " ".join(capsys.readouterr().out.split())
    assert "the contrast never begins, because `bank.start_after` 6 is not below" in shown
    assert "never reaches its full value, because `loss.ct_ramp` 7 is above" in shown
    assert "learning rate never reaches its full value, because `optim.warmup` 6 is" in shown
    dry_run(update(tiny, {"loss": {"ct_ramp": 4, "ct_after": 0.5}}, "test"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "unlabelled ones join after iteration 3. The contrast begins after iteration 3" in shown
    assert "`loss.ct_ramp` 4 after 3 iterations without unlabelled images is above" in shown
    dry_run(dataclasses.replace(late, method="supervised", optim=tiny.optim))
    assert "never" not in capsys.readouterr().out


def test_an_image_that_is_mixed_with_itself_is_told(tiny: Settings) -> None:
    change = {"views": {"mix": "cutmix"}, "data": {"unlabeled_batch_size": 1}}
    alone = update(tiny, change, "test")
    text = "`views.mix` cutmix changes nothing, because a step has a single unlabelled image"
    assert any(text in told for told in Plan.of(alone, None).warnings())
    more = update(tiny, change | {"data": {"unlabeled_batch_size": 2}}, "test")
    plain = update(alone, {"views": {"mix": "none"}}, "test")
    plans = (Plan.of(more, None), Plan.of(plain, None), Plan.of(alone, None, processes=2))
    assert not any("views.mix" in told for plan in plans for told in plan.warnings())


def test_values_of_more_pairs_than_there_are_are_told(tiny: Settings) -> None:
    two = update(tiny, {"optim": {"pair_lr": [0.1, 0.2]}}, "test")
    for pairs in (1, 2):
        told = Plan.of(dataclasses.replace(two, pairs=pairs), None).warnings()
        text = "`optim.pair_lr` has 2 values and `pairs` is 1, so 0.2 changes nothing"
        assert any(text in sentence for sentence in told) is (pairs == 1)


def test_hard_pixels_that_are_all_pixels_are_told(tiny: Settings) -> None:
    pixels = math.prod(tiny.data.crop)
    for kept in (pixels - 1, pixels):
        labeled = {"ohem": 0.7, "ohem_kept": kept}
        told = Plan.of(update(tiny, {"labeled": labeled}, "test"), None).warnings()
        text = f"`labeled.ohem_kept` {kept} is not below the {pixels} pixels of a crop"
        assert any(text in sentence for sentence in told) is (kept == pixels)


def test_a_class_without_labelled_images_is_told(
    tiny: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(tiny, ratio="1")
    dataset = settings.open_dataset()
    (name,), _ = make_split(dataset, "1", tiny.seed, None, None)
    shown = set(dataset.label(name).unique().tolist())
    missing = [c for i, c in enumerate(dataset.info.classes) if i not in shown]
    dry_run(settings)
    told = " ".join(capsys.readouterr().out.split())
    assert f"none of the 1 labelled images shows {', '.join(missing)}, so" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_program(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr("ctt.train.signals.ECHO", 60.0)  # however slow the machine is
    with interrupt_flag() as caught:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # at once: the echo that torchrun sends
        assert caught == [number, signal.SIGTERM]
        monkeypatch.setattr("ctt.train.signals.ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_a_closed_terminal_asks_the_run_to_stop_once_unless_it_is_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with interrupt_flag() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # from the shell, and from the system
            assert caught
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with interrupt_flag() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not caught
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_is_overwritten(tiny: Settings, out: Path) -> None:
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="the folder is not empty"):
        train(tiny, out=out)
    assert [p.name for p in out.iterdir()] == ["precious.txt"]


def test_divergence_is_told_and_the_checkpoint_stays(tiny: Settings, out: Path) -> None:
    settings = update(tiny, {"optim": {"lr": 1e30}, "train": {"checkpoint_every": 1}}, "test")
    with pytest.raises(UserError, match=r"Training diverged: by iteration [24]"):
        train(settings, out=out)
    saved = checkpoint.load(out / run.CHECKPOINT)
    assert all(torch.isfinite(value).all() for value in saved["method"].values())


def fail_after(monkeypatch: pytest.MonkeyPatch, iteration: int, error: Exception) -> None:
    """Raise the error instead of the step after that iteration."""
    original = Engine.__call__

    def call(self: Engine, *batches: Any) -> dict[str, torch.Tensor]:
        if self.iteration == iteration:
            raise error
        return original(self, *batches)

    monkeypatch.setattr(Engine, "__call__", call)


def test_too_little_memory_is_told_with_the_way_on(
    tiny: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = update(tiny, {"train": {"checkpoint_every": 2, "eval_every": 6}}, "test")
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with monkeypatch.context() as patch:
        fail_after(patch, 1, full)
        with pytest.raises(UserError, match=r"`data\.batch_size`.*`train\.accumulate`") as told:
            train(settings, out=out)
        assert "`resume`" not in str(told.value)  # there is no checkpoint yet
    out = out.with_name("other run")
    with monkeypatch.context() as patch:
        fail_after(patch, 3, full)
        with pytest.raises(UserError, match=f"`resume` '{re.escape(str(out))}' goes on"):
            train(settings, out=out)
    assert train(settings, resume=out)["iterations"] == 6
    fail_after(monkeypatch, 0, RuntimeError("a fault of the program"))
    with pytest.raises(RuntimeError, match="a fault"):
        train(settings, out=out.with_name("third"))


def test_too_little_memory_to_measure_is_told(
    tiny: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer = Trainer(tiny, out, None, World())
    monkeypatch.setattr(measures, "measure", full)
    with pytest.raises(UserError, match=r"Give `train\.measured_images` 0"):
        trainer.evaluator(None, print)


def test_a_full_disk_ends_a_run_with_the_way_on(
    tiny: Settings,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_room: Callable[[], AbstractContextManager[None]],
) -> None:
    change = {"train": {"checkpoint_every": 2, "tensorboard": False}, "data": {"workers": 0}}
    save, times = checkpoint.save, iter((True, False))

    def first_only(path: Path, state: dict[str, Any], keep: bool = True) -> None:
        with contextlib.nullcontext() if next(times) else no_room():
            save(path, state, keep)

    monkeypatch.setattr(checkpoint, "save", first_only)
    with pytest.raises(UserError, match=r"last\.pt cannot be written .* is whole: `resume`"):
        train(update(tiny, change, "test"), out=out)
    assert checkpoint.load(out / run.CHECKPOINT)["iteration"] == 2
    assert not list(out.rglob("*.part"))


def test_settings_given_on_resume_hold_from_then_on(
    tiny: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train(tiny, out=out)
    change = {"train": {"iterations": 5}, "optim": {"momentum": 0.5, "head_lr_factor": 3}}
    changed = update(tiny, change, "test")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            train(changed, resume=out)
    assert run.read_settings(out) == changed
    groups = checkpoint.load(out / run.CHECKPOINT)["optimizers"]["students"]["param_groups"]
    assert [(g["momentum"], g["lr_factor"]) for g in groups] == [(0.5, 1.0), (0.5, 3)] * 2
    assert train(run.read_settings(out), resume=out)["iterations"] == 5
    with pytest.raises(UserError, match="trained for 5 iterations already"):
        train(update(changed, {"train": {"iterations": 3}}, "test"), resume=out)


def test_going_on_needs_no_initial_weights(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    train(tiny, out=first)
    weights = tmp_path / "start.safetensors"
    (first / run.WEIGHTS).rename(weights)
    settings = update(tiny, {"model": {"weights": str(weights)}}, "test")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            train(settings, out=tmp_path / "second")
    weights.unlink()
    assert train(settings, resume=tmp_path / "second")["iterations"] == 6


@pytest.mark.parametrize("cut", [b",0.5\xff", b"1"])
def test_a_line_cut_short_by_a_crash_is_dropped(
    tiny: Settings, out: Path, monkeypatch: pytest.MonkeyPatch, cut: bytes
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            train(tiny, out=out)
    with (out / "metrics.csv").open("ab") as file:
        file.write(cut)
    train(tiny, resume=out)
    assert "\n,0.5" not in (out / "metrics.csv").read_text()
    assert all(any(list(row.values())[1:]) for row in read_rows(out / "metrics.csv"))


def test_all_labelled_leaves_nothing_to_teach(tiny: Settings, out: Path) -> None:
    with pytest.raises(UserError, match="all 24 training images are labelled"):
        train(dataclasses.replace(tiny, ratio="1/1"), out=out)
    assert not out.exists()
    settings = dataclasses.replace(tiny, ratio="1/1", method="supervised")
    assert train(settings, out=out)["unlabeled"] == 0
    assert train(settings, resume=out)["labeled"] == 24


def test_every_option_of_the_objective_trains(tiny: Settings, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {
            "loss": {
                "confidence_weight": "uniform",
                "hc_confidence": "teacher",
                "directional": False,
            }
        },
        {"loss": {"contrast_reduction": "mean", "ct_ramp": 3}, "views": {"mix": "classmix"}},
        {
            "bank": {
                "start": "all",
                "random_choice": False,
                "per_image": True,
                "min_confidence": 0.5,
            }
        },
        {"optim": {"clip_norm": 1.0, "nesterov": True, "warmup": 2, "head_lr_factor": 10}},
        {"train": {"amp": "bf16", "tensorboard": False}, "data": {"workers": 1, "flip": True}},
    ]
    for i, change in enumerate(changes):
        settings = update(tiny, {**change}, "test")
        settings = update(settings, {"train": {"iterations": 2}}, "test")
        assert train(settings, out=tmp_path / str(i))["iterations"] == 2


def test_a_profile_of_the_phases(
    tiny: Settings, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = out.with_name("[b]") / "run [/x]"  # would be markup to rich
    change = {"train": {"profile": 2, "iterations": 15, "eval_every": 15, "tensorboard": False}}
    summary = train(update(tiny, change, "test"), out=out)
    assert 0 < summary["input_wait"] < 1
    shown = capsys.readouterr().out
    assert f"Everything is in {out}\n" in shown
    assert "a step, mean of 2" in shown
    for phase in ("teachers", "contrast", "the rest"):
        assert phase in shown
    trace = json.loads((out / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"teachers", "students", "backward", "banks"} <= names


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_has_a_number(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Streams and the current device are asked for by number."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    assert pick_device(name) == torch.device("cuda", 0)
    assert chosen == [torch.device("cuda", 0)]


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"LOCAL_RANK is 2, .* it sees 2, from number 0"):
        pick_device("cuda")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux knows which CPUs are ours")
def test_processes_share_the_processors_that_they_may_use(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(6)))  # as Slurm allots them
    with restored_torch():
        set_up_torch(update(tiny, {"train": {"threads": 0}}, "test"))
        assert torch.get_num_threads() == 3


def test_a_run_that_is_stopped_keeps_its_trace(
    tiny: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = {"train": {"profile": 3, "iterations": 17, "eval_every": 14, "tensorboard": False}}
    stop_after(monkeypatch, 15)
    with pytest.raises(Stopped) as stopped:  # holds the frames of the loop
        train(update(tiny, change, "test"), out=out)
    trace = json.loads((stopped.value.folder / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"students", "evaluation", "checkpoint"} <= names


@pytest.mark.parametrize(("batch_size", "parts"), [(1, 1), (2, 2)])
def test_a_batch_norm_of_one_value_is_refused(
    tiny: Settings, out: Path, batch_size: int, parts: int
) -> None:
    change = {
        "method": "supervised",
        "data": {"crop": [8, 8], "batch_size": batch_size},
        "train": {"accumulate": parts},
    }
    settings = update(tiny, change, "test")
    for start in (lambda: train(settings, out=out), lambda: dry_run(settings)):
        with pytest.raises(UserError, match=f"`data.batch_size` {batch_size}: with one image"):
            start()
    assert not out.exists()
    larger = update(settings, {"data": {"crop": [9, 8]}}, "test")
    check_batch_norm(student(larger), larger, 1)
    check_batch_norm(student(settings), settings, 2)


@pytest.mark.parametrize(
    ("name", "labeled", "unlabeled", "fewest"),
    [
        ("self-training", 1, 4, 1),  # the first round has labelled images alone
        ("fixmatch", 4, 1, 1),
        ("fixmatch", 1, 4, 4),
        ("cps", 4, 1, 1),
        ("cct", 4, 1, 1),
        ("pseudoseg", 4, 1, 1),
        ("unimatch", 4, 1, 2),
        ("unimatch", 1, 4, 5),
        ("unimatch-v2", 4, 1, 2),
        ("unimatch-v2", 1, 4, 1),
        ("mean-teacher", 1, 1, 2),
    ],
)
def test_the_smallest_batch_of_a_method_is_known(
    tiny: Settings, out: Path, name: str, labeled: int, unlabeled: int, fewest: int
) -> None:
    data = {"crop": [8, 8], "batch_size": labeled, "unlabeled_batch_size": unlabeled}
    settings = update(tiny.with_method(name), {"data": data}, "test")
    plan = Plan.of(settings, None)
    seen: list[int] = []
    engine = make(settings)
    for norm in engine.method.students.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(
                lambda norm, given: seen.append(len(given[0])) if norm.training else None
            )
    none = engine.rounds.rounds[0].images == "none"
    engine(batch(labeled), None if none else unlabelled(unlabeled))
    assert plan.fewest_images(engine.method) == min(seen) == fewest
    if fewest > 1:
        plan.build()
        return
    told = f"`data.batch_size` {labeled} with {unlabeled} unlabelled images: with one image at a"
    with pytest.raises(UserError, match=told):
        train(settings, out=out)
