"""What the page says about training: rates over all findings, every diagnostic as a small multiple, and the plan in words.

    trajectory_figure([("before", before), ("step 50", middle), ("after", after)])
    plan_rows({"steps": 150, "teacher_cut": {"value": "video->emitters 1:3", "because": "It lifts audio-following."}})

A run measures its ends on the test split and its checkpoints on the selection split: a line joins only what was measured on the same clips.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from analysis.charts import RATES, Series, lines, span
from analysis.report_parts import Figure, Named, line_figure, plain, rate_of
from analysis.tables import cut_name, layers, number, percent
from analysis.trajectory import headline, panel, unread


def trajectory_figure(findings: list[Named]) -> Figure | None:
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
        points = [(float(k), e) for k, (_, f) in enumerate(findings) if (e := rate_of(f, condition, question, measure))]
        for _, run in groupby(points, key=lambda point: data[int(point[0])]):
            series.append(Series(name, tone, list(run), dashed=dashed, band=not dashed))
    note = "" if same else "Lines join neighbours measured on the same clips; the split is in brackets."
    drawing = lines(series, ticks, RATES, "Rates over training", "checkpoint", width=860, height=250)
    return line_figure("", [("", drawing)], series, ticks, percent, note) if series else None


def small_multiples(findings: list[Named]) -> tuple[list[Figure], str]:
    """Small multiples over all findings given, on one x axis: a panel for every number that two findings of the same clips have. Shares of answers
    that were not read or were cut off have none where they are 0 throughout: the text says which these are.

    The clips that most findings are of are joined by lines; findings of other clips (the test split before and after) stand alone as hollow dots.
    """
    if len(findings) < 3:
        return [], ""
    data = [(f.split, f.data_hash) for _, f in findings]
    main, ticks = _most(data), [(float(k), name) for k, (name, _) in enumerate(findings)]
    found = [headline(f) for _, f in findings]
    panels: dict[tuple[str, bool], list[Series]] = {}
    keys: dict[str, dict[tuple[str, str, str], None]] = {}
    for name in dict.fromkeys(name for one in found for name in one):
        title, label, tone, rate = panel(name)
        for clips in dict.fromkeys(data):
            points = [(float(k), one[name]) for k, one in enumerate(found) if name in one and data[k] == clips]
            if len(points) > 1:
                shown = label if len(set(data)) == 1 else f"{label}, {clips[0]} split"
                alone = clips != main
                parts = [[point] for point in points] if alone else [points]
                panels.setdefault((title, rate), []).extend(Series(shown, tone, part, dashed=alone) for part in parts)
                keys.setdefault(title, {})[tone, label, "solid"] = None
    counted = {panel(name).title for one in found for name in one if unread(name)}
    never = [title for (title, _), series in panels.items() if title in counted and not any(e.value for s in series for _, e in s.points)]
    figures = []
    for (title, rate), series in panels.items():
        if title in never:
            continue
        scale = RATES if rate and max(e.value or 0.0 for s in series for _, e in s.points) > 0.25 else span(series)
        drawing = lines(series, ticks, scale, title, "checkpoint", as_percent=rate, width=262, height=165)
        figure = line_figure(title, [("", drawing)], series, ticks, percent if rate else number)
        figure.key = list(keys[title])
        figures.append(figure)
    of: dict[str, list[str]] = {}
    for title in never:
        what, _, clips_of = title.partition(", ")
        of.setdefault(what, []).append(clips_of)
    text = "; ".join(f"{what.lower()} ({', '.join(clips_of)})" for what, clips_of in of.items())
    return figures, f"Not drawn, since they are 0 throughout: {text}." if text else ""


def apart(findings: list[Named]) -> str:
    """Which findings stand alone in the small multiples, e.g. "before, after (test split)"; nothing where all are of the same clips."""
    data = [(f.split, f.data_hash) for _, f in findings]
    main = _most(data)
    others = {clips: [name for (name, _), at in zip(findings, data, strict=True) if at == clips] for clips in dict.fromkeys(data) if clips != main}
    return "; ".join(f"{', '.join(names)} ({split} split)" for (split, _), names in others.items() if len(names) > 1)


def _most(data: list[tuple[str, str]]) -> tuple[str, str]:
    """The clips that most findings are of; of equals the last to come up, because a history begins with the test split."""
    return max(reversed(list(dict.fromkeys(data))), key=data.count)


def plan_rows(plan: dict[str, Any], prefix: str = "") -> list[tuple[str, str, str]]:
    """(choice, value, because) of every entry; nested choices get dotted names."""
    rows = []
    for key, value in plan.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict) and "because" in value:
            rest = {k: v for k, v in value.items() if k not in ("because", "overridden")}
            shown = _choice(key, rest["value"] if set(rest) == {"value"} else rest)
            rows.append((name, shown, plain(value["because"])))
        elif isinstance(value, dict):
            rows += plan_rows(value, f"{prefix}{key} · ")
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
    if isinstance(value, list) and len(plain(value)) > 160:
        return f"{plain(value[:3])}, … ({len(value)} in all)"
    if isinstance(value, dict) and len(value) > 8 and all(isinstance(v, int | float) for v in value.values()):
        return f"{plain(min(value.values()))} to {plain(max(value.values()))} over {len(value)} entries"
    return plain(value) if value not in ({}, []) else "none"
