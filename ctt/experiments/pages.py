"""Reports of experiments: tables and charts of their rows, as HTML and as Markdown."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ctt import run
from ctt.errors import UserError
from ctt.experiments import catalog, claims, paper, results
from ctt.experiments.charts import Chart, curves, score_by_cost, score_by_share
from ctt.experiments.results import CURVES, DONE, Row, difference, mean, numbers, spread
from ctt.experiments.runs import RUNS
from ctt.experiments.table import PLACE

LEGEND = (
    "mIoU in percent: mean ± standard deviation over the seeds, after the last iteration. "
    "`networks` is the mean over the teachers of a run (over the students where there are none), "
    "so nothing is chosen by the score; `ensemble` is the mean of the teachers' probabilities. "
    "A difference is taken seed by seed, with the 95 % confidence interval of its mean by "
    "Student's t; an interval that holds 0 shows no difference. `forwards` counts images that went "
    "through a network in training, three times where gradients followed."
)
TUNE = "images held out to choose settings by"
HEADING = "# Experiments"  # first line of a report as Markdown
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #1b1b1b; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .7rem; text-align: right }
td + td { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
div.wide { overflow-x: auto }
figure { margin: 1rem 0 }
figcaption { color: #555 }
img { max-width: 100%; height: auto }
pre { overflow-x: auto }
code { background: #f2f2f2; padding: 0 .2rem }
"""


@dataclass(frozen=True)
class Table:
    """Rows of text below a heading; the first column is that of names."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass
class Section:
    """One experiment on one dataset."""

    title: str
    text: list[str]
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    settings: str = ""


def sections(folder: Path, embeddings: bool = False) -> list[Section]:
    """Return a section for each table of `ctt-sweep` in a folder, or for the one table given.

    Args:
        embeddings: also draw the features of the runs that are there.

    Raises:
        UserError: there is none, or one that cannot be read.
    """
    if folder.is_file():
        files = [folder]
    else:
        files = sorted(f for f in folder.glob("*.csv") if not f.name.endswith(CURVES))
        files = [file for file in files if is_table(file)]
    if not files:
        raise UserError(
            f"{folder}: there is no table of an experiment. Give the folder that ctt-sweep wrote "
            f"into (its `out`), or a table in it."
        )
    found = [section(file, embeddings) for file in files]
    return [*of_claims([row for file in files for row in results.read(file)]), *found]


def of_claims(rows: Sequence[Row]) -> list[Section]:
    """Return the section that sets what the paper claims beside these runs; none if none is of a
    table with a claim."""
    done = [row for row in rows if row["status"] == DONE]
    lines: dict[str, list[tuple[str, ...]]] = {}
    for own in results.groups(done, "experiment", "dataset", "share", "budget").values():
        title = f"{own[0]['dataset']}, --ratio {own[0]['share']}"
        title += f", {TUNE}" if own[0].get("eval_split") == "tune" else ""
        lines.setdefault(title, []).extend(claims.compared(own))
    tables = [Table(title, claims.COLUMNS, some) for title, some in lines.items() if some]
    return [Section("What the paper claims", [claims.LEGEND], tables)] if tables else []


def is_table(file: Path) -> bool:
    """Return whether a CSV seems to be a table of `ctt-sweep`: others may lie beside it."""
    if not file.is_file():
        return False
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.readline().startswith("experiment,")


def section(file: Path, embeddings: bool = False) -> Section:
    """Return the report of one table, with pictures of the runs that lie beside it.

    Args:
        embeddings: also draw the features of these runs.

    Raises:
        UserError: it cannot be read.
    """
    rows = results.read(file)
    if not rows:
        raise UserError(f"{file}: the table has no rows.")
    refuse_mixed(file, rows)
    done = [row for row in rows if row["status"] == DONE]
    name, data = rows[0]["experiment"], rows[0]["dataset"]
    experiment = catalog.EXPERIMENTS.get(name)
    text = [f"{experiment.source}: {experiment.what}." if experiment else ""]
    text += [f"Scores are on the {TUNE}."] if rows[0].get("eval_split") == "tune" else []
    if len(done) < len(rows):
        text += unfinished(rows)
    text.append(versions(done))
    found = Section(f"{name} on {data}", [sentence for sentence in text if sentence])
    baseline = compared_with(rows)
    shares, budgets = (list(dict.fromkeys(r[c] for r in rows)) for c in ("share", "budget"))
    if len(shares) > 1:
        found.tables += [by_share(done, budget) for budget in budgets]
        found.charts.append(score_by_share(done))
    if len(budgets) > 1:
        for share in shares:
            own = [row for row in done if row["share"] == share]
            of = f", --ratio {share}" if len(shares) > 1 else ""
            found.charts += [score_by_cost(own, column, of) for column in ("forwards", "seconds")]
    for (share, budget), chosen in results.groups(done, "share", "budget").items():
        found.tables.append(comparison(chosen, share, budget, baseline))
        where = found.tables[-1].title
        found.tables += by_class(chosen, where)
        found.tables += inside(chosen, where)
    found.charts += curves(file.with_name(f"{file.stem}{CURVES}"))
    charts, notes = pictures(done, file.parent / RUNS, embeddings)
    found.charts += charts
    found.text += notes
    beside = file.with_suffix(".yaml")
    if beside.is_file():
        found.settings = beside.read_text("utf-8", "replace")
    return found


def refuse_mixed(file: Path, rows: Sequence[Row]) -> None:
    """Refuse rows that cannot be told apart by what the report groups them by.

    Raises:
        UserError: rows of several experiments or datasets, or two runs of one place.
    """
    columns = [c for c in ("experiment", "dataset", "eval_split") if c in rows[0]]
    kinds = results.groups(rows, *columns)
    if len(kinds) > 1:
        first, second = (", ".join(filter(None, kind)) for kind in list(kinds)[:2])
        raise UserError(
            f"{file}: the table mixes {first} with {second}. Give each a table of its own."
        )
    done = [row for row in rows if row["status"] == DONE]
    for place, own in results.groups(done, *PLACE).items():
        if len(own) > 1:
            hashes = ", ".join(row.get("settings_hash", "") for row in own)
            raise UserError(
                f"{file}: {len(own)} rows are of {', '.join(filter(None, place[:3]))}, seed "
                f"{place[3]} (settings_hash {hashes}). Remove all but one."
            )


def unfinished(rows: Sequence[Row]) -> Iterator[str]:
    """Yield sentences on the runs of which the tables say nothing."""
    without = [row for row in rows if row["status"] != DONE]
    failed = [row for row in without if row["status"] == results.FAILED]
    yield (
        f"{len(without)} of {len(rows)} runs are not finished, {len(failed)} of them failed; what "
        f"follows is of the others."
    )
    for (variant,), own in results.groups(without, "variant").items():
        places: dict[str, list[str]] = {}  # shares and budgets that lack the same seeds
        for (share, budget), here in results.groups(own, "share", "budget").items():
            seeds = ", ".join(row["seed"] for row in here)
            place = " at ".join(part for part in (share, budget) if part)
            places.setdefault(f"seed{'s' * (len(here) > 1)} {seeds}", []).append(place)
        which = [
            ": ".join(part for part in (", ".join(filter(None, among)), seeds) if part)
            for seeds, among in places.items()
        ]
        yield f"Not finished: {variant} ({'; '.join(which)})."
    for (error,), own in results.groups(failed, "error").items():
        yield f"{own[0]['variant']}, seed {own[0]['seed']}, failed: {error}"


def compared_with(rows: Sequence[Row]) -> str:
    """Return the name of the variant that the others are compared with."""
    names = [row["variant"] for row in rows]
    experiment = catalog.EXPERIMENTS.get(rows[0]["experiment"])
    wanted = experiment.compared_with if experiment else ""
    return wanted if wanted in names else names[0]


def versions(rows: Sequence[Row]) -> str:
    """Return a sentence on the programs and devices of the runs."""
    parts = []
    for name, column in (
        ("ctt", "ctt"),
        ("PyTorch", "torch"),
        ("Python", "python"),
        ("", "device"),
    ):
        values = sorted({row[column] for row in rows if row.get(column)})
        parts += [f"{name} {', '.join(values)}".strip()] if values else []
    return f"Trained with {'; '.join(parts)}." if parts else ""


def comparison(rows: Sequence[Row], share: str, budget: str, baseline: str) -> Table:
    """Return the table of the variants with the same labels and budget."""
    by_variant = results.groups(rows, "variant")
    others = by_variant.get((baseline,), [])
    told = of_paper(rows[0])
    compared = ("last", "ensemble") if others else ()
    columns = (
        *("row", "networks", "ensemble"),
        *(f"{what} against {baseline}" for what in ("networks", "ensemble") if compared),
        *([told] if told else []),
        *("iterations", "forwards", "seconds", "seeds"),
    )
    lines = []
    for (variant,), own in by_variant.items():
        leads = ["" if variant == baseline else lead(own, others, column) for column in compared]
        score = paper.printed(own[0]["experiment"], own[0]["dataset"], share, variant)
        lines.append(
            (
                variant,
                spread(numbers(own, "last")),
                spread(numbers(own, "ensemble")),
                *leads,
                *([f"{score:.2f}" if score is not None else ""] if told else []),
                *(f"{m:,.0f}" if (m := mean(own, c)) is not None else "" for c in COSTS),
                ", ".join(row["seed"] for row in own if row["last"]),
            )
        )
    labeled = ", ".join(dict.fromkeys(row["labeled"] for row in rows))
    of = f", {budget}" if budget else ""
    return Table(f"{labeled} labelled images (--ratio {share}){of}", columns, lines)


def lead(rows: Sequence[Row], others: Sequence[Row], column: str) -> str:
    """Return the difference of two variants, with the number of seeds if some are in one alone."""
    found = difference(rows, others, column)
    if found is None:
        return ""
    some = 1 < found.pairs < len(numbers(rows, column))
    return f"{found} ({found.pairs} seeds)" if some else str(found)


def by_class(rows: Sequence[Row], where: str) -> list[Table]:
    """Return the table of the IoU of each class (columns); none if the rows have none."""
    columns = [name for name in rows[0] if name.startswith(results.IOU)]
    columns = [name for name in columns if any(row[name] for row in rows)]
    if not columns:
        return []
    lines = [
        (variant, *(spread(numbers(own, name)) for name in columns))
        for (variant,), own in results.groups(rows, "variant").items()
    ]
    names = (name.removeprefix(results.IOU) for name in columns)
    return [Table(f"IoU of the classes, {where}", ("row", *names), lines)]


def inside(rows: Sequence[Row], where: str) -> list[Table]:
    """Return the table of what the last evaluation measured on unlabelled images; none if the rows
    have nothing of it."""
    columns = [name for name in results.INSIDE if numbers(rows, name)]
    if not columns:
        return []
    lines = [
        (variant, *(spread(numbers(own, name), 2) for name in columns))
        for (variant,), own in results.groups(rows, "variant").items()
    ]
    names = (name.replace("_", " ") for name in columns)
    return [Table(f"On unlabelled images in the end, {where}", ("row", *names), lines)]


COSTS = ("iterations", "forwards", "seconds")


def of_paper(row: Row) -> str:
    """Return the heading of the paper's scores beside those of a row; empty: it has none."""
    if row["experiment"] in paper.TABLES:
        return f"paper: {paper.ELSEWHERE}"
    return "paper" if row["experiment"] == "shares" and row["dataset"] in paper.SHARES else ""


def by_share(rows: Sequence[Row], budget: str) -> Table:
    """Return the scores of all variants (rows) at all shares (columns)."""
    rows = [row for row in rows if row["budget"] == budget]
    shares = list(dict.fromkeys(row["share"] for row in rows))
    lines = []
    for (variant,), own in results.groups(rows, "variant").items():
        at = results.groups(own, "share")
        lines.append((variant, *(spread(numbers(at.get((s,), []), "last")) for s in shares)))
    title = "networks by share of labels" + (f", {budget}" if budget else "")
    return Table(title, ("row", *shares), lines)


def pictures(rows: Sequence[Row], folder: Path, embeddings: bool) -> tuple[list[Chart], list[str]]:
    """Return what a run of each variant predicts and, if wanted, where its features lie; and a
    sentence for each picture of features that cannot be drawn.

    Args:
        rows: of finished runs; of each variant the first one is shown.
        folder: of the runs; those that are not there are left out.
    """
    found, notes = [], []
    for (variant,), own in results.groups(rows, "variant").items():
        of = folder / own[0]["settings_hash"]
        title = f"{variant}, --ratio {own[0]['share']}, seed {own[0]['seed']}"
        samples = of / "samples.png"
        if samples.is_file():
            found.append(Chart(f"Predictions: {title}", samples.read_bytes(), "png"))
        if embeddings and run.has_checkpoint(of):
            try:
                found.append(Chart(f"Features: {title}", embedding(of), "png"))
            except UserError as error:  # its data is elsewhere, for example
                notes.append(f"Features of {title} could not be drawn: {error}")
    return found, notes


def embedding(folder: Path) -> bytes:
    """Return the picture of the features of the run in a folder."""
    from ctt.device import pick_device
    from ctt.inference.embedding import draw_run
    from ctt.inference.load import load_trained

    trained = load_trained(folder)
    dataset = trained.settings.open_dataset()
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "embedding.png"
        draw_run(path, folder, trained, dataset, pick_device("auto", ""), trained.settings.eval)
        return path.read_bytes()


def as_markdown(found: Iterable[Section]) -> str:
    """Return the tables as Markdown; charts are in the HTML alone."""
    blocks = [HEADING, LEGEND]
    for part in found:
        blocks += [f"## {part.title}", *part.text]
        for table in part.tables:
            cells = [table.columns, ("---", *("---:" for _ in table.columns[1:])), *table.rows]
            body = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
            blocks += [f"### {table.title}", "\n".join(body)]
        if part.settings:
            blocks += ["### Command and settings of all runs", f"```yaml\n{part.settings}```"]
    return "\n\n".join(blocks) + "\n"


def as_html(found: Iterable[Section]) -> str:
    """Return one page that needs nothing else, with the charts as pictures in it."""
    body = ["<h1>Experiments</h1>", f"<p>{code(LEGEND)}</p>"]
    for part in found:
        body.append(f"<h2>{html.escape(part.title)}</h2>")
        body += [f"<p>{code(sentence)}</p>" for sentence in part.text]
        for table in part.tables:
            head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
            lines = "".join(
                f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n"
                for row in table.rows
            )
            body += [
                f"<h3>{html.escape(table.title)}</h3>",
                f'<div class="wide"><table>\n<tr>{head}</tr>\n{lines}</table></div>',
            ]
        body += [
            f"<figure><figcaption>{html.escape(chart.title)}</figcaption>"
            f'<img alt="{html.escape(chart.title)}" '
            f'src="data:image/{chart.kind};base64,{base64.b64encode(chart.file).decode()}"></figure>'
            for chart in part.charts
        ]
        if part.settings:
            body.append(
                "<details><summary>Command and settings of all runs</summary>"
                f"<pre>{html.escape(part.settings)}</pre></details>"
            )
    text = "\n".join(body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Experiments</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{text}\n</body>\n"
        "</html>\n"
    )


def code(text: str) -> str:
    """Return a sentence as HTML, with what is between backquotes as code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
