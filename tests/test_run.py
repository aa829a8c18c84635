"""What a run's folder says of the places it was started with."""

import dataclasses
from pathlib import Path

import pytest

from ctt import run
from ctt.cli import train as program
from ctt.data.split import write_list
from ctt.errors import UserError
from ctt.settings import DataSettings, ModelSettings, Settings, update
from ctt.train.dry_run import dry_run
from ctt.train.loop import train
from ctt.train.plan import split_of_run
from tests.data import trees


def test_paths_of_a_run_hold_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cached = DataSettings(cache=Path("~/cache"))
    settings = Settings(data_root=Path("set"), split_labeled=Path("list.txt"), data=cached)
    folder, _ = run.create(tmp_path / "run", settings)
    kept = run.read_settings(folder)
    assert (kept.data_root, kept.split_labeled) == (tmp_path / "set", tmp_path / "list.txt")
    assert kept.data.cache == Path("~/cache")  # of whoever resumes it
    run.check_resumable(kept, settings)
    run.check_resumable(settings, kept)  # a run of a version that kept them as they were given
    with pytest.raises(UserError, match="`split_labeled`"):
        run.check_resumable(kept, dataclasses.replace(settings, split_labeled=Path("other.txt")))


def test_weights_of_a_run_are_found_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Self-training starts its students from them again in a later round."""
    monkeypatch.chdir(tmp_path)
    model = ModelSettings(weights=("imagenet", "none", "net.pth"))
    settings = Settings(model=model)
    kept = run.read_settings(run.create(tmp_path / "run", settings)[0])
    assert kept.model.weights == ("imagenet", "none", str(tmp_path / "net.pth"))
    run.check_resumable(kept, settings)


@pytest.mark.parametrize(
    ("option", "change"),
    [
        ("eval.flip` True", {"eval": {"flip": True}}),
        ("eval.scales`", {"eval": {"scales": [0.5, 1.0]}}),
        ("data.eval_images` 20", {"data": {"eval_images": 20}}),
    ],
)
def test_scores_of_a_run_compare(option: str, change: dict[str, object]) -> None:
    """The best network so far was chosen by them."""
    with pytest.raises(UserError, match=rf"^`{option}.* scores under the two are not comparable"):
        run.check_resumable(Settings(), update(Settings(), change, ""))
    run.check_resumable(Settings(), update(Settings(), {"eval": {"batch_pixels": 9}}, ""))


@pytest.mark.parametrize(
    ("option", "change"),
    [
        ("optim.name` adamw", {"name": "adamw"}),
        ("optim.layer_decay` 0.5", {"layer_decay": 0.5}),
        ("optim.decay_vectors` False", {"decay_vectors": False}),
    ],
)
def test_the_optimiser_of_a_run_is_fixed(option: str, change: dict[str, object]) -> None:
    """Its state is that of its groups of parameters."""
    with pytest.raises(UserError, match=rf"^`{option}: .* its checkpoint fits nothing else"):
        run.check_resumable(Settings(), update(Settings(), {"optim": change}, ""))
    run.check_resumable(Settings(), update(Settings(), {"optim": {"lr": 9.0}}, ""))


def test_what_taught_and_weighed_a_run_is_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beta = update(Settings(), {"labeled": {"beta": 0.5}}, "")
    with pytest.raises(UserError, match=r"^`labeled.beta` 0.5: .* its checkpoint fits nothing"):
        run.check_resumable(Settings(), beta)
    for name, text in (("a", "one"), ("moved", "one"), ("b", "another")):
        (tmp_path / name).write_text(text)
    a, moved, b, gone = (
        Settings(method="distill", teacher=tmp_path / name) for name in ("a", "moved", "b", "gone")
    )
    run.check_resumable(a, moved)
    run.check_resumable(gone, a)
    on_hub = Settings(method="distill", teacher=Path("hf:me/net"))
    assert run.with_whole_paths(on_hub) == on_hub
    other = Settings(method="distill", teacher=Path("hf:you/net"))
    with pytest.raises(UserError, match=r"^`teacher` hf:you.net: the run to be resumed has hf:me"):
        run.check_resumable(on_hub, other)
    with pytest.raises(UserError, match=r"^`teacher` .*b: the run to be resumed has .*a, and its"):
        run.check_resumable(a, b)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # which Windows reads
    at_home = Settings(method="distill", teacher=Path("~/a"))
    run.check_resumable(at_home, moved)
    with pytest.raises(UserError, match=r"^`teacher` .*b: the run to be resumed has ~.a, and its"):
        run.check_resumable(at_home, b)


def test_a_run_goes_on_from_another_folder(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees.write_folder(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    short = dataclasses.replace(tiny.train, iterations=1, tensorboard=False)
    place = {"dataset": "folder", "data_root": Path("set"), "ratio": "2"}
    train(dataclasses.replace(tiny, **place, train=short), out=Path("run"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume = tmp_path / "run"
    dry_run(run.read_settings(resume), resume=resume)
    description = tmp_path / "set" / "dataset.yaml"
    before = description.read_text("utf-8")
    reordered = f"classes: [{', '.join([*trees.CLASSES[::-1]])}]\n"
    for text, fact in ((reordered, "class 0 is"), (f"{before}mean: [0.5, 0.5, 0.5]\n", "mean is")):
        description.write_text(text, "utf-8")
        with pytest.raises(
            UserError, match=rf"trained on other data than .*: {fact} .* in the data"
        ):
            train(run.read_settings(resume), resume=resume)


@pytest.mark.parametrize("evaluation", [2, 0])
def test_a_run_goes_on_with_the_images_that_it_was_evaluated_on(
    tmp_path: Path, evaluation: int
) -> None:
    """Whether they were in val/ or held out, and whatever is in val/ now."""
    settings = Settings(dataset="folder", data_root=tmp_path / "set")
    root = trees.write_folder(tmp_path / "set", evaluation=evaluation)
    folder, _ = run.create(tmp_path / "run", settings)
    before = settings.open_dataset()
    (folder / "split").mkdir()
    for path, names in (
        (run.LABELED_LIST, before.train_ids()[:2]),
        (run.UNLABELED_LIST, before.unlabeled_ids()),
        (run.EVALUATION_LIST, before.eval_ids()),
    ):
        write_list(folder / path, names)
    trees.write_folder(root, evaluation=5)
    now = settings.open_dataset()
    assert now.eval_ids() != before.eval_ids()
    split_of_run(folder, now, True)
    assert (now.eval_ids(), now.train_ids()) == (before.eval_ids(), before.train_ids())
    assert "came later and are left out" in now.notes[-1]
    lost = before.eval_ids()[0]
    (root / lost).unlink()
    with pytest.raises(UserError, match=rf"evaluation\.txt: .* {lost} is no longer there \(1 such"):
        split_of_run(folder, settings.open_dataset(), True)


@pytest.mark.parametrize("method", ["cross-teacher", "supervised"])
def test_the_settings_of_a_run_are_a_settings_file(tmp_path: Path, method: str) -> None:
    """Also those that its method does not use; what is given beside them must change something."""
    begin = ["--dataset", "digits", "--method", method]
    _, settings = program.read(begin)
    file = run.create(tmp_path / "run", settings)[0] / run.CONFIG
    repeat = ["--config", str(file)]
    assert program.read(repeat)[1] == run.with_whole_paths(settings)
    with pytest.raises(UserError, match="`teacher` changes nothing with"):
        program.read([*repeat, "--teacher", "other"])
