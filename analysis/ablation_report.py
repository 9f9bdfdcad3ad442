"""An ablation for people: tables for the terminal, Markdown, and one static page with a chart.

console.print(*ablation_tables(ablation))
write_text(out / "ablation.md", markdown(ablation))
write_page(out / "ablation.html", ablation)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table

from analysis.ablation import MEASURES, Ablation, Measure, Row, SetResult
from analysis.charts import Drawing, Point, scatter
from analysis.findings import Estimate
from analysis.tables import UNREAD, effect, number, percent, relative
from data.files import write_text

COLUMNS = tuple(name for name in MEASURES if name != "factual")
EXPLAINED = (
    "± is the standard deviation over seeds. Differences are against the reference arm, clip by clip, all seeds pooled; their 95 % intervals "
    "cover other clips, not other seeds. Worst-of: the lowest of audio-following, see-accuracy and the two factual rates."
)


def ablation_tables(ablation: Ablation) -> list[Table]:
    """One table a set, of means over seeds, so that it fits 80 columns; rates are percent. Spreads are in the Markdown and on the page."""
    headings = {"hear_conflicts": "hear", "see_conflicts": "see", "factual": "factual", "shortcut": "index", "abstains": "abstains", "worst": "worst"}
    tables = []
    for one in ablation.sets:
        shown = [name for name in headings if _measured(one, name)]
        table = Table(title=one.title, title_justify="left", title_style="bold", caption_justify="left", box=SIMPLE_HEAD)
        table.pad_edge, table.collapse_padding = False, True
        table.add_column("arm", no_wrap=True)
        spoken = ["perplexity"] if _measured(one, "perplexity") else []
        for heading in (*(headings[name] for name in shown), *spoken, f"worst, against {one.reference}"):
            table.add_column(heading, justify="right", no_wrap=heading in headings.values())
        for row in _rows(one):
            cells = [value_and_spread(name, row.measures.get(name)).partition(" ")[0] for name in shown]
            cells += [_perplexity(row.measures.get(name)) for name in spoken]
            table.add_row(row.arm, *cells, difference("worst", row.measures.get("worst")))
        unread = {what: [m.estimate.value or 0.0 for row in _rows(one) for n, m in row.measures.items() if n.startswith(what)] for what in UNREAD}
        counts = ", ".join(f"{row.arm} {len(row.seeds)}" for row in one.arms)
        meant = (
            "hear, see: right on conflicts, in %; factual: the lower of both on factual clips; index: Shortcut Index of hear-questions, 0 is ideal."
        )
        meant += " perplexity: of plain text, its change by training." if spoken else ""
        most = ", ".join(f"{what.replace('_', ' ')} {100 * max(shares):.1f} %" for what, shares in unread.items() if shares)
        beside = [f"Of the answers on conflicts, at most in any row: {most}."] if most else []
        table.caption = "\n".join([f"{meant} {EXPLAINED.partition('. ')[2]}", *beside, f"Seeds: {counts}.", *one.left_out])
        tables.append(table)
    return tables


def markdown(ablation: Ablation) -> str:
    """All sets with every measure, to be put into a document."""
    parts = []
    for one in ablation.sets:
        header, rows = _table(one, lambda name, m: value_and_spread(name, m))
        parts += [f"## {one.title}", ""] + ([one.notes.strip(), ""] if one.notes else [])
        parts += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        parts += ["| " + " | ".join(row) + " |" for row in rows]
        described = [f"- **{row.arm}**: {row.description}" for row in one.arms if row.description]
        parts += ["", EXPLAINED, ""] + ([*described, ""] if described else [])
        parts += [*(f"- {sentence}" for sentence in one.left_out), ""] if one.left_out else []
    return "\n".join(parts).rstrip() + "\n"


def write_page(path: str | os.PathLike, ablation: Ablation) -> None:
    """Write the page atomically. It loads nothing."""
    sets = []
    for one in ablation.sets:
        header, rows = _table(one, lambda name, m: value_with_interval(name, m))
        sets.append({"result": one, "charts": charts(one), "header": header, "rows": rows, "arms": [_arm(row) for row in one.arms]})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    write_text(path, environment.get_template("ablation.html").render(sets=sets, explained=EXPLAINED, measures=MEASURES))


def charts(one: SetResult) -> list[tuple[str, Drawing]]:
    """What an arm gains in audio-following against its worst-of, and against what factual clips lose."""
    drawn = []
    for caption, y_name, y_title, y_of in (
        ("Gain against the worst rate", "worst", "worst-of, %", lambda m: m.estimate),
        ("Gain against retention", "factual", "change on factual clips, points", lambda m: m.gain),
    ):
        points = []
        for row in one.arms:
            x, y = row.measures.get("hear_conflicts"), row.measures.get(y_name)
            if x and y and x.gain and (shown := y_of(y)):
                was_x, was_y = _was(x), _was(y) if y_of(y) is y.gain else 0.0
                seeds = [(a - was_x, b - was_y) for a, b in zip(x.seeds, y.seeds, strict=True)]
                points.append(Point(row.arm, "audio" if row.arm == one.reference else "vision", x.gain, shown, seeds))
        if points:
            drawn.append((caption, scatter(points, "gain in audio-following, points", y_title, f"{one.title}: {caption.lower()}")))
    return drawn


def _was(measure: Measure) -> float:
    """The number before training, from the number and the gain."""
    assert measure.gain is not None and measure.gain.value is not None and measure.estimate.value is not None
    return measure.estimate.value - measure.gain.value


def value_and_spread(name: str, measure: Measure | None) -> str:
    """`97.3 % ± 0.4`, or `0.05 ± 0.01`."""
    if measure is None:
        return "–"
    rate = MEASURES[name].rate
    shown = (percent if rate else number)(_bare(measure.estimate))
    return shown if measure.spread is None else f"{shown} ± {100 * measure.spread:.1f}" if rate else f"{shown} ± {measure.spread:.2f}"


def value_with_interval(name: str, measure: Measure | None) -> str:
    """`97.3 % ± 0.4 (95.0–98.6)`."""
    if measure is None:
        return "–"
    _, _, interval = (percent if MEASURES[name].rate else number)(measure.estimate).partition(" (")
    return value_and_spread(name, measure) + (f" ({interval}" if interval else "")


def _perplexity(measure: Measure | None) -> str:
    """What training changed, as a share: `+1.2 % (+0.3 to +2.1)`; before training the number itself."""
    return relative(measure.gain) if measure and measure.gain else value_and_spread("perplexity", measure)


def difference(name: str, measure: Measure | None) -> str:
    """Against the reference: `+1.2 (−0.3 to +2.6)`."""
    if measure is None or measure.difference is None:
        return "–"
    return percent(measure.difference, signed=True) if MEASURES[name].rate else effect(measure.difference)


def _table(one: SetResult, show: Callable[[str, Measure | None], str]) -> tuple[list[str], list[list[str]]]:
    """A row an arm: the worst-of and audio-following with their differences, every other measure, minutes and parameters."""
    columns: list[tuple[str, Callable[[Row], str]]] = []
    for name in ("worst", *(name for name in COLUMNS if name != "worst")):
        if _measured(one, name):
            columns.append((MEASURES[name].title, lambda row, name=name: show(name, row.measures.get(name))))  # type: ignore[misc]
            if name in ("worst", "hear_conflicts"):
                columns.append((f"against {one.reference}", lambda row, name=name: difference(name, row.measures.get(name))))  # type: ignore[misc]
            if name == "perplexity":
                columns.append(("against before", lambda row: relative(m.gain) if (m := row.measures.get("perplexity")) and m.gain else "–"))
    columns.append(("seeds", lambda row: ", ".join(map(str, row.seeds)) or "–"))
    columns.append(("minutes of training", lambda row: f"{sum(row.minutes) / len(row.minutes):.1f}" if row.minutes else "–"))
    columns.append(("trained parameters", lambda row: "–" if row.parameters is None else f"{row.parameters:,}"))
    return ["arm", *(heading for heading, _ in columns)], [[row.arm, *(cell(row) for _, cell in columns)] for row in _rows(one)]


def _arm(row: Row) -> dict[str, Any]:
    settings = ", ".join(f"{key} {value}" for key, value in row.settings.items()) or "nothing beside what all arms have"
    chosen = ", ".join(f"seed {seed}: {name.replace('_', ' ')}" for seed, name in zip(row.seeds, row.checkpoints, strict=True) if name)
    return {"name": row.arm, "description": row.description, "settings": settings, "chosen": chosen, "folders": ", ".join(row.folders)}


def _rows(one: SetResult) -> list[Row]:
    return [*([one.before] if one.before else []), *one.arms]


def _measured(one: SetResult, name: str) -> bool:
    return any(name in row.measures for row in _rows(one))


def _bare(estimate: Estimate) -> Estimate:
    return Estimate(estimate.value, None, None, estimate.n, estimate.clusters)
