"""Methods by the command line: the list, the help of each, and methods of the user's own."""

import csv
import shlex
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import yaml

from ctt import methods, run
from ctt.cli import predict
from ctt.cli import train as program
from ctt.errors import UserError
from ctt.methods import catalog
from ctt.settings import Settings
from tests.train.steps import batch, make

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "entropy_minimization.py"
QUICK = (
    "--ratio 6 --data.labeled-pool 24 --data.eval-images 6 --data.batch-size 2 --model.width 4 "
    "--model.features 8 --train.threads 1 --train.iterations 2 --train.no-tensorboard"
)


def train(arguments: str) -> int:
    return program._main(shlex.split(arguments))


def test_a_method_in_a_file_trains_resumes_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run serves without the file, whose code is not run then; going on needs it, or the copy
    in the run."""
    shutil.copy(EXAMPLE, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    assert train(f"{QUICK} --method mine.py:EntropyMinimization --options.weight 0.3 --out r") == 0
    assert (tmp_path / "r" / "method.py").read_text() == EXAMPLE.read_text()
    assert yaml.safe_load((tmp_path / "r" / run.CONFIG).read_text())["options"] == {"weight": 0.3}
    monkeypatch.chdir("/")
    assert train(f"--resume {tmp_path / 'r'} --train.iterations 3") == 0
    rows = (tmp_path / "r" / "metrics.csv").read_text().splitlines()
    assert "loss_entropy" in rows[0]
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    catalog.load.cache_clear()
    picture = tmp_path / "r" / "samples.png"
    out = tmp_path / "masks"
    assert predict._main([str(tmp_path / "r"), str(picture), "--out", str(out)]) == 0
    assert not (tmp_path / "was run").exists()
    (tmp_path / "mine.py").unlink()
    for iterations in (4, 5):  # the second time config.yaml names the copy
        capsys.readouterr()
        assert train(f"--resume {tmp_path / 'r'} --train.iterations {iterations}") == 0
        assert "goes on with its own copy of the method" in capsys.readouterr().out
        assert run.read_settings(tmp_path / "r").options.weight == 0.3
    moved = (tmp_path / "r").rename(tmp_path / "moved")
    assert train(f"--resume {moved} --train.iterations 6") == 0
    assert (moved / "method.py").read_text() == EXAMPLE.read_text()
    (moved / "method.py").unlink()
    catalog.load.cache_clear()
    with pytest.raises(UserError, match=r"there is no file .*method\.py"):
        train(f"--resume {moved} --train.iterations 7")


MINE = """
import torch
from torch import nn
from ctt.methods import About
from ctt.methods.base import Method


class Mine(Method):
    about = About(unlabeled=False, uses=("loss.sup", "labeled"))
    terms = ("sup", "critic")
    logged = ("known", "reported")

    def __init__(self, setup):
        super().__init__(setup)
        with setup.seeded("critic"):
            self.critic = nn.Conv2d(setup.classes, 1, 1)

    def optimizers(self):
        critic = torch.optim.Adagrad(self.critic.parameters(), self.settings.optim.lr / 4)
        return {**super().optimizers(), "critic": critic}

    def prepare(self, b, step):
        return b | {"pixels": step.count(b["label"])}

    def losses(self, b, step):
        logits = step.forward(self.students[0], b["images"]).logits
        step.log("known", logits.detach().mean() / step.processes)
        sup = self.labeled(logits, self.students[0].grid, b, step)
        return {"sup": (1.0, sup), "critic": (1.0, self.critic(logits.detach()).square().mean())}

    def report(self):
        return {"reported": 1.0}
"""


def test_a_second_optimizer_keeps_its_rate_beside_that_of_the_run(
    tmp_path: Path, tiny: Settings
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    settings = tiny.with_method(f"{tmp_path / 'mine.py'}:Mine")
    engine = make(settings)
    before = engine.method.state_dict()["critic.weight"].clone()
    engine(batch(4), None)
    rates = {n: o.param_groups[0]["lr"] for n, o in engine.optimizers.items()}
    assert rates == {"students": settings.optim.lr, "critic": settings.optim.lr / 4}
    assert not torch.equal(engine.method.state_dict()["critic.weight"], before)
    assert train(f"{QUICK} --method {tmp_path / 'mine.py'}:Mine --out {tmp_path / 'r'}") == 0
    rows = list(csv.DictReader((tmp_path / "r" / "metrics.csv").open(encoding="utf-8")))
    assert [row["reported"] for row in rows if float(row["known"] or 0)] == ["1"]


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ('terms = ("critic",)', r"returns 'sup', which `terms` of Mine .* \('critic', 'sup'\)"),
        ("logged = ()", "gives 'known', which `logged` of Mine"),
        ('logged = ("known",)', "gives 'reported', which `logged` of Mine does not name"),
    ],
)
def test_numbers_that_a_method_does_not_declare_are_told(
    tmp_path: Path, now: str, told: str
) -> None:
    (tmp_path / "mine.py").write_text(f"{MINE}\n    {now}\n")
    with pytest.raises(UserError, match=told):
        train(f"{QUICK} --method {tmp_path / 'mine.py'}:Mine --out {tmp_path / 'r'}")


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (
            "def prepare(self, b, step): pass",
            r"`prepare` returns nothing \(None\)\. Return the batch",
        ),
        (
            "def prepare(self, b, step): return b | {'x': [1]}",
            "gives the batch 'x', which is a list",
        ),
        ("def losses(self, b, step): pass", r"`losses` returns nothing \(None\)\. Return a dict"),
        ("def losses(self, b, step): return {'sup': b['images'].sum()}", r"shape \(\) for 'sup'"),
        ("def losses(self, b, step): return {'sup': (1, 2.0)}", "a float as the value of 'sup'"),
        ("terms = 'sup critic'", r"`terms` is a text\. Write a tuple"),
        ("def losses(self, b, step): return {}", "returns no term with a gradient"),
        (
            "def losses(self, b, step): return {'sup': (1, b['images'].sum())}",
            "returns no term with a gradient",
        ),
        (
            "def losses(self, b, step): return {'sup': (None, b['images'].sum())}",
            r"returns nothing \(None\) as the weight of 'sup'",
        ),
        ("def losses(self, b, step): step.log('known', 1.0)", "is given a float as 'known'"),
        ("def report(self): pass", r"`report` returns nothing \(None\)"),
        ("def report(self): return {'reported': 'x'}", "gives 'reported', which is a str"),
        ("terms = ('sup', 'critic', 'total')", "two numbers of metrics.csv .* named 'total'"),
        ("logged = ('known', 'lr')", "two numbers of metrics.csv .* named 'lr'"),
        ("def schedules(self): return {'x': 1.0}", "`schedules` returns a dict"),
        ("def schedules(self): return {'rate': float}", "the learning rate of the run"),
        ("def optimizers(self): return {}", "`optimizers` returns none"),
        (
            "def optimizers(self): return torch.optim.SGD(self.parameters(), 1)",
            "`optimizers` returns a SGD",
        ),
        (
            "def prepare(self, b, step): return b | {'x': b['images'].new_zeros(5)}",
            r"accumulate` 2: 'x' of the batch has shape \(5,\)",
        ),
    ],
)
def test_a_slip_of_a_method_is_told(tmp_path: Path, now: str, told: str) -> None:
    (tmp_path / "mine.py").write_text(f"{MINE}\n    {now}\n")
    extra = f"--train.accumulate 2 --out {tmp_path / 'r'}"
    with pytest.raises(UserError, match=told):
        train(f"{QUICK} --method {tmp_path / 'mine.py'}:Mine {extra}")


def test_a_run_without_a_name_is_called_after_the_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(f"{QUICK} --method {EXAMPLE}:EntropyMinimization") == 0
    assert (tmp_path / "runs" / "digits-EntropyMinimization-1" / run.WEIGHTS).is_file()


def test_options_of_a_method_in_a_settings_file(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"method: {EXAMPLE}:EntropyMinimization\noptions: {{weight: 0.7}}\n")
    assert program.read(["--config", str(config)])[1].options == catalog.get(
        f"{EXAMPLE}:EntropyMinimization"
    ).option_class()(weight=0.7)
    config.write_text(f"method: {EXAMPLE}:EntropyMinimization\noptions: {{height: 0.7}}\n")
    with pytest.raises(UserError, match=r"there is no setting options\.height"):
        program.read(["--config", str(config)])


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "Mine", "has no class Mine"),
        ("class Mine: pass", "Mine", "has no class Mine that is a ctt.methods.base.Method"),
        ("1 / 0", "Mine", r"cannot be run \(ZeroDivisionError: division by zero\)"),
        ("import nowhere", "Mine", "No module named 'nowhere'"),
        ("raise SystemExit(3)", "Mine", r"cannot be run \(SystemExit: 3\)"),
        (MINE.replace("About(un", "dict(un"), "Mine", "`about` must be an About"),
        (MINE.replace('"loss.sup", "labeled"', '"loss.sup"'), "Mine", "got 'loss.sup'"),
        (MINE.replace('"labeled")', '"label")'), "Mine", r"a tuple of .* got .*'label'\)"),
        (
            MINE.replace("unlabeled=False", "options=dict"),
            "Mine",
            "is dict, no subclass of Options",
        ),
        (MINE.replace("unlabeled=False", "options=3"), "Mine", "is 3, no class. Give the class"),
        (MINE.replace('"loss.sup", "labeled"', '["loss.sup"],'), "Mine", r"got \(\['loss.sup'\],"),
        (None, "Mine", "there is no file"),
    ],
)
def test_a_file_without_a_method_is_refused(
    tmp_path: Path, text: str | None, name: str, message: str
) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        program.read(["--method", f"{tmp_path / 'mine.py'}:{name}"])


def test_options_are_checked_and_those_of_others_refused() -> None:
    with pytest.raises(UserError, match=r"`options\.weight` must be at least 0, got -1"):
        program.read(shlex.split(f"--method {EXAMPLE}:EntropyMinimization --options.weight -1"))
    with pytest.raises(UserError, match=r"`loss\.hc` changes nothing with `method` .*entropy_min"):
        program.read(shlex.split(f"--method {EXAMPLE}:EntropyMinimization --loss.hc 1"))


@pytest.mark.parametrize("name", ["u2pl", "semiseg-contrastive", "c3-semiseg"])
@pytest.mark.parametrize("rule", ["classmix", "none"])
def test_the_mix_of_the_run_is_refused_by_methods_with_their_own(name: str, rule: str) -> None:
    with pytest.raises(UserError, match=f"`views.mix` changes nothing with `method` {name}"):
        program.read(["--method", name, "--views.mix", rule])


def test_a_method_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    point = EntryPoint("entropy", "entropy_minimization:EntropyMinimization", catalog.GROUP)
    monkeypatch.setattr(catalog, "entry_points", lambda group: [point])
    settings = program.read(shlex.split("--method entropy --options.weight 2"))[1]
    assert methods.get("entropy").load().__name__ == "EntropyMinimization"
    assert settings.options == methods.get("entropy").option_class()(weight=2)


def test_the_list_names_every_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # in a narrow window headings are cut
    assert train("--list-methods") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in methods.names())
    heading = next(line for line in shown.splitlines() if "method" in line and "cost" in line)
    assert [part.strip() for part in heading.strip("┃").split("┃")][:3] == [
        "method",
        "paper",
        "students",
    ]


@pytest.mark.parametrize("name", methods.names())
def test_help_shows_what_the_method_reads(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(f"--method {name} --help")
    shown = capsys.readouterr().out
    about = methods.get(name)
    unused = about.unused(about.pairs)
    for setting in (
        "loss.hc",
        "bank.capacity",
        "ema.decay",
        "loss.ct",
        "views.mix",
        "views.jitter",
    ):
        hidden = setting in unused or setting.partition(".")[0] in unused
        assert (f"--{setting} " in shown) != hidden, setting
