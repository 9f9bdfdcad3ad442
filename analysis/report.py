"""One static page that shows findings: what the model does, where it happens, what training changed, and clips to play.

    from analysis.report import write_report, headline_figure
    write_report("runs/demo/report.html", [("before", before), ("step 50", middle), ("after", after)], clips_root="runs/clips",
                 plan=json.loads(…), comparison=compare(before, after))
    headline_figure("docs/result.svg", [("before", before), ("after", after)])

The first findings are drawn light and dashed, the last solid; those between appear in the trajectory. The page needs no network and no other file:
charts are SVG, clips are embedded, and its content security policy forbids loading anything. A diagnostic that was not run leaves its section out.

What the sections show is made in report_answers.py, report_training.py and report_layers.py; the page itself, its first sentences, clips and
settings are here, and the README's picture.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis.charts import bars, joined, text
from analysis.compare import Comparison
from analysis.findings import Sample
from analysis.report_answers import (
    abstention_table,
    agreement_sentences,
    answer_bars,
    answer_groups,
    caption_bars,
    fidelity_table,
    following_table,
    language_table,
    number_tiles,
    plain_answers,
    reliance_table,
)
from analysis.report_layers import cut_panel, flow_groups, knockout_groups, latent_sentences, lens_figures, probe_figures, shift_groups, tuned_group
from analysis.report_parts import Named, capital, plain
from analysis.report_training import apart, plan_rows, small_multiples, trajectory_figure
from analysis.tables import CONDITIONS, best_cuts, cut_name, words
from data.files import write_text

LARGEST_CLIP = 4_000_000  # bytes; a larger mp4 is named instead of embedded
VERDICTS = {
    "audio": "names the sound",
    "vision": "names the picture",
    "both": "names both",
    "neither": "names something else",
    "nothing": "says there is nothing",
    "unparsed": "names no known event",
}


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
    multiples, never = small_multiples(findings)
    page = environment.get_template("report.html").render(
        sentences=_headline(findings),
        tiles=number_tiles(ends),
        names=[name for name, _ in ends],
        warnings=_warnings(ends),
        trained_on=list(dict.fromkeys(sentence for _, f in ends for sentence in f.trained_on())),
        answers=answer_bars(ends),
        following=following_table(ends, comparison),
        abstention=abstention_table(ends, comparison),
        reliance=reliance_table(ends, comparison),
        captions=caption_bars(ends),
        fidelity=fidelity_table(ends, comparison),
        agreement=agreement_sentences(ends),
        trajectory=trajectory_figure(findings),
        multiples=multiples,
        never=never,
        apart=apart(findings),
        knockout=knockout_groups(ends),
        probes=probe_figures(ends),
        lens=lens_figures(ends),
        tuned=tuned_group(ends),
        latent=latent_sentences(ends),
        flow=flow_groups(ends),
        shift=shift_groups(ends),
        language=language_table(ends, comparison),
        plain_answers=plain_answers(ends),
        plan=plan_rows(plan or {}),
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
        lead = f"{capital(name)}: " if k else "Asked what it hears when sound and picture disagree, this model "
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
    groups = answer_groups(ends) if ends else []
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
        panel = cut_panel([(name, first)], site, "from", "counterfactual", "hear", [0.0, 1.0], size=(380, max(230.0, left.height - 40)))
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


def _key(x: float, y: float, entries: list[tuple[str, str]]) -> Markup:
    parts = []
    for tone, label in entries:
        parts.append(Markup('<circle class="dot t-{}" cx="{}" cy="{}" r="4"/>').format(tone, x, y - 4))
        parts.append(text(x + 9, y, label, "tick"))
        x += 9 + 6.2 * len(label) + 16
    return joined(parts)


def _ends(findings: list[Named]) -> list[Named]:
    return [findings[0], findings[-1]] if len(findings) > 1 else findings[:1]


def _warnings(ends: list[Named]) -> list[str]:
    (a, first), (b, last) = ends[0], ends[-1]
    if (first.split, first.data_hash) != (last.split, last.data_hash):
        return [f"“{a}” was measured on the {first.split} split and “{b}” on the {last.split} split of other clips: the difference mixes both."]
    return []


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
        rows = {
            "model": f.model,
            "adapter": f.adapter or "none",
            "base for the token shift": f.base or "none (proxy: the model without its audio and its adapter)",
        }
        rows |= {"split": f.split, "hash of the clips": f.data_hash, "decoder layers": str(f.n_layers), "format of the findings": str(f.format)}
        tables.append(rows | dict(_flat(f.settings)))
    keys = dict.fromkeys(key for rows in tables for key in rows)
    return [(key, list(dict.fromkeys(values)) if len(set(values)) == 1 else values) for key in keys if (values := [t.get(key, "–") for t in tables])]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} · ")
        else:
            yield f"{prefix}{key}".replace("_", " "), plain(value)


def _left_out(findings: list[Named], comparison: Comparison | None) -> list[str]:
    sentences: dict[str, list[str]] = {}
    for name, f in findings:
        for sentence in f.left_out:
            sentences.setdefault(sentence, []).append(name)
    shown = [s if len(names) == len(findings) else f"{capital(', '.join(names))}: {s}" for s, names in sentences.items()]
    return shown + (comparison.left_out if comparison else [])
