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
from analysis.tables import effect, number, percent

COLUMNS = tuple(name for name in MEASURES if name != "factual")
EXPLAINED = (
    "± is the standard deviation over seeds. Differences are against the reference arm, clip by clip, all seeds pooled; their 95 % intervals "
    "cover other clips, not other seeds. Worst-of: the lowest of audio-following, see-accuracy and the two factual rates."
)


def ablation_tables(ablation: Ablation) -> list[Table]:
    """One table a set."""
    tables = []
    for one in ablation.sets:
        shown = [name for name in ("hear_conflicts", "see_conflicts", "factual", "shortcut", "abstains", "worst") if _measured(one, name)]
        table = Table(title=one.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, caption_justify="left", pad_edge=False)
        for heading in ("arm", "seeds", *(MEASURES[name].title for name in shown), f"worst-of against {one.reference}"):
            table.add_column(heading, justify="left" if heading == "arm" else "right")
        for row in _rows(one):
            cells = [value_and_spread(name, row.measures.get(name)) for name in shown]
            table.add_row(row.arm, str(len(row.seeds) or "–"), *cells, difference("worst", row.measures.get("worst")))
        table.caption = "\n".join([EXPLAINED, *one.left_out])
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


def difference(name: str, measure: Measure | None) -> str:
    """Against the reference: `+1.2 (−0.3 to +2.6)`."""
    if measure is None or measure.difference is None:
        return "–"
    return percent(measure.difference, signed=True) if MEASURES[name].rate else effect(measure.difference)


def write_text(path: str | os.PathLike, content: str) -> None:
    """Write atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(content, encoding="utf-8")
    unfinished.replace(path)


def _table(one: SetResult, show: Callable[[str, Measure | None], str]) -> tuple[list[str], list[list[str]]]:
    """A row an arm: every measure, differences of the main ones, minutes and parameters."""
    measured = [name for name in COLUMNS if _measured(one, name)]
    compared = [name for name in ("hear_conflicts", "worst") if name in measured]
    header = ["arm", "seeds", *(MEASURES[name].title for name in measured)]
    header += [f"{MEASURES[name].title} against {one.reference}" for name in compared] + ["minutes of training", "trained parameters"]
    rows = []
    for row in _rows(one):
        cells = [show(name, row.measures.get(name)) for name in measured]
        cells += [difference(name, row.measures.get(name)) for name in compared]
        minutes = f"{sum(row.minutes) / len(row.minutes):.1f}" if row.minutes else "–"
        parameters = "–" if row.parameters is None else f"{row.parameters:,}"
        rows.append([row.arm, ", ".join(map(str, row.seeds)) or "–", *cells, minutes, parameters])
    return header, rows


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
