"""Small charts as SVG: lines over layers, paired bars, stacks. Used by the page and for the README's picture.

Drawn by hand rather than by plotly because the page must follow the reader's light or dark scheme, print, and stay small: plotly's script alone is
5 MB, its colours cannot follow the scheme, and a static plotly picture needs a browser. Colours are the tones of templates/chart.css; shapes
carry a class `t-<tone>` only. Every number is in a <title> (the page's script shows it at once) and in the summary that screen readers get.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape

from analysis.findings import Estimate
from analysis.tables import number, percent


@dataclass
class Series:
    """One line: `points` are (x, estimate), `apart` an estimate that stands alone at the last tick, `dashed`: before, `band`: draw intervals."""

    name: str
    tone: str
    points: list[tuple[float, Estimate]]
    dashed: bool = False
    band: bool = True
    apart: Estimate | None = None

    def measured(self) -> list[tuple[float, Estimate]]:
        """The points of the line that have a value."""
        return [(x, e) for x, e in self.points if e.value is not None]


class Drawing(NamedTuple):
    """Shapes in a box of `width` × `height` px, with the summary that is read aloud."""

    body: Markup
    width: float
    height: float
    summary: str

    def svg(self, attributes: Markup | str = "") -> Markup:
        """A whole <svg> that scales with its container."""
        box = f"0 0 {self.width:g} {self.height:g}"
        return Markup('<svg class="chart" viewBox="{}" role="img" aria-label="{}" {}>{}</svg>').format(box, self.summary, attributes, self.body)


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> Markup:
    """A line of text; `kind` is a class of chart.css."""
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(x, y, kind, anchor, content)


def joined(parts: Sequence[Markup]) -> Markup:
    """Shapes one after another."""
    return Markup("").join(parts)


def tick_steps(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them, 0 among them where the range holds it."""
    if high <= low:
        high = low + 1
    raw = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = magnitude * next(m for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw - 1e-12)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(first, last + 1)]


def span(series: Sequence[Series]) -> list[float]:
    """Ticks that hold all points and intervals of these lines, and 0: pass it to the charts that should share an axis."""
    values = [v for s in series for _, e in s.measured() for v in (e.value, e.low if s.band else None, e.high if s.band else None) if v is not None]
    return tick_steps(min([0.0, *values]), max([0.0, *values]))


RATES = [0.0, 0.25, 0.5, 0.75, 1.0]


def lines(
    series: Sequence[Series],
    ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[float],
    title: str,
    x_title: str,
    as_percent: bool = True,
    grey_band: Sequence[tuple[float, float, float]] = (),
    width: float = 330,
    height: float = 190,
) -> Drawing:
    """Lines over layers (or checkpoints). `grey_band`: (x, low, high) of the controls. `ticks`: x positions and their labels, thinned to fit."""
    left, right, top, bottom = 40.0, 10.0, 10.0, 34.0
    xs = [x for x, _ in ticks]
    x_low, x_high = min(xs, default=0.0), max(xs, default=1.0)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return left + 8 + (width - left - right - 16) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def py(y: float) -> float:
        return height - bottom - (height - top - bottom) * (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)

    show = percent if as_percent else number
    radius = 2.6 if len(ticks) <= 20 else 1.7
    parts = []
    for y in y_ticks:
        kind = "axis" if abs(y) < 1e-12 else "grid"
        parts.append(Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(kind, left, width - right, py(y), py(y)))
        parts.append(text(left - 6, py(y) + 3.5, f"{100 * y:.0f} %" if as_percent else f"{y:g}".replace("-", "−"), "tick", "end"))
    stride = max(1, math.ceil(len(ticks) * max((len(label) for _, label in ticks[:-1]), default=1) * 8 / (width - left - right)))
    ends_at = px(x_high) - 3.3 * len(ticks[-1][1]) - 6 if ticks else 0.0  # the last label is always there; others keep clear of it
    for k, (x, label) in enumerate(ticks):
        half = 3.3 * len(label)
        if k == len(ticks) - 1 or (k % stride == 0 and px(x) + half < ends_at):
            parts.append(text(min(px(x), width - half - 2), height - bottom + 15, label, "tick", "middle"))
    parts.append(text((left + width - right) / 2, height - 4, x_title, "tick", "middle"))
    if grey_band:
        outline = [(px(x), py(high)) for x, _, high in grey_band] + [(px(x), py(low)) for x, low, _ in reversed(grey_band)]
        parts.append(Markup('<polygon class="control" points="{}"/>').format(_path(outline)))
    found: dict[float, list[str]] = {}
    for s in series:  # bands lie under all lines
        bounded = [(x, e.low, e.high) for x, e in s.measured() if e.low is not None and e.high is not None]
        if s.band and len(bounded) > 1:
            outline = [(px(x), py(high)) for x, _, high in bounded] + [(px(x), py(low)) for x, low, _ in reversed(bounded)]
            parts.append(Markup('<polygon class="band t-{}" points="{}"/>').format(s.tone, _path(outline)))
    for s in series:
        style = f"t-{s.tone}" + (" before" if s.dashed else "")
        known = s.measured()
        if len(known) > 1:
            parts.append(Markup('<polyline class="line {}" points="{}"/>').format(style, _path([(px(x), py(e.value or 0.0)) for x, e in known])))
        alone = [(x_high, s.apart)] if s.apart and s.apart.value is not None else []
        for x, e in [*known, *alone]:
            if s.band and e.low is not None and e.high is not None and (len(known) == 1 or (x, e) in alone):
                template = Markup('<line class="bound {}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
                parts.append(template.format(style, px(x), px(x), py(e.low), py(e.high)))
            parts.append(Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(style, px(x), py(e.value or 0.0), radius))
            found.setdefault(x, []).append(f"{s.name}: {show(e)}, n = {e.n}")
    reach = (width - left - right) / max(len(ticks), 1)
    for x, label in ticks:
        if x in found:
            box = (px(x) - reach / 2, top, reach, height - top - bottom)
            parts.append(_hit(*box, "\n".join([f"{x_title}: {label}", *found[x]])))
    return Drawing(joined(parts), width, height, f"{title}. " + " ".join(_spoken(s, ticks, show) for s in series))


class Bar(NamedTuple):
    """One measure with its bars from top to bottom: (name, estimate); the last is drawn solid, earlier ones light."""

    label: str
    tone: str
    values: list[tuple[str, Estimate]]


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], title: str, width: float = 720, label_width: float = 185) -> Drawing:
    """Horizontal bars of rates 0–100 % with their intervals, in groups with a heading."""
    parts, summary, y = [], [title + "."], 4.0
    scale = width - label_width - 70
    thick = 13.0
    for heading, rows in groups:
        y += 16
        parts.append(text(0, y, heading, "heading"))
        y += 9
        for bar in rows:
            height = thick * len(bar.values)
            parts.append(text(label_width - 10, y + height / 2 + 4, bar.label, "label", "end"))
            for k, (name, e) in enumerate(bar.values):
                solid = k == len(bar.values) - 1
                top = y + k * thick
                parts.append(
                    Markup('<rect class="track" x="{}" y="{:.1f}" width="{:.1f}" height="{}"/>').format(label_width, top + 1, scale, thick - 2)
                )
                if e.value is None:
                    parts.append(text(label_width + 6, top + thick - 3, f"{name}: not measured", "tick"))
                    continue
                kind = f"bar t-{bar.tone}" + ("" if solid else " before")
                size = max(1.0, scale * e.value)
                parts.append(
                    Markup('<rect class="{}" x="{}" y="{:.1f}" width="{:.1f}" height="{}" rx="1.5"/>').format(
                        kind, label_width, top + 1, size, thick - 2
                    )
                )
                end = label_width + scale * e.value
                if e.low is not None and e.high is not None:
                    a, b = label_width + scale * e.low, label_width + scale * e.high
                    parts.append(
                        Markup('<line class="whisker" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
                            a, b, top + thick / 2, top + thick / 2
                        )
                    )
                    end = max(end, b)
                shown = f"{100 * e.value:.1f} %"
                parts.append(text(end + 6, top + thick - 3, shown, "value" if solid else "value faint"))
                parts.append(_hit(0, top, width, thick, f"{heading}: {bar.label}\n{name}: {percent(e)}\nn = {e.n} from {e.clusters} sources"))
                summary.append(f"{heading}, {bar.label}, {name}: {percent(e)}.")
            y += height + 7
        y += 5
    return Drawing(joined(parts), width, y, " ".join(summary))


def columns(
    layers: Sequence[tuple[str, Sequence[tuple[str, str, Estimate]]]], title: str, x_title: str, width: float = 330, height: float = 190
) -> Drawing:
    """One stacked column per layer: (label, [(name, tone, share)]), shares that sum to 1."""
    left, right, top, bottom = 40.0, 4.0, 10.0, 34.0
    scale, step = height - top - bottom, (width - left - right) / max(len(layers), 1)
    parts = []
    for y in RATES:
        parts.append(text(left - 6, height - bottom - scale * y + 3.5, f"{100 * y:.0f} %", "tick", "end"))
    stride = max(1, math.ceil(18 / step))
    for k, (label, shares) in enumerate(layers):
        x, y = left + k * step, height - bottom
        for _, tone, e in shares:
            size = scale * max(e.value or 0.0, 0.0)
            y -= size
            parts.append(
                Markup('<rect class="bar t-{}" x="{:.1f}" y="{:.2f}" width="{:.1f}" height="{:.2f}"/>').format(tone, x + 0.7, y, step - 1.4, size)
            )
        if k % stride == 0:
            parts.append(text(x + step / 2, height - bottom + 15, label, "tick", "middle"))
        parts.append(_hit(x, top, step, scale, "\n".join([f"{x_title} {label}", *(f"{name}: {percent(e)}" for name, _, e in reversed(shares))])))
    parts.append(text((left + width - right) / 2, height - 4, x_title, "tick", "middle"))
    first, last = (layers[0][1], layers[-1][1]) if layers else ((), ())
    spoken = [f"{name} {percent(a)} in the first layer, {percent(b)} in the last." for (name, _, a), (_, _, b) in zip(first, last, strict=True)]
    return Drawing(joined(parts), width, height, f"{title}. " + " ".join(spoken))


def stacked_rows(
    rows: Sequence[tuple[str, str, Sequence[tuple[str, str, Estimate]], str]], title: str, width: float = 720, label_width: float = 190
) -> Drawing:
    """One stacked horizontal bar per row: (label, note under it, [(name, tone, share)], text at the end). A row without label
    continues the one above."""
    parts, summary, y = [], [title + "."], 2.0
    scale = width - label_width - 90
    for label, note, shares, end in rows:
        y += 9 if label else 0
        parts.append(text(label_width - 62, y + 13, label, "label", "end"))
        parts.append(text(label_width - 10, y + 13, note, "tick", "end"))
        x = float(label_width)
        for _, tone, e in shares:
            size = scale * max(e.value or 0.0, 0.0)
            parts.append(Markup('<rect class="bar t-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="15"/>').format(tone, x, y + 1, max(size - 1, 0)))
            if size > 40:
                parts.append(text(x + 5, y + 12.5, f"{100 * (e.value or 0):.0f} %", f"inside on-{tone}"))
            x += size
        parts.append(text(label_width + scale + 8, y + 13, end, "tick"))
        detail = [f"{name}: {percent(e)}, n = {e.n}" for name, _, e in shares]
        parts.append(_hit(0, y, width, 17, "\n".join([f"{label} {note}".strip(), *detail, end])))
        summary.append(f"{label} {note}: " + ", ".join(detail) + ".")
        y += 18
    return Drawing(joined(parts), width, y + 4, " ".join(summary))


class Point(NamedTuple):
    """One labelled point of a scatter: its estimates, and the same for single seeds, `seeds` as (x, y)."""

    name: str
    tone: str
    x: Estimate
    y: Estimate
    seeds: Sequence[tuple[float, float]] = ()


def scatter(points: Sequence[Point], x_title: str, y_title: str, title: str, width: float = 760, height: float = 380) -> Drawing:
    """Points with error bars both ways, seeds as small dots, names in a column at the right with a thin line to each. Both axes are in points of a
    hundred (estimates are shares). Points without a value are left out.
    """
    left, right, top, bottom = 52.0, 200.0, 12.0, 42.0
    known = [p for p in points if p.x.value is not None and p.y.value is not None]

    def ends(of: Sequence[tuple[Estimate, Sequence[float]]]) -> list[float]:
        values = [v for e, seeds in of for v in (e.value, e.low, e.high, *seeds) if v is not None]
        return tick_steps(min(values, default=0.0), max(values, default=1.0), 6)

    x_ticks, y_ticks = ends([(p.x, [x for x, _ in p.seeds]) for p in known]), ends([(p.y, [y for _, y in p.seeds]) for p in known])

    def px(x: float) -> float:
        return left + (width - left - right) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def py(y: float) -> float:
        return height - bottom - (height - top - bottom) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    def rule(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
        return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x1, y1, x2, y2)

    parts = []
    for x in x_ticks:
        parts += [rule("axis" if abs(x) < 1e-12 else "grid", px(x), top, px(x), height - bottom)]
        parts += [text(px(x), height - bottom + 15, f"{100 * x:.4g}".replace("-", "−"), "tick", "middle")]
    for y in y_ticks:
        parts += [rule("axis" if abs(y) < 1e-12 else "grid", left, py(y), width - right, py(y))]
        parts += [text(left - 6, py(y) + 3.5, f"{100 * y:.4g}".replace("-", "−"), "tick", "end")]
    parts.append(text((left + width - right) / 2, height - 6, x_title, "tick", "middle"))
    turned = Markup('<text class="tick" text-anchor="middle" transform="translate(13 {:.1f}) rotate(-90)">{}</text>')
    parts.append(turned.format((top + height - bottom) / 2, y_title))
    for p in known:
        for bounds, at in (((p.x.low, p.x.high), "x"), ((p.y.low, p.y.high), "y")):
            low, high = bounds
            if low is not None and high is not None:
                x, y = px(p.x.value or 0.0), py(p.y.value or 0.0)
                parts.append(rule(f"bound t-{p.tone}", *((px(low), y, px(high), y) if at == "x" else (x, py(low), x, py(high)))))
        for x, y in p.seeds if len(p.seeds) > 1 else ():
            parts.append(Markup('<circle class="dot seed t-{}" cx="{:.1f}" cy="{:.1f}" r="2"/>').format(p.tone, px(x), py(y)))
    # Names keep their points' order from top to bottom, so that the lines to them do not cross much.
    apart = min(17.0, (height - top - bottom) / max(len(known), 1))
    order, above = sorted(known, key=lambda p: (py(p.y.value or 0.0), -px(p.x.value or 0.0))), top - apart + 8
    places = []
    for p in order:
        above = max(above + apart, py(p.y.value or 0.0))
        places.append(above)
    for k in range(len(places) - 1, -1, -1):  # those pushed below the chart move up again
        places[k] = min(places[k], height - bottom - apart * (len(places) - 1 - k))
    for p, place in zip(order, places, strict=True):
        x, y = px(p.x.value or 0.0), py(p.y.value or 0.0)
        parts.append(rule("grid", x, y, width - right + 8, place))
    for p, place in zip(order, places, strict=True):
        x, y = px(p.x.value or 0.0), py(p.y.value or 0.0)
        parts.append(Markup('<circle class="dot t-{}" cx="{:.1f}" cy="{:.1f}" r="4.5"/>').format(p.tone, x, y))
        parts.append(text(width - right + 12, place + 4, p.name, f"label t-{p.tone}"))
        seeds = "".join(f"\n{percent(Estimate(a, None, None, 1, 1), True)}, {percent(Estimate(b, None, None, 1, 1))}" for a, b in p.seeds)
        tip = f"{p.name}\n{x_title}: {percent(p.x, True)}\n{y_title}: {percent(p.y)}" + (f"\nSeeds:{seeds}" if len(p.seeds) > 1 else "")
        parts += [_hit(x - 8, y - 8, 16, 16, tip), _hit(width - right + 8, place - 8, right - 8, 16, tip)]
    spoken = " ".join(f"{p.name}: {x_title} {percent(p.x, True)}, {y_title} {percent(p.y)}." for p in order)
    return Drawing(joined(parts), width, height, f"{title}. {spoken}")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _hit(x: float, y: float, width: float, height: float, tip: str) -> Markup:
    """An invisible area that shows its text when pointed at."""
    template = Markup('<rect class="hit" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')
    return template.format(x, y, width, height, escape(tip))


def _spoken(series: Series, ticks: Sequence[tuple[float, str]], show) -> str:
    names = dict(ticks)
    points = series.measured()
    if not points:
        return f"{series.name}: not measured."
    top = max(points, key=lambda p: p[1].value or 0.0)
    parts = [f"{show(points[0][1])} at {names.get(points[0][0], points[0][0])}", f"highest {show(top[1])} at {names.get(top[0], top[0])}"]
    return f"{series.name}: {', '.join(parts)}."
