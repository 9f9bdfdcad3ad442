"""What the page says about answers: the tiles, what answers name, abstention, reliance, captions and plain text.

    answer_bars([("before", before), ("after", after)])      # a chart
    following_table([("now", findings)], comparison=None)    # {"header": …, "rows": …}, cells as the page shows them

Every function takes the first and the last findings (or the only ones) and gives None or an empty list where nothing was measured. Tables that take
a comparison get columns of paired differences from it.
"""

from __future__ import annotations

from typing import Any

from analysis.charts import Bar, Drawing, bars
from analysis.compare import Comparison
from analysis.fidelity import agreement, caption_key
from analysis.findings import MISSING, CaptionFidelity, Findings
from analysis.report_parts import Named, rate_of
from analysis.tables import (
    ABSTENTION,
    CONDITIONS,
    QUESTIONS,
    UNREAD,
    counted,
    cut_words,
    effect,
    language_numbers,
    number,
    percent,
    relative,
    share,
    words,
)


def number_tiles(ends: list[Named]) -> list[dict[str, str]]:
    """The numbers to look at first, each with before, after, interval and n."""
    wanted = [
        ("Names the sound", "on conflicts, asked what it hears", "audio", "counterfactual", "audio"),
        ("Names the picture", "on conflicts, asked what it hears", "vision", "counterfactual", "vision"),
        ("Shortcut Index", "on hear-questions; 0 is ideal", "", "", "shortcut"),
        ("Right on factual clips", "asked what it hears", "", "factual", "correct"),
        ("Says it hears nothing", "of silent clips, asked what it hears", "", "muted", "nothing"),
    ]
    tiles = []
    for title, note, tone, clips, measure in wanted:
        show = percent if clips else number
        index = {name: next((r.shortcut for r in f.reliance if r.question == "hear"), None) for name, f in ends}
        values = [(name, rate_of(f, clips, "hear", measure) if clips else index[name]) for name, f in ends]
        last = values[-1][1]
        if last is None or last.value is None:
            continue
        before = values[0][1]
        big, _, interval = show(last).partition(" (")
        was = f"{values[0][0]}: {show(before)}" if len(values) > 1 and before is not None else ""
        if row := ends[-1][1].following_rate(clips, "hear"):
            note += "".join(f", {what} {share(getattr(row, left).value)}" for left, what in UNREAD.items())
        tiles.append({"title": title, "note": note, "tone": tone, "big": big, "interval": interval.rstrip(")"), "before": was, "n": counted(last)})
    return tiles


def answer_groups(ends: list[Named]) -> list[tuple[str, list[Bar]]]:
    """What answers name on conflicts and on factual clips, one bar per findings; groups and bars that no findings have are left out."""
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
            values = [(name, e) for name, f in ends if (e := rate_of(f, condition, question, measure))]
            if values:
                shown.append(Bar(label, tone, values))
        if shown:
            groups.append((heading, shown))
    return groups


def answer_bars(ends: list[Named]) -> Drawing | None:
    """These groups as one chart."""
    groups = answer_groups(ends)
    return bars(groups, "What the answers name", width=880) if groups else None


def following_table(ends: list[Named], comparison: Comparison | None) -> dict[str, Any] | None:
    """Every condition and question: names the sound / picture before and after, with the paired differences."""
    keys = list(dict.fromkeys((f.condition, f.question) for _, findings in ends for f in findings.following))
    header, rows = ["clips", "asked what it"], []
    for what in ("names the sound", "names the picture"):
        header += [f"{what}, {name}" if len(ends) > 1 else what for name, _ in ends] + (["difference, points"] if comparison else [])
    for condition, question in keys:
        row = [words(condition, CONDITIONS), f"{question}s"]
        for measure in ("audio", "vision"):
            row += [percent(rate_of(f, condition, question, measure)) for _, f in ends]
            if comparison:
                change = comparison.find("following", measure, condition, question)
                row.append(percent(change.difference, signed=True) if change else "–")
        found = next((r for _, f in reversed(ends) if (r := f.following_rate(condition, question))), None)
        row += [
            share(getattr(f, measure).value) if f else "–" for measure in UNREAD for f in (g.following_rate(condition, question) for _, g in ends)
        ]
        left_out = f", {found.trained} left out" if found and found.trained else ""
        rows.append([*row, f"{counted(found.audio)}{left_out}" if found else "–"])
    return {"header": [*header, *_unread_header(ends), "n (sources)"], "rows": rows} if rows else None


def _unread_header(ends: list[Named]) -> list[str]:
    """Columns of what could not be read and of what ended at the token limit."""
    return [f"{what}, {name}" if len(ends) > 1 else what for what in UNREAD.values() for name, _ in ends]


def abstention_table(ends: list[Named], comparison: Comparison | None) -> dict[str, Any] | None:
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
        row += [share(f.invented) if f else "–" for f in found]
        row += [share(getattr(f, measure).value) if f else "–" for measure in UNREAD for f in found]
        rows.append([*row, counted(last.nothing)])
    return {"header": [*header, *_unread_header(ends), "n (sources)"], "rows": rows} if rows else None


def reliance_table(ends: list[Named], comparison: Comparison | None) -> dict[str, Any] | None:
    """The Shortcut Index of both questions with what it stays under by chance, and how far each stream moves the score."""
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


def caption_bars(ends: list[Named]) -> Drawing | None:
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


def fidelity_table(ends: list[Named], comparison: Comparison | None) -> dict[str, Any] | None:
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
        row += [share(getattr(f, measure).value) if f else "–" for measure in UNREAD for f in found]
        rows.append([*row, counted(next(f.unparsed for f in reversed(found) if f))])
    return {"header": [*header, *_unread_header(ends), "n (sources)"], "rows": rows} if rows else None


def _fidelity(findings: Findings, condition: str, question: str, cut: str | None, judge: str | None = None) -> CaptionFidelity | None:
    """The row of one judge, by default the first."""
    rows = [f for f in findings.fidelity if (f.condition, f.question, f.cut) == (condition, question, cut)]
    return next((f for f in rows if judge is None or f.judge == judge), None)


def agreement_sentences(ends: list[Named]) -> list[str]:
    """How alike judges rank the captions of the last findings."""
    return [
        f"Judges {a.first} and {a.second} on the {'sound' if a.side == 'audio' else 'picture'} side: Spearman's rho = {a.rho:.2f}, {a.n} captions."
        for a in agreement(ends[-1][1].captions)
        if a.rho is not None
    ]


def language_table(ends: list[Named], comparison: Comparison | None) -> dict[str, Any] | None:
    """Perplexity of plain text and simple questions answered right, with the paired changes."""
    known = [language_numbers(f.language) if f.language else None for _, f in ends]
    if not any(known):
        return None
    header = ["", *(name if len(ends) > 1 else "value" for name, _ in ends), *(["change"] if comparison else []), "n"]
    rows = []
    for k, (label, show, _, of) in enumerate(next(numbers for numbers in reversed(known) if numbers)):
        row = [label, *(show(numbers[k][2]) if numbers else "–" for numbers in known)]
        if comparison:
            change = comparison.find("language", ("perplexity", "right", "cut_off")[k])
            row.append("–" if change is None else relative(change.difference) if k == 0 else percent(change.difference, signed=True))
        rows.append([*row, of])
    return {"header": header, "rows": rows}


def plain_answers(ends: list[Named]) -> dict[str, Any] | None:
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
