"""What report.py, report_answers.py, report_training.py and report_layers.py share: figures with their numbers, and how values are written.

    figure = line_figure("Rates", [("", drawing)], series, ticks, percent)
    Group("Video cut from a layer on", [figure], folded=True)

Named findings, (name, findings), are what all of the page is made from. Nothing here imports those files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from analysis.charts import Drawing, Series
from analysis.findings import Estimate, Findings

Named = tuple[str, Findings]


@dataclass
class Figure:
    """Charts under one title, each with its own caption, and their numbers as a table for those who cannot or do not want to read a chart."""

    title: str
    drawings: list[tuple[str, Drawing]]
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    key: list[tuple[str, str, str]] = field(default_factory=list)  # a legend of its own: (tone, label, kind)


@dataclass
class Group:
    """Figures under one heading; `folded` groups open on demand."""

    title: str
    figures: list[Figure]
    folded: bool = False


def line_figure(
    title: str, drawings: list[tuple[str, Drawing]], series: list[Series], ticks: list[tuple[float, str]], show, note: str = ""
) -> Figure:
    """A line chart with its numbers: a row per tick, a column per line (parts of one line share a column), n from the largest estimate."""
    header = list(dict.fromkeys(s.name for s in series))
    rows = []
    for x, label in ticks:
        cells = []
        for name in header:
            found = next((e for s in series if s.name == name for at, e in s.measured() if at == x), None)
            alone = next((s.apart for s in series if s.name == name), None) if x == ticks[-1][0] else None
            cells.append(show(found or alone))
        rows.append([label, *cells])
    counts = sorted({(e.n, e.clusters) for s in series for _, e in s.measured()})
    shown = "" if not counts else f"n = {counts[0][0]}" if len(counts) == 1 else f"n = {counts[0][0]} to {counts[-1][0]}"
    sources = f", {min(k for _, k in counts)} sources" if counts else ""
    return Figure(title, drawings, ["", *header], rows, " ".join(part for part in (f"{shown}{sources}." if shown else "", note) if part))


def rate_of(findings: Findings, condition: str, question: str, measure: str) -> Estimate | None:
    """One rate of what was answered, or None where it was not asked."""
    row = findings.following_rate(condition, question)
    return getattr(row, measure) if row else None


def plain(value: Any) -> str:
    """JSON values as people write them."""
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def capital(name: str) -> str:
    """The text with a capital at its beginning."""
    return name[:1].upper() + name[1:]
