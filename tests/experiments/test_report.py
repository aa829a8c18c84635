"""ctt-report: its numbers, and that its page shows all of its pictures."""

import base64
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from ctt.cli import report
from ctt.errors import UserError
from ctt.experiments import catalog, charts, claims, pages, paper, results

TABLE = Path(__file__).parent / "shares.csv"  # of made-up runs
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "training"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as ctt-sweep leaves it, with another program's table in it."""
    shutil.copy(TABLE, tmp_path / "shares.csv")
    (tmp_path / "other.csv").write_text("method,seed\nmine,0\n")
    (tmp_path / "shares.yaml").write_text("command: [ctt-sweep, shares]\nsettings: {a: <b>}\n")
    points = [
        {"share": "1/50", "budget": "", "variant": name, "seed": seed, "iteration": i, "last": i}
        for name in ("supervised", "cross-teacher")
        for seed in "01"
        for i in ("10", "20")
    ]
    results.write(tmp_path / "shares-curves.csv", points, tuple(points[0]))
    return tmp_path


def test_differences_are_taken_seed_by_seed() -> None:
    rows = [row for row in results.read(TABLE) if row["share"] == "1/50"]
    by_name = {name: rows for (name,), rows in results.groups(rows, "variant").items()}
    ours, theirs = by_name["cross-teacher"], by_name["supervised"]
    found = results.difference(ours, theirs[::-1], "last")
    pairs = [results.numbers(some, "last") for some in (ours, theirs)]
    expected = ttest_rel(*pairs).confidence_interval(results.LEVEL)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(sum(pairs[0]) / 3 - sum(pairs[1]) / 3)
    assert str(results.difference(ours[:1], theirs, "last")) == "+10.5 (one seed)"
    assert results.difference(ours[:1], theirs[1:], "last") is None


def test_the_tables_as_markdown(folder: Path) -> None:
    assert report._main([str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "## shares on voc" in text
    assert "1 of 9 runs are not finished, 1 of them failed" in text
    assert re.search(r"Not finished: [\w-]+ \(1/\d+: seed \d\)\.", text)
    assert re.search(r"[\w-]+, seed \d, failed: ", text)
    # the paper's scores beside ours, where it prints some for this share
    assert "| row | networks | ensemble | networks against supervised |" in text
    assert re.search(r"\| supervised \| 40\.0 ± 1\.0 \| .* \| 55\.69 \|", text)
    assert re.search(r"\| cross-teacher \| 50\.2 ± 1\.0 \| .*\+10\.2 \[\+9\.4, \+10\.9\]", text)
    assert re.search(r"\| cross-teacher \| .* \| 69\.24 \| 30 \| 1,600 \|", text)
    assert "| row | 1/50 | 1/20 |" in text
    assert "| row | sky | sea |" in text
    assert "| supervised | 50.0 ± 1.0 | 30.0 ± 1.0 |" in text
    assert "Trained with ctt 0.1.0; PyTorch 2.9.0" in text
    assert "command: [ctt-sweep, shares]" in text


def test_what_the_paper_claims_is_beside_the_runs(tmp_path: Path) -> None:
    scores = {
        # differences of 2, 3 and 4, whose interval is 0.5 to 5.5
        "cross teacher": (50, 51, 55),
        "mean teacher": (48, 48, 51),
        "dual teachers": (51, 50, 55),
        "ensemble of two mean teachers": (51, 50.8, 55.2),
        "self-training": (54, 55.2, 58.9),
        "direct mutual teaching": (49,),
    }
    rows = [
        {
            **dict.fromkeys(results.COLUMNS, ""),
            "experiment": "table5",
            "dataset": "voc",
            "share": "1/8",
            "status": "done",
            "variant": name,
            "seed": str(seed),
            "last": str(value),
            "labeled": "50",
        }
        for name, own in scores.items()
        for seed, value in enumerate(own)
    ]
    results.write(tmp_path / "table5.csv", rows, results.COLUMNS)
    assert report._main([str(tmp_path)]) == 0
    found = (tmp_path / "report.md").read_text().partition("### voc, --ratio 1/8")[2]
    lines = re.findall(r"\| Table 5: cross teacher above ([\w -]+) \| (.*) \|", found)
    assert dict(lines) == {
        "mean teacher": "+2.34 | +3.0 [+0.5, +5.5] | 3 | the paper's order",
        "ensemble of two mean teachers": "+2.22 | -0.3 [-1.9, +1.2] | 3 | "
        "no order; less than in the paper",
        "dual teachers": "+1.27 | +0.0 [-2.5, +2.5] | 3 | "
        "no order; the paper's difference is possible",
        "direct mutual teaching": "+3.34 | +1.0 (one seed) | 1 | nothing with one seed",
        "self-training": "+2.94 | -4.0 [-4.4, -3.7] | 3 | the opposite order",
    }


def test_every_claim_is_of_rows_of_the_paper_and_of_an_experiment() -> None:
    for experiment, pairs in claims.CLAIMS.items():
        rows = {variant.name for variant in catalog.EXPERIMENTS[experiment].variants}
        assert {name for pair in pairs for name in pair} <= rows & paper.TABLES[experiment].keys()


def test_rows_are_compared_where_what_they_are_compared_with_is_trained(tmp_path: Path) -> None:
    rows = [row for row in results.read(TABLE) if row["share"] == "1/50"]
    names = {"supervised": "supervised", "cross-teacher": "mean teacher"}
    rows = [row for row in rows if row["variant"] in names]
    for row in rows:
        row |= {"experiment": "cost", "variant": names[row["variant"]], "budget": "cost 1"}
    alone = [row | {"budget": "cost 1/4"} for row in rows if row["variant"] == "supervised"]
    results.write(tmp_path / "cost.csv", [*alone, *rows], results.COLUMNS)
    assert report._main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.count("| row | networks | ensemble | networks against mean teacher |") == 1
    assert "| row | networks | ensemble | iterations |" in text  # of the budget without one
    assert re.search(r"\| supervised \| 40\.0 ± 1\.0 \| .*-10\.2 \[", text)


def test_seeds_without_a_score_are_not_told(tmp_path: Path) -> None:
    (tmp_path / "a folder.csv").mkdir()
    rows = [row for row in results.read(TABLE) if row["share"] == "1/50"]
    supervised = [row for row in rows if row["variant"] == "supervised"]
    supervised[1]["last"] = ""
    results.write(tmp_path / "shares.csv", rows, results.COLUMNS)
    assert report._main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| supervised |"))
    assert line.endswith("| 0, 2 |")
    assert re.search(r"\| cross-teacher \| .*\] \(2 seeds\) \|", text)


def test_scores_that_are_no_numbers_make_no_curve() -> None:
    metrics = [
        {"iteration": "2", "miou_teacher_1": "nan"},
        {"iteration": "4", "miou_teacher_1": "5"},
    ]
    assert results.curve(metrics) == [(4, 5.0)]


def test_sixteen_lines_can_be_told_apart() -> None:
    axes = Figure().add_subplot()
    rows = [
        {"variant": str(i), "share": "50", "budget": "", "labeled": "50", "last": "40"}
        for i in range(16)
    ]
    charts.lines(axes, rows, "labeled")
    forms = {(x[0].get_color(), x[0].get_linestyle(), x[0].get_marker()) for x in axes.containers}
    assert len(forms) == 16


def test_one_table_alone_without_what_lies_beside_it(tmp_path: Path) -> None:
    page = tmp_path / "pages" / "mine.html"
    assert report._main([str(TABLE), "--out", str(page)]) == 0
    assert page.with_suffix(".md").is_file()
    assert "<img" in page.read_text()


def test_the_page_needs_nothing_else(folder: Path) -> None:
    assert report._main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "&lt;b&gt;" in page
    pictures = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)">', page)
    assert [title for title, _ in pictures] == [
        "mIoU and labelled images",
        "mIoU during training, --ratio 1/50",
    ]
    assert all(base64.b64decode(data).rstrip().endswith(b"</svg>") for _, data in pictures)
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []


def test_costs_have_charts_of_their_own(tmp_path: Path) -> None:
    rows = results.read(TABLE)
    for i, row in enumerate(rows):
        budget = ("equal iterations", "cost 1/2", "cost 1")[i % 3]
        row |= {"experiment": "cost", "share": "50", "budget": budget, "seed": str(i)}
    results.write(tmp_path / "cost.csv", rows, results.COLUMNS)
    (part,) = pages.sections(tmp_path)
    assert [chart.title for chart in part.charts] == [
        "mIoU and forward passes of images",
        "mIoU and seconds of training",
    ]
    titles = [table.title.rpartition(", ")[2] for table in part.tables]
    assert set(titles) == {"equal iterations", "cost 1/2", "cost 1"}


def test_costs_have_a_chart_for_each_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = results.read(TABLE)
    for i, row in enumerate(rows):
        budget = ("cost 1/2", "cost 1")[i % 2]
        share = ("50", "100")[i // 2 % 2]
        row |= {"experiment": "cost", "share": share, "budget": budget, "seed": str(i)}
    results.write(tmp_path / "cost.csv", rows, results.COLUMNS)
    drawn: list[set[str]] = []
    lines = charts.lines

    def seen(axes: Any, rows: Sequence[results.Row], across: str) -> None:
        if across != "labeled":
            drawn.append({row["share"] for row in rows})
        lines(axes, rows, across)

    monkeypatch.setattr(charts, "lines", seen)
    (part,) = pages.sections(tmp_path)
    assert drawn == [{"50"}, {"50"}, {"100"}, {"100"}]
    titles = [chart.title for chart in part.charts]
    assert "mIoU and seconds of training, --ratio 50" in titles
    assert "mIoU and seconds of training, --ratio 100" in titles


def test_bad_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no table of an experiment"):
        report._main([str(tmp_path)])
    with pytest.raises(UserError, match="no such folder or table"):
        report._main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"give a name that ends in \.html"):
        report._main([str(TABLE), "--out", str(tmp_path / "page.pdf")])
    bad = tmp_path / "bad.csv"
    bad.write_text(TABLE.read_text().replace("done,41.0", "done,many"))
    with pytest.raises(UserError, match=r"bad\.csv, line 3: last is no number: 'many'"):
        report._main([str(tmp_path)])
    bad.write_text("experiment,seed\nshares,0\n")
    with pytest.raises(UserError, match="the column dataset is missing"):
        report._main([str(bad)])


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_the_page_in_a_browser(folder: Path) -> None:
    api = pytest.importorskip("playwright.sync_api")
    assert report._main([str(folder)]) == 0
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((folder / "report.html").as_uri())
        broken = "Array.from(document.images).filter(i => !i.complete || i.naturalWidth < 100)"
        assert tab.evaluate("document.images.length") == 2
        assert tab.evaluate(f"{broken}.length") == 0
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


COMMITTED = sorted({f.parent for f in RESULTS.glob("*/*.csv") if pages.is_table(f)})


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_the_page_of_the_results_that_come_with_the_program(folder: Path, tmp_path: Path) -> None:
    assert report._main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.md").read_text()
    rows = {"digits-long-twice": "mean teacher", "earth-encoders": "one of each"}
    assert f"| {rows.get(folder.name, 'supervised')} |" in text
    assert "nan" not in text


def test_what_the_last_evaluation_lacks_is_not_taken_from_one_before() -> None:
    rows = [
        {"confident_pixels": "0.4", "confident_accuracy": "0.75"},
        {"confident_pixels": "0", "confident_accuracy": ""},  # no pixel is confident any more
        {"loss_sup": "0.1"},
    ]
    assert results.inside(rows) == {"confident_pixels": "0.000"}
    assert results.inside(rows[2:]) == {}


@pytest.mark.parametrize("column", ["confident_pixels", "iou ice", "weights_apart"])
def test_every_number_of_a_page_is_checked(column: str, tmp_path: Path) -> None:
    (folder,) = (folder for folder in COMMITTED if folder.name == "earth")
    rows = results.read(folder / "table5.csv")
    rows[1][column] = "many"
    results.write(tmp_path / "bad.csv", rows, list(rows[0]))
    with pytest.raises(UserError, match=f"line 3: {column} is no number: 'many'"):
        report._main([str(tmp_path / "bad.csv")])


def test_results_come_with_the_program() -> None:
    assert [folder.name for folder in COMMITTED] == [
        "digits",
        "digits-long",
        "digits-long-twice",
        "digits-plain",
        "earth",
        "earth-encoders",
        "earth-tune",
        "earth-tune-600",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "digits"}, "mixes shares, voc.* with shares, digits"),
        ({}, "2 rows are of 1/50, supervised, seed 0"),
    ],
)
def test_rows_that_would_be_paired_wrongly_are_refused(
    folder: Path, change: dict[str, str], message: str
) -> None:
    rows = results.read(folder / "shares.csv")
    joined = [*rows, *(row | change for row in rows)]
    results.write(folder / "shares.csv", joined, results.COLUMNS)
    with pytest.raises(UserError, match=message):
        pages.sections(folder)


def test_no_text_of_the_users_is_replaced(folder: Path) -> None:
    notes = folder / "page.md"
    notes.write_text("my own notes\n")
    with pytest.raises(UserError, match=r"page.md is there and no report"):
        report._main([str(folder), "--out", str(folder / "page.html")])
    assert notes.read_text() == "my own notes\n"
    assert not (folder / "page.html").exists()
    for _ in range(2):  # the second time over a report
        assert report._main([str(folder), "--out", str(folder / "other.html")]) == 0


def test_a_class_that_teachers_lack_has_no_score() -> None:
    scores = {"teacher_1": {"sea": 61.0, "ship": None}, "student_1": {"sea": 60.0, "ship": 0.0}}
    assert results.class_iou(scores) == {"iou sea": 61.0, "iou ship": None}
