"""One static page that shows findings: what the model does, where it happens, what training changed, and clips to play.

    from analysis.report import write_report, headline_figure
    write_report("runs/demo/report.html", [("before", before), ("step 50", middle), ("after", after)], clips_root="runs/clips",
                 plan=json.loads(…), comparison=compare(before, after))
    headline_figure("docs/result.svg", [("before", before), ("after", after)])

The first findings are drawn light and dashed, the last solid; those between appear in the trajectory. The page needs no network and no other file:
charts are SVG, clips are embedded, and its content security policy forbids loading anything. A diagnostic that was not run leaves its section out.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis.charts import RATES, Bar, Drawing, Series, bars, columns, joined, lines, span, stacked_rows, text
from analysis.compare import Comparison
from analysis.fidelity import agreement, caption_key
from analysis.findings import MISSING, CaptionFidelity, Estimate, Findings, Sample
from analysis.tables import (
    ABSTENTION,
    CONDITIONS,
    POSITIONS,
    QUESTIONS,
    STREAMS,
    TOKENS,
    best_cuts,
    counted,
    cut_name,
    cut_words,
    effect,
    language_numbers,
    layers,
    number,
    percent,
    relative,
    share,
    words,
)
from analysis.trajectory import headline as scalars
from analysis.trajectory import panel as panel_of
from data.files import write_text

Named = tuple[str, Findings]
LARGEST_CLIP = 4_000_000  # bytes; a larger mp4 is named instead of embedded
STREAM_TONES = {"audio": "audio", "visual": "vision"}
VERDICTS = {
    "audio": "names the sound",
    "vision": "names the picture",
    "both": "names both",
    "neither": "names something else",
    "nothing": "says there is nothing",
    "unparsed": "names no known event",
}
VARIANTS = {"plain": "all mass", "no_sink": "without the first token", "value_norm": "weighted by value norm"}


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


def write_report(
    path: str | os.PathLike,
    findings: list[Named],
    clips_root: str | os.PathLike,
    plan: dict[str, Any] | None = None,
    comparison: Comparison | None = None,
    max_clips: int = 12,
) -> None:
    """Write the page atomically. `findings`: (name, findings) in order of time, at least one. Raises ValueError when there are none.

    A clip whose file is missing, outside `clips_root` or larger than 4 MB is named with the reason instead of being embedded.
    """
    if not findings:
        raise ValueError("a report needs at least one findings file: run `python -m analysis diagnose` first.")
    ends = _ends(findings)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        sentences=_headline(findings),
        tiles=_tiles(ends),
        names=[name for name, _ in ends],
        warnings=_warnings(ends),
        answers=_answers(ends),
        following=_following_table(ends, comparison),
        abstention=_abstention_table(ends, comparison),
        reliance=_reliance_table(ends, comparison),
        captions=_captions(ends),
        fidelity=_fidelity_table(ends, comparison),
        agreement=_agreement(ends),
        trajectory=_trajectory(findings),
        multiples=_multiples(findings),
        apart=_apart(findings),
        knockout=_knockout(ends),
        probes=_probes(ends),
        lens=_lens(ends),
        tuned=_tuned(ends),
        latent=_latent(ends),
        flow=_flow(ends),
        shift=_shift(ends),
        language=_language(ends, comparison),
        plain_answers=_plain_answers(ends),
        plan=_plan_rows(plan or {}),
        clips=_clips(ends, Path(clips_root), max_clips),
        settings=_settings(ends),
        left_out=_left_out(findings, comparison),
        last=ends[-1][1],
    )
    write_text(path, page)


def headline(findings: list[Named]) -> list[str]:
    """The sentences at the top of the page, computed from the first and the last findings."""
    return ["".join(part for part, _ in sentence) for sentence in _headline(findings)]


def _headline(findings: list[Named]) -> list[list[tuple[str, str]]]:
    """The same as parts: (text, tone), so that the page can colour the numbers."""
    ends = _ends(findings)
    rows = [(name, f.following_rate("counterfactual", "hear")) for name, f in ends]
    known = [(name, row.vision.value, row.audio.value) for name, row in rows if row and row.vision.value is not None and row.audio.value is not None]
    if not known or rows[0][0] != known[0][0]:
        return [[("No conflicts were diagnosed, so this page cannot say whether the model listens.", "")]]
    sentences = []
    for k, (name, seen, heard) in enumerate(known):
        lead = f"{_capital(name)}: " if k else "Asked what it hears when sound and picture disagree, this model "
        parts = [(lead, ""), ("what it sees in " if k else "names what it sees in ", ""), (f"{100 * seen:.1f} %", "vision")]
        sentences.append(
            [*parts, (", what it hears in " if k else " of its answers and what it hears in ", ""), (f"{100 * heard:.1f} %", "audio"), (".", "")]
        )
    return sentences


def headline_figure(path: str | os.PathLike, findings: list[Named]) -> None:
    """The README's picture as one SVG: what answers name before and after, and the cut of video that frees the sound in the first findings.

    Follows the reader's light or dark scheme. Raises ValueError for another file type or without following rates.
    """
    if Path(path).suffix != ".svg":
        raise ValueError(f"{path}: the headline figure is an SVG; name a file that ends in .svg.")
    ends = _ends(findings) if findings else []
    groups = _answer_groups(ends) if ends else []
    if not groups:
        raise ValueError("the headline figure needs following rates: run `python -m analysis diagnose` first.")
    left = bars(groups, "What the answers name", width=560, label_width=150)
    parts = [text(0, 16, "What the answers name, " + " (light) and ".join(n for n, _ in ends) + (" (solid)" if len(ends) > 1 else ""), "title")]
    parts.append(Markup('<g transform="translate(0 26)">{}</g>').format(left.body))
    width, height, right = 560.0, left.height + 26, ""
    name, first = ends[0]
    from_k = [c for c in first.knockout if c.family == "from" and c.site.startswith("video->") and c.audio and c.audio.value is not None]
    if best := best_cuts(from_k):
        site = max(best, key=lambda c: (c.audio.value or 0.0) if c.audio else 0.0).site
        panel = _cut_panel([(name, first)], site, "from", "counterfactual", "hear", [0.0, 1.0], size=(380, max(230.0, left.height - 40)))
        if panel:
            parts.append(text(600, 16, f"With {cut_name(site)} cut" + (f", {name}" if len(ends) > 1 else ""), "title"))
            parts.append(Markup('<g transform="translate(600 42)">{}</g>').format(panel.drawings[0][1].body))
            parts.append(_key(646, 34, [("audio", "names the sound"), ("vision", "names the picture")]))
            right = f" (right: {panel.note.partition(',')[0]})"
            width, height = 990.0, max(height, 42 + panel.drawings[0][1].height)
    row = ends[-1][1].following_rate("counterfactual", "hear")
    if row:
        counts = f"n = {row.audio.n} conflicts from {row.audio.clusters} sources{right}"
        parts.append(text(0, height + 14, f"{counts}; whiskers and bands: 95 % intervals", "tick"))
        height += 18
    summary = " ".join(headline(findings))
    css = Markup((Path(__file__).parent / "templates" / "chart.css").read_text(encoding="utf-8"))
    svg = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {w:g} {h:g}" width="{w:g}" height="{h:g}" '
        'role="img" aria-label="{label}">'
        '<style>{css}</style><rect width="100%" height="100%" rx="8" style="fill: var(--ground)"/><g transform="translate(20 16)">{body}</g></svg>\n'
    ).format(w=width + 40, h=height + 32, label=summary, css=css, body=joined(parts))
    write_text(path, svg)


# ---- the parts of the page, top to bottom


def _tiles(ends: list[Named]) -> list[dict[str, str]]:
    """The numbers to look at first, each with before, after, interval and n."""
    wanted = [
        ("Names the sound", "on conflicts, asked what it hears", "audio", lambda f: _rate(f, "counterfactual", "hear", "audio"), percent),
        ("Names the picture", "on conflicts, asked what it hears", "vision", lambda f: _rate(f, "counterfactual", "hear", "vision"), percent),
        (
            "Shortcut Index",
            "on hear-questions; 0 is ideal",
            "",
            lambda f: next((r.shortcut for r in f.reliance if r.question == "hear"), None),
            number,
        ),
        ("Right on factual clips", "asked what it hears", "", lambda f: _rate(f, "factual", "hear", "correct"), percent),
        ("Says it hears nothing", "of silent clips, asked what it hears", "", lambda f: _rate(f, "muted", "hear", "nothing"), percent),
    ]
    tiles = []
    for title, note, tone, get, show in wanted:
        values = [(name, get(f)) for name, f in ends]
        last = values[-1][1]
        if last is None or last.value is None:
            continue
        before = values[0][1]
        big, _, interval = show(last).partition(" (")
        was = f"{values[0][0]}: {show(before)}" if len(values) > 1 and before is not None else ""
        tiles.append({"title": title, "note": note, "tone": tone, "big": big, "interval": interval.rstrip(")"), "before": was, "n": counted(last)})
    return tiles


def _warnings(ends: list[Named]) -> list[str]:
    (a, first), (b, last) = ends[0], ends[-1]
    if (first.split, first.data_hash) != (last.split, last.data_hash):
        return [f"“{a}” was measured on the {first.split} split and “{b}” on the {last.split} split of other clips: the difference mixes both."]
    return []


def _answer_groups(ends: list[Named]) -> list[tuple[str, list[Bar]]]:
    layout = [
        (
            "Conflicts, asked what it hears",
            "counterfactual",
            [("names the sound", "audio", "hear", "audio"), ("names the picture", "vision", "hear", "vision")],
        ),
        (
            "Conflicts, asked what it sees",
            "counterfactual",
            [("names the sound", "audio", "see", "audio"), ("names the picture", "vision", "see", "vision")],
        ),
        (
            "Factual clips (sound and picture agree)",
            "factual",
            [("right about the sound", "audio", "hear", "correct"), ("right about the picture", "vision", "see", "correct")],
        ),
    ]
    groups = []
    for heading, condition, rows in layout:
        shown = []
        for label, tone, question, measure in rows:
            values = [(name, e) for name, f in ends if (e := _rate(f, condition, question, measure))]
            if values:
                shown.append(Bar(label, tone, values))
        if shown:
            groups.append((heading, shown))
    return groups


def _answers(ends: list[Named]) -> Drawing | None:
    groups = _answer_groups(ends)
    return bars(groups, "What the answers name", width=880) if groups else None


def _following_table(ends: list[Named], comparison: Comparison | None) -> dict[str, Any] | None:
    """Every condition and question: names the sound / picture before and after, with the paired differences."""
    keys = list(dict.fromkeys((f.condition, f.question) for _, findings in ends for f in findings.following))
    header, rows = ["clips", "asked what it"], []
    for what in ("names the sound", "names the picture"):
        header += [f"{what}, {name}" if len(ends) > 1 else what for name, _ in ends] + (["difference, points"] if comparison else [])
    for condition, question in keys:
        row = [words(condition, CONDITIONS), f"{question}s"]
        for measure in ("audio", "vision"):
            row += [percent(_rate(f, condition, question, measure)) for _, f in ends]
            if comparison:
                change = comparison.find("following", measure, condition, question)
                row.append(percent(change.difference, signed=True) if change else "–")
        found = next((r for _, f in reversed(ends) if (r := f.following_rate(condition, question))), None)
        rows.append([*row, counted(found.audio) if found else "–"])
    return {"header": [*header, "n (sources)"], "rows": rows} if rows else None


def _abstention_table(ends: list[Named], comparison: Comparison | None) -> dict[str, Any] | None:
    """Where nothing is there to hear (see), how often the answer says so and how often it names an event; and how often it says so where there is."""
    if not any((f.condition, f.question) in MISSING for _, findings in ends for f in findings.following):
        return None
    header, rows = ["clips", "asked what it", "right if it"], []
    for what in ("says nothing", "names an event"):
        header += [f"{what}, {name}" if len(ends) > 1 else what for name, _ in ends]
        header += ["difference, points"] if comparison and what == "says nothing" else []
    for condition, question in ABSTENTION:
        found = [f.following_rate(condition, question) for _, f in ends]
        last = next((f for f in reversed(found) if f), None)
        if last is None:
            continue
        row = [words(condition, CONDITIONS), f"{question}s", "abstains" if (condition, question) in MISSING else "does not"]
        row += [percent(f.nothing) if f else "–" for f in found]
        if comparison:
            change = comparison.find("following", "nothing", condition, question)
            row.append(percent(change.difference, signed=True) if change else "–")
        rows.append([*row, *(share(f.invented) if f else "–" for f in found), counted(last.nothing)])
    return {"header": [*header, "n (sources)"], "rows": rows} if rows else None


def _captions(ends: list[Named]) -> Drawing | None:
    """Scores of captions given without a cut: both sides of the answer to the both-question, one side of the others; by the first judge."""
    groups = []
    there = dict.fromkeys(f.condition for _, findings in ends for f in findings.fidelity)
    for condition in [name for name in there if name.endswith("factual")]:  # clips that lack a stream are in the table only
        for question, asked in (("both", "what it sees and hears"), ("hear", "what it hears"), ("see", "what it sees")):
            shown = []
            for side, tone, label in (("audio", "audio", "sound side"), ("video", "vision", "picture side")):
                found = [(name, _fidelity(f, condition, question, None)) for name, f in ends]
                values = [(name, e) for name, row in found if row and (e := getattr(row, side)) is not None]
                if values:
                    shown.append(Bar(label, tone, values))
            if shown:
                groups.append((f"{words(condition, CONDITIONS).capitalize()}, asked {asked}", shown))
    return bars(groups, "Caption fidelity", width=880) if groups else None


def _fidelity(findings: Findings, condition: str, question: str, cut: str | None, judge: str | None = None) -> CaptionFidelity | None:
    """The row of one judge, by default the first."""
    rows = [f for f in findings.fidelity if (f.condition, f.question, f.cut) == (condition, question, cut)]
    return next((f for f in rows if judge is None or f.judge == judge), None)


def _fidelity_table(ends: list[Named], comparison: Comparison | None) -> dict[str, Any] | None:
    """Every judge, condition, question and cut."""
    keys = dict.fromkeys((f.judge, f.condition, f.question, f.cut) for _, findings in ends for f in findings.fidelity)
    header, rows = ["judge", "clips", "asked about", "cut"], []
    for what in ("sound side", "picture side", "makes up"):
        header += [f"{what}, {name}" if len(ends) > 1 else what for name, _ in ends]
        header += ["difference"] if comparison and what != "makes up" else []
    header += [f"cut adds to the sound side, {name}" if len(ends) > 1 else "cut adds to the sound side" for name, _ in ends]
    for judge, condition, question, cut in keys:
        row = [judge, words(condition, CONDITIONS), words(question, QUESTIONS), cut_words(cut) or "–"]
        found = [_fidelity(f, condition, question, cut, judge) for _, f in ends]
        for measure, show in (("audio", number), ("video", number), ("invented", percent)):
            row += [show(getattr(f, measure)) if f else "–" for f in found]
            if comparison and measure != "invented":
                key = caption_key(judge, condition, question, cut, measure)
                change = comparison.find("captions", measure, condition, question, key.item)
                row.append(effect(change.difference) if change and change.difference else "–")
        row += [effect(f.audio_change) if f and f.audio_change else "–" for f in found]
        rows.append([*row, counted(next(f.unparsed for f in reversed(found) if f))])
    return {"header": [*header, "n (sources)"], "rows": rows} if rows else None


def _agreement(ends: list[Named]) -> list[str]:
    """How alike judges rank the captions of the last findings."""
    return [
        f"Judges {a.first} and {a.second} on the {'sound' if a.side == 'audio' else 'picture'} side: Spearman's rho = {a.rho:.2f}, {a.n} captions."
        for a in agreement(ends[-1][1].captions)
        if a.rho is not None
    ]


def _reliance_table(ends: list[Named], comparison: Comparison | None) -> dict[str, Any] | None:
    rows = []
    for question in ("hear", "see"):
        for name, findings in ends:
            for r in findings.reliance:
                if r.question == question:
                    label = [f"{question}s", name] if len(ends) > 1 else [f"{question}s"]
                    null = "–" if r.shortcut_null is None else f"{r.shortcut_null:.2f}"
                    change = comparison.find("reliance", "shortcut", None, question) if comparison and findings is ends[-1][1] else None
                    changed = [effect(change.difference) if change and change.difference else ""] if comparison else []
                    numbers = [number(r.shortcut), null, *changed, effect(r.effect_audio), effect(r.effect_video), counted(r.shortcut)]
                    rows.append([*label, *numbers])
    header = ["asked what it", *([""] if len(ends) > 1 else []), "Shortcut Index", "by chance below", *(["difference"] if comparison else [])]
    header += ["sound moves, nats", "picture moves, nats", "grids (sources)"]
    return {"header": header, "rows": rows} if rows else None


def _trajectory(findings: list[Named]) -> Figure | None:
    """Following and factual rates over all findings given; a line breaks where the clips change."""
    if len(findings) < 3:
        return None
    wanted = [
        ("names the sound (conflicts, hears)", "audio", "counterfactual", "hear", "audio", False),
        ("names the picture (conflicts, hears)", "vision", "counterfactual", "hear", "vision", False),
        ("right about the sound (factual)", "audio", "factual", "hear", "correct", True),
        ("right about the picture (factual)", "vision", "factual", "see", "correct", True),
    ]
    same = len({f.split for _, f in findings}) == 1
    ticks = [(float(k), name if same else f"{name} ({f.split})") for k, (name, f) in enumerate(findings)]
    data = [(f.split, f.data_hash) for _, f in findings]
    series = []
    for name, tone, condition, question, measure, dashed in wanted:
        points = [(float(k), e) for k, (_, f) in enumerate(findings) if (e := _rate(f, condition, question, measure))]
        for _, run in groupby(points, key=lambda point: data[int(point[0])]):
            series.append(Series(name, tone, list(run), dashed=dashed, band=not dashed))
    note = "" if same else "Lines join neighbours measured on the same clips; the split is in brackets."
    drawing = lines(series, ticks, RATES, "Rates over training", "checkpoint", width=860, height=250)
    return _figure("", [("", drawing)], series, ticks, percent, note) if series else None


def _multiples(findings: list[Named]) -> list[Figure]:
    """Small multiples over all findings given, on one x axis: a panel for every number that two findings of the same clips have.

    The clips that most findings are of are joined by lines; findings of other clips (the test split before and after) stand alone as hollow dots.
    """
    if len(findings) < 3:
        return []
    data = [(f.split, f.data_hash) for _, f in findings]
    main, ticks = _most(data), [(float(k), name) for k, (name, _) in enumerate(findings)]
    found = [scalars(f) for _, f in findings]
    panels: dict[tuple[str, bool], list[Series]] = {}
    keys: dict[str, dict[tuple[str, str, str], None]] = {}
    for name in dict.fromkeys(name for one in found for name in one):
        title, label, tone, rate = panel_of(name)
        for clips in dict.fromkeys(data):
            points = [(float(k), one[name]) for k, one in enumerate(found) if name in one and data[k] == clips]
            if len(points) > 1:
                shown = label if len(set(data)) == 1 else f"{label}, {clips[0]} split"
                alone = clips != main
                parts = [[point] for point in points] if alone else [points]
                panels.setdefault((title, rate), []).extend(Series(shown, tone, part, dashed=alone) for part in parts)
                keys.setdefault(title, {})[tone, label, "solid"] = None
    figures = []
    for (title, rate), series in panels.items():
        scale = RATES if rate and max(e.value or 0.0 for s in series for _, e in s.points) > 0.25 else span(series)
        drawing = lines(series, ticks, scale, title, "checkpoint", as_percent=rate, width=262, height=165)
        figure = _figure(title, [("", drawing)], series, ticks, percent if rate else number)
        figure.key = list(keys[title])
        figures.append(figure)
    return figures


def _apart(findings: list[Named]) -> str:
    """Which findings stand alone in the small multiples, e.g. "before, after (test split)"; nothing where all are of the same clips."""
    data = [(f.split, f.data_hash) for _, f in findings]
    main = _most(data)
    others = {clips: [name for (name, _), at in zip(findings, data, strict=True) if at == clips] for clips in dict.fromkeys(data) if clips != main}
    return "; ".join(f"{', '.join(names)} ({split} split)" for (split, _), names in others.items() if len(names) > 1)


def _most(data: list[tuple[str, str]]) -> tuple[str, str]:
    """The clips that most findings are of; of equals the last to come up, because a history begins with the test split."""
    return max(reversed(list(dict.fromkeys(data))), key=data.count)


def _knockout(ends: list[Named]) -> list[Group]:
    """One figure per site: following under the cut, and the change of log p. First conflicts asked what it hears; the rest folded."""
    keys = list(dict.fromkeys((c.condition, c.question) for _, f in ends for c in f.knockout))
    keys.sort(key=lambda k: (k[0] != "counterfactual", k[1] != "hear"))
    groups = []
    for place, (condition, question) in enumerate(keys):
        for source in ("video", "audio") if question == "hear" else ("audio", "video"):
            for family, when in (("from", "from a layer on"), ("window", "in a window of layers"), ("all", "in all layers")):
                cuts = [c for _, f in ends for c in f.knockout if (c.condition, c.question, c.family) == (condition, question, family)]
                cuts = [c for c in cuts if c.site.startswith(f"{source}->")]
                gains = [Series("", "", [(0.0, c.delta_logprob)]) for c in cuts]
                sites = dict.fromkeys(c.site for c in cuts)
                panels = [p for site in sites if (p := _cut_panel(ends, site, family, condition, question, span(gains)))]
                if panels:
                    title = f"{_capital(source)} cut {when}: {words(condition, CONDITIONS)}, asked what it {question}s"
                    groups.append(Group(title, panels, folded=place > 0 or (source == "audio") == (question == "hear")))
    return groups


def _cut_panel(
    ends: list[Named], site: str, family: str, condition: str, question: str, gain_ticks: Sequence[float], size: tuple[float, float] = (262, 175)
) -> Figure | None:
    """One site against the first layer cut: following rates ("none" is the uncut model), below them the change of log p of the designated label."""
    starts: dict[int, str] = {}
    followed, gained = [], []
    for k, (name, findings) in enumerate(ends):
        key, dashed = (site, family, condition, question), len(ends) > 1 and k == 0
        cuts = sorted((c for c in findings.knockout if (c.site, c.family, c.condition, c.question) == key), key=lambda c: c.start)
        starts |= {c.start: layers(c.start, c.stop) if family != "from" else str(c.start) for c in cuts}
        for measure, tone, label in (("audio", "audio", "names the sound"), ("vision", "vision", "names the picture")):
            points = [(float(c.start), e) for c in cuts if (e := getattr(c, measure)) is not None and e.value is not None]
            if points and (condition.endswith("counterfactual") or tone == "audio"):  # on factual clips there is one event to name
                followed.append(Series(f"{label}, {name}", tone, points, dashed, apart=_rate(findings, condition, question, measure)))
        points = [(float(c.start), c.delta_logprob) for c in cuts if c.delta_logprob.value is not None]
        if points:
            gained.append(Series(f"log p, {name}", "audio" if question == "hear" else "vision", points, dashed))
    ticks = [(float(start), label) for start, label in sorted(starts.items())]
    x_title = "cut from layer" if family == "from" else "layers cut"
    drawings, width, height = [], *size
    tables = []
    none = (float(max(starts, default=0) + 1), "none")
    if followed:
        drawings.append(("", lines(followed, [*ticks, none], RATES, cut_name(site), x_title, width=width, height=height)))
        tables.append(_figure("", [], followed, [*ticks, none], percent))
    if gained:
        what = f"log p of the true {'sound' if question == 'hear' else 'picture'}"
        shared = [*ticks, (none[0], "")] if followed else ticks  # so that both charts share their x axis
        drawing = lines(gained, shared, gain_ticks, f"{cut_name(site)}, {what}", x_title, as_percent=False, width=width, height=height - 35)
        drawings.append((f"Δ {what}, nats a token", drawing))
        tables.append(_figure("", [], gained, ticks, effect))
    if not tables:
        return None
    rows = [
        sum((t.rows[k][1:] if k < len(t.rows) else ["–"] * (len(t.header) - 1) for t in tables), [tables[0].rows[k][0]])
        for k in range(len(tables[0].rows))
    ]
    return Figure(cut_name(site), drawings, sum((t.header[1:] for t in tables), [""]), rows, tables[-1].note)


def _probes(ends: list[Named]) -> list[Figure]:
    """Per position: accuracy for the sound and the picture over layers; the grey band spans the controls of the last findings."""
    figures = []
    for position in dict.fromkeys(p.position for _, f in ends for p in f.probes):
        series, controls, folds = [], [], ""
        for k, (name, findings) in enumerate(ends):
            for p in findings.probes:
                if p.position == position:
                    points = [(float(layer), e) for layer, e in enumerate(p.accuracy)]
                    label = f"{words(p.label, STREAMS)}, {name}" if len(ends) > 1 else words(p.label, STREAMS)
                    series.append(Series(label, STREAM_TONES.get(p.label, "neither"), points, dashed=len(ends) > 1 and k == 0))
                    folds = p.folds
                    if k == len(ends) - 1:
                        controls += [c for c in (p.shuffled, p.audio_removed, p.random_weights) if c]
        figures.append(_layer_figure(f"Read at the {words(position, POSITIONS)}", series, controls, RATES, f"Folds: {folds}." if folds else ""))
    return figures


def _lens(ends: list[Named], tuned: bool = False) -> list[Figure]:
    """Per position: rate of true event words in the top k; the grey band spans the shuffled references of the last findings."""
    found: dict[str, tuple[list[Series], list[list[float]], int]] = {}
    for k, (name, findings) in enumerate(ends):
        for n in findings.lens if not tuned else findings.tuned.lens if findings.tuned else []:
            series, controls, _ = found.setdefault(n.position, ([], [], n.k))
            label = f"{words(n.label, STREAMS)}, {name}" if len(ends) > 1 else words(n.label, STREAMS)
            points = [(float(layer), e) for layer, e in enumerate(n.hit)]
            series.append(Series(label, STREAM_TONES.get(n.label, "neither"), points, dashed=len(ends) > 1 and k == 0))
            if k == len(ends) - 1:
                controls.append(n.control)
    scale = span([s for series, _, _ in found.values() for s in series])
    return [
        _layer_figure(f"In the top {k} at the {words(position, POSITIONS)}", series, controls, scale)
        for position, (series, controls, k) in found.items()
    ]


def _tuned(ends: list[Named]) -> Group | None:
    """How far both lenses are from the final output, and what the tuned one reads."""
    known = [(k, name, f.tuned) for k, (name, f) in enumerate(ends) if f.tuned]
    if not known:
        return None
    series = []
    for k, name, tuned in known:
        for label, tone, values in (("logit lens", "near", tuned.kl_before), ("tuned lens", "base", tuned.kl_after)):
            points = [(float(layer), e) for layer, e in enumerate(values)]
            series.append(Series(f"{label}, {name}" if len(ends) > 1 else label, tone, points, dashed=len(ends) > 1 and k == 0))
    ticks = [(float(layer), str(layer)) for layer in range(len(series[0].points))]
    title = "KL to the final output, nats"
    drawing = lines(series, ticks, span(series), title, "layer", as_percent=False)
    last = known[-1][2]
    note = f"Orange: logit lens, blue: tuned lens. Fitted on {last.clips} conflicts ({last.rows} states a layer), read on others."
    figures = [_figure(title, [("", drawing)], series, ticks, number, note), *_lens(ends, tuned=True)]
    return Group("The same through a tuned lens: an affine map a layer, fitted to the final output", figures, folded=True)


def _layer_figure(title: str, series: list[Series], controls: list[list[float]], y_ticks: Sequence[float], note: str = "") -> Figure:
    count = max((len(s.points) for s in series), default=0)
    ticks = [(float(layer), str(layer)) for layer in range(count)]
    band = [(float(k), min(v), max(v)) for k in range(count) if (v := [c[k] for c in controls if k < len(c)])]
    figure = _figure(title, [("", lines(series, ticks, y_ticks, title, "layer", grey_band=band))], series, ticks, percent, note)
    if band:
        figure.header.append("controls")
        for row, (_, low, high) in zip(figure.rows, band, strict=False):
            row.append(f"{100 * low:.1f}–{100 * high:.1f} %")
    return figure


def _latent(ends: list[Named]) -> list[str]:
    """What is understood inside, by both lenses, and what is said aloud."""
    sentences = []
    for name, f in ends:
        if f.latent:
            tuned = f" By the tuned lens {percent(f.tuned.latent.latent)} (layer {f.tuned.latent.layer})." if f.tuned else ""
            sentences.append(
                f"{_capital(name)}: the true sound can be read inside in {percent(f.latent.latent)} of clips "
                f"(above shuffled references, layer {f.latent.layer}, n = {f.latent.latent.n}) and is said aloud in {percent(f.latent.said)}.{tuned}"
            )
    return sentences


def _flow(ends: list[Named]) -> list[Group]:
    """Stacked columns per layer, before beside after; the first variant open, the others folded."""
    order = ["no_sink", "plain", "value_norm"]
    keys = dict.fromkeys((w.condition, w.variant) for _, f in ends for w in f.flow)
    ranked = sorted(keys, key=lambda key: (key[0] != "counterfactual", order.index(key[1]) if key[1] in order else len(order)))
    groups = []
    for place, (condition, variant) in enumerate(ranked):
        figures = []
        for target in dict.fromkeys(w.target for _, f in ends for w in f.flow):
            for name, findings in ends:
                for w in findings.flow:
                    if (w.condition, w.variant, w.target) == (condition, variant, target) and w.mass:
                        depth = min(len(layer) for layer in w.mass.values())
                        stack = [
                            (str(layer), [(kind.replace("emitters", "answer"), kind, mass[layer]) for kind, mass in w.mass.items()])
                            for layer in range(depth)
                        ]
                        title = f"From the {words(target, POSITIONS)}" + (f", {name}" if len(ends) > 1 else "")
                        rows = [[label, *(percent(e) for _, _, e in shares)] for label, shares in stack]
                        header = ["layer", *(kind.replace("emitters", "answer") for kind in w.mass)]
                        figures.append(Figure(title, [("", columns(stack, title, "layer", width=262, height=175))], header, rows))
        if figures:
            groups.append(Group(f"{words(condition, CONDITIONS).capitalize()}: {words(variant, VARIANTS)}", figures, folded=place > 0))
    return groups


def _shift(ends: list[Named]) -> list[Group]:
    """One stacked bar per token class and findings: the base's first choice, second or third, beyond."""
    groups = []
    conditions = sorted(dict.fromkeys(s.condition for _, f in ends for s in f.shift), key=lambda c: c != "counterfactual")
    for place, condition in enumerate(conditions):
        rows, table = [], []
        for tokens in dict.fromkeys(s.tokens for _, f in ends for s in f.shift):
            label = words(tokens, TOKENS)
            for name, findings in ends:
                for s in findings.shift:
                    if (s.tokens, s.condition) == (tokens, condition) and s.unshifted.value is not None:
                        shares = [
                            ("first choice of the base", "base", s.unshifted),
                            ("its 2nd or 3rd", "near", s.marginal),
                            ("beyond", "far", s.shifted),
                        ]
                        note = name if len(ends) > 1 else ""
                        rows.append((label, note, shares, f"KL {number(s.kl).partition(' (')[0]} nats"))
                        table.append(
                            [
                                words(tokens, TOKENS),
                                name,
                                percent(s.unshifted),
                                percent(s.marginal),
                                percent(s.shifted),
                                number(s.kl),
                                counted(s.unshifted),
                            ]
                        )
                        label = ""
        if rows:
            title = words(condition, CONDITIONS).capitalize()
            header = ["tokens", "", "first choice of the base", "2nd or 3rd", "beyond", "KL, nats", "n (sources)"]
            groups.append(Group(title, [Figure("", [("", stacked_rows(rows, f"Token shift, {title}"))], header, table)], folded=place > 0))
    return groups


def _language(ends: list[Named], comparison: Comparison | None) -> dict[str, Any] | None:
    """Perplexity of plain text and simple questions answered right, with the paired changes."""
    known = [language_numbers(f.language) if f.language else None for _, f in ends]
    if not any(known):
        return None
    header = ["", *(name if len(ends) > 1 else "value" for name, _ in ends), *(["change"] if comparison else []), "n"]
    rows = []
    for k, (label, show, _, of) in enumerate(next(numbers for numbers in reversed(known) if numbers)):
        row = [label, *(show(numbers[k][2]) if numbers else "–" for numbers in known)]
        if comparison:
            change = comparison.find("language", ("perplexity", "right")[k])
            row.append("–" if change is None else relative(change.difference) if k == 0 else percent(change.difference, signed=True))
        rows.append([*row, of])
    return {"header": header, "rows": rows}


def _plain_answers(ends: list[Named]) -> dict[str, Any] | None:
    """What was answered to each simple question; ✓ marks a right answer."""
    known = [(name, {a.question: a for a in f.language.answers}) for name, f in ends if f.language]
    if not known:
        return None
    rows = [
        [question, ", ".join(a.accepted), *(f"{'✓ ' if given[question].right else ''}{given[question].answer or '(nothing)'}" for _, given in known)]
        for question, a in known[-1][1].items()
        if all(question in given for _, given in known)
    ]
    return {"header": ["question", "right", *(name if len(ends) > 1 else "answer" for name, _ in known)], "rows": rows}


def _plan_rows(plan: dict[str, Any], prefix: str = "") -> list[tuple[str, str, str]]:
    """(choice, value, because) of every entry; nested choices get dotted names."""
    rows = []
    for key, value in plan.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict) and "because" in value:
            rest = {k: v for k, v in value.items() if k not in ("because", "overridden")}
            shown = _choice(key, rest["value"] if set(rest) == {"value"} else rest)
            rows.append((name, shown, _plain(value["because"])))
        elif isinstance(value, dict):
            rows += _plan_rows(value, f"{prefix}{key} · ")
        else:
            rows.append((name, _choice(key, value), ""))
    return rows


def _choice(key: str, value: Any) -> str:
    """A choice of the plan in words: cuts and windows as layers, long lists cut short, many weights as their range."""
    if isinstance(value, str) and (cut := re.fullmatch(r"(\S+->\S+) (\d+):(\d+)", value)):
        return f"{cut_name(cut[1])}, layers {layers(int(cut[2]), int(cut[3]))}"
    if isinstance(value, dict) and {"site", "start", "stop"} == set(value):
        return f"{cut_name(value['site'])}, layers {layers(value['start'], value['stop'])}"
    if key.endswith("window") and isinstance(value, list) and len(value) == 2:
        return f"layers {layers(*value)}"
    if isinstance(value, list) and len(_plain(value)) > 160:
        return f"{_plain(value[:3])}, … ({len(value)} in all)"
    if isinstance(value, dict) and len(value) > 8 and all(isinstance(v, int | float) for v in value.values()):
        return f"{_plain(min(value.values()))} to {_plain(max(value.values()))} over {len(value)} entries"
    return _plain(value) if value not in ({}, []) else "none"


def _clips(ends: list[Named], root: Path, max_clips: int) -> list[dict[str, Any]]:
    """Cards of clips with every answer, conflicts first. Picked by their place in the list, evenly, never by how the model did."""
    asked = [{(s.clip, s.condition, s.question): s for s in f.samples} for _, f in ends]
    by_clip: dict[tuple[str, str], list[Sample]] = {}
    for sample in ends[0][1].samples:  # with one stream muted or blanked the model was not given what the file plays: no card
        if sample.condition.endswith("factual") and all((sample.clip, sample.condition, sample.question) in other for other in asked):
            by_clip.setdefault((sample.clip, sample.condition), []).append(sample)
    conflicts = [key for key in by_clip if key[1] == "counterfactual"]
    rest = [key for key in by_clip if key[1] != "counterfactual"]
    few = min(len(rest), max(max_clips // 3, max_clips - len(conflicts)))
    cards = []
    for key in [*_spread(conflicts, max_clips - few), *_spread(rest, few)]:
        samples = by_clip[key]
        video, problem = _embedded(root, samples[0].file)
        answers = []
        for s in samples:
            given = [(name, *_judged(one[s.clip, s.condition, s.question])) for (name, _), one in zip(ends, asked, strict=True)]
            answers.append({"question": s.question, "given": given})
        cards.append({"sample": samples[0], "condition": words(key[1], CONDITIONS), "video": video, "problem": problem, "answers": answers})
    return cards


def _judged(sample: Sample) -> tuple[str, str, str]:
    """(answer, tone, verdict in words). Where sound and picture agree, right is neither the sound's colour nor the picture's."""
    if sample.correct and sample.condition in ("factual", "unseen_factual"):
        return sample.answer, "agree", "✓ right"
    return sample.answer, sample.verdict, ("✓ " if sample.correct else "") + VERDICTS.get(sample.verdict, sample.verdict)


def _spread(items: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` of the items at even distances, all of them if there are fewer."""
    if count >= len(items):
        return items
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(max(count, 0))]


def _embedded(root: Path, file: str) -> tuple[str, str]:
    """(data URI, "") of a clip's mp4, or ("", why it is not shown)."""
    path = (root / file).resolve()
    if not path.is_relative_to(root.resolve()):
        return "", f"{file} lies outside the clip folder"
    if not path.is_file():
        return "", f"{file} is not in the clip folder"
    if path.stat().st_size > LARGEST_CLIP:
        return "", f"{file} is too large to embed ({path.stat().st_size / 1e6:.1f} MB)"
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode("ascii"), ""


def _settings(ends: list[Named]) -> list[tuple[str, list[str]]]:
    """What moves scores: one row a setting; one column where all findings agree, else one each."""
    tables = []
    for _, f in ends:
        rows = {"model": f.model, "adapter": f.adapter or "none", "base for the token shift": f.base or "none (proxy: the model without its audio)"}
        rows |= {"split": f.split, "hash of the clips": f.data_hash, "decoder layers": str(f.n_layers), "format of the findings": str(f.format)}
        tables.append(rows | dict(_flat(f.settings)))
    keys = dict.fromkeys(key for rows in tables for key in rows)
    return [(key, list(dict.fromkeys(values)) if len(set(values)) == 1 else values) for key in keys if (values := [t.get(key, "–") for t in tables])]


def _left_out(findings: list[Named], comparison: Comparison | None) -> list[str]:
    sentences: dict[str, list[str]] = {}
    for name, f in findings:
        for sentence in f.left_out:
            sentences.setdefault(sentence, []).append(name)
    shown = [s if len(names) == len(findings) else f"{_capital(', '.join(names))}: {s}" for s, names in sentences.items()]
    return shown + (comparison.left_out if comparison else [])


# ---- small things


def _ends(findings: list[Named]) -> list[Named]:
    return [findings[0], findings[-1]] if len(findings) > 1 else findings[:1]


def _rate(findings: Findings, condition: str, question: str, measure: str) -> Estimate | None:
    row = findings.following_rate(condition, question)
    return getattr(row, measure) if row else None


def _figure(title: str, drawings: list[tuple[str, Drawing]], series: list[Series], ticks: list[tuple[float, str]], show, note: str = "") -> Figure:
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


def _key(x: float, y: float, entries: list[tuple[str, str]]) -> Markup:
    parts = []
    for tone, label in entries:
        parts.append(Markup('<circle class="dot t-{}" cx="{}" cy="{}" r="4"/>').format(tone, x, y - 4))
        parts.append(text(x + 9, y, label, "tick"))
        x += 9 + 6.2 * len(label) + 16
    return joined(parts)


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} · ")
        else:
            yield f"{prefix}{key}".replace("_", " "), _plain(value)


def _plain(value: Any) -> str:
    """JSON values as people write them."""
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]
