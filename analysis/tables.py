"""Terminal tables of findings and comparisons, readable at 100 columns, and the plain words and number formats that the page shares.

    from rich.console import Console
    from analysis.tables import findings_tables, comparison_tables
    Console().print(*findings_tables(findings))

Rates are percent with their 95 % interval in brackets, "n (k)" is n items from k sources. What is called best here is best on these same clips,
so a little flattering; the plan chooses on other clips than it is reported on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from analysis.compare import Change, Comparison
from analysis.fidelity import Agreement
from analysis.findings import MISSING, CaptionFidelity, CutEffect, Effect, Estimate, Findings, Following, Language, Latent, Probe, Readout

CONDITIONS = {
    "counterfactual": "conflicts",
    "factual": "factual clips",
    "audio_only": "sound alone",
    "video_only": "picture alone",
    "unseen_factual": "factual, unseen",
    "unseen_counterfactual": "conflicts, unseen",
    "muted": "sound silent",
    "near_silent": "sound faint noise",
    "blanked": "picture black",
    "near_black": "picture faint noise",
}
# Where "nothing" is the right answer, and where it is false abstention.
ABSTENTION = (*MISSING, ("factual", "hear"), ("factual", "see"), ("counterfactual", "hear"), ("counterfactual", "see"))
QUESTIONS = {"hear": "the sound", "see": "the picture", "both": "both"}
UNREAD = {"unparsed": "unparsed", "cut_off": "cut off"}  # shares beside every rate of answers: what could not be read, what ended at the token limit
POSITIONS = {
    "audio": "audio tokens",
    "audio_end": "end-of-audio token",
    "question": "question",
    "emitters": "answer",
    "last_prompt": "last prompt token",
}
STREAMS = {"audio": "the sound", "visual": "the picture"}
TOKENS = {
    "all": "all tokens",
    "audio_event": "sound words",
    "visual": "picture words",
    "rest": "other words",
    "first_event": "first event word",
}


def latent_text(latent: Latent) -> str:
    """What can be read at the sound's own rows and at its closing delimiter, in which layer, and what the exchanged halves give."""
    parts = []
    for where, here, other in (
        ("the audio tokens", Readout(latent.layer, latent.latent), latent.swapped),
        ("the end-of-audio token", latent.end, latent.end_swapped),
    ):
        if here:
            exchanged = f"; halves exchanged: {share(other.rate.value)}, layer {other.layer}" if other else ""
            parts.append(f"{percent(here.rate)} at {where} (top {latent.k}, {latent.pooling}, layer {here.layer}, n = {here.rate.n}{exchanged})")
    return ", ".join(parts)


def words(name: str | None, table: dict[str, str]) -> str:
    """The plain words for a name of the findings; a name we do not know is shown as it is."""
    return table.get(name or "", (name or "").replace("_", " "))


def percent(estimate: Estimate | None, signed: bool = False) -> str:
    """A share as `64.2 % (59.1–69.0)`; signed shares, in points, as `+12.0 (+8.1 to +16.3)`."""
    if estimate is None or estimate.value is None:
        return "–"
    sign, unit = ("+", "") if signed else ("", " %")
    shown = f"{_digits(100 * estimate.value, 1, sign)}{unit}"
    if estimate.low is None or estimate.high is None:
        return shown
    between = " to " if signed or estimate.low < 0 else "–"
    return f"{shown} ({_digits(100 * estimate.low, 1, sign)}{between}{_digits(100 * estimate.high, 1, sign)})"


def number(estimate: Estimate | None, signed: bool = False) -> str:
    """A number as `0.83 (0.79, 0.86)`; signed as `+0.83 (0.79, 0.86)`."""
    if estimate is None or estimate.value is None:
        return "–"
    shown = _digits(estimate.value, 2, "+" if signed else "")
    return shown if estimate.low is None or estimate.high is None else f"{shown} ({_digits(estimate.low, 2)}, {_digits(estimate.high, 2)})"


def effect(estimate: Estimate | None) -> str:
    """A signed number with its interval and p value, the one corrected over its sweep where there is one: `+0.83 (0.79, 0.86; p < .001)`."""
    shown = number(estimate, signed=True)
    return f"{shown[:-1]}; {p_value(estimate)})" if isinstance(estimate, Effect) and estimate.p is not None and shown.endswith(")") else shown


def relative(change: Effect | None) -> str:
    """A change as a share of what there was: `+1.2 % (+0.3 to +2.1)`."""
    shown, bracket, interval = percent(change, signed=True).partition(" (")
    return shown if change is None or change.value is None else f"{shown} %{bracket}{interval}"


def p_value(estimate: Effect) -> str:
    """`p = .034`, `p < .001`; corrected over the sweep where there is one."""
    p = estimate.p if estimate.p_corrected is None else estimate.p_corrected
    return "p –" if p is None else "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".")


UNREAD_COLUMN = ", ".join(UNREAD.values())


def unread(row: Any) -> str:
    """Both shares of UNREAD of a row that has them in one cell: `10.0, 0.0 %`."""
    found = [e.value if (e := getattr(row, measure)) else None for measure in UNREAD]
    return "–" if found == [None, None] else ", ".join("–" if v is None else f"{100 * v:.1f}" for v in found) + " %"


def cut_words(cut: str | None) -> str:
    """`video->emitters 4:8` in words: `video ↛ answer, 4–7`; nothing for no cut."""
    site, _, window = (cut or "").partition(" ")
    return f"{cut_name(site)}, {layers(*map(int, window.split(':')))}" if cut else ""


def _digits(value: float, digits: int, sign: str = "") -> str:
    """A rounded number with a true minus, and no minus before zero."""
    return f"{value:{sign}z.{digits}f}".replace("-", "−")


def counted(estimate: Estimate | None) -> str:
    """`600 (41)`: items and sources."""
    return f"{estimate.n} ({estimate.clusters})" if estimate else "–"


def layers(start: int, stop: int) -> str:
    """Layers [start, stop) in words, counted from 0: `2–4`, `7`."""
    return "none" if stop <= start else str(start) if stop == start + 1 else f"{start}–{stop - 1}"


def cut_name(site: str) -> str:
    """`video->emitters` in words: `video ↛ answer`."""
    source, _, target = site.partition("->")
    return f"{source} ↛ {target.replace('emitters', 'answer').replace('+', ' + ')}"


def best_cuts(effects: Iterable[CutEffect], condition: str = "counterfactual", question: str = "hear") -> list[CutEffect]:
    """Per site the cut with the most audio-following (cuts of audio: the least); where answers were only scored, by the change of log p."""
    best: dict[str, CutEffect] = {}
    for effect in effects:
        if (effect.condition, effect.question) == (condition, question) and _size(effect) is not None:
            other = best.get(effect.site)
            if other is None or (_size(effect) or 0.0) > (_size(other) or 0.0):
                best[effect.site] = effect
    return list(best.values())


def _size(effect: CutEffect) -> float | None:
    value = effect.audio.value if effect.audio else effect.delta_logprob.value
    return -value if value is not None and effect.site.startswith("audio") else value


def findings_tables(findings: Findings) -> list[Table]:
    """The findings on one screen or two: what of the clips was trained on, then one table per diagnostic that was run."""
    tables = _sentences("What was trained on", findings.trained_on())
    if findings.following:
        table = titled("What the answers name", "clips", "asked about", "the sound", "the picture", "other", *UNREAD.values(), "n (sources)")
        for f in findings.following:
            other = sum(e.value or 0.0 for e in (f.both, f.neither, f.nothing))
            measured = f.audio.value is not None
            shown = f"{100 * other:.1f} %" if measured else "–"
            asked = words(f.question, QUESTIONS)
            n = f"{counted(f.audio)}, {f.trained} left out" if f.trained else counted(f.audio)
            rest = (shown, _short(f.unparsed), _short(f.cut_off), n)
            table.add_row(words(f.condition, CONDITIONS), asked, percent(f.audio), percent(f.vision), *rest)
        table.caption = (
            "On factual clips sound and picture agree: an answer that names the event counts under “the sound”. Unparsed: names no known event and "
            "does not say that there is none. Cut off: ended at the token limit; such answers are in the other columns too. Left out: clips of the "
            "unseen split whose stream the train split has."
        )
        tables.append(table)
    if any(f.nothing.value is not None for f in abstention_rows(findings)):
        columns = "clips", "asked about", "right if it", "says nothing", "names an event", UNREAD_COLUMN, "n (sources)"
        table = titled("Says that there is nothing", *columns)
        for f in abstention_rows(findings):
            wanted = "abstains" if (f.condition, f.question) in MISSING else "does not"
            rates = (percent(f.nothing), share(f.invented), unread(f), counted(f.nothing))
            table.add_row(words(f.condition, CONDITIONS), words(f.question, QUESTIONS), wanted, *rates)
        table.caption = "Asked about a stream that is not there, an answer that names an event has made it up."
        tables.append(table)
    if findings.fidelity:
        tables.append(fidelity_table(findings.fidelity))
    if findings.reliance:
        table = titled(
            "Shortcut Index: how far the wrong stream decides (0 is ideal)", "asked about", "index", "sound moves", "picture moves", "grids"
        )
        for r in findings.reliance:
            effects = (effect(r.effect_audio), effect(r.effect_video))
            table.add_row(words(r.question, QUESTIONS), number(r.shortcut), *effects, counted(r.shortcut))
        null = [f"{_digits(r.shortcut_null, 2)} asked about {words(r.question, QUESTIONS)}" for r in findings.reliance if r.shortcut_null is not None]
        table.caption = "Sound / picture moves: change of the margin in nats a token when that stream alone is swapped." + (
            f" If the other stream did not matter, the index would stay below {', '.join(null)} in 95 % of cases." if null else ""
        )
        tables.append(table)
    if cuts := best_cuts(findings.knockout):
        headings = "cut", "layers", "the sound", "the picture", UNREAD_COLUMN, "log p"
        table = titled("Strongest cut per site (conflicts, asked about the sound)", *headings)
        for c in cuts:
            named = (percent(c.audio), share(c.vision.value if c.vision else None), unread(c))
            table.add_row(cut_name(c.site), layers(c.start, c.stop), *named, effect(c.delta_logprob))
        counts = " to ".join(sorted({counted(c.delta_logprob) for c in cuts}))
        table.caption = f"log p: change of the true sound's log-likelihood, nats a token. Strongest on these clips; n (sources): {counts}."
        tables.append(table)
    if findings.probes:
        table = titled(
            "Linear probes: what can be read from inside",
            *("label of", "read at", "layer", "accuracy", "control task", "shuffled", "best control", "selectivity"),
        )
        for p in findings.probes:
            if (layer := _peak(p.selectivity)) is not None:
                right, above = p.accuracy[layer], p.selectivity[layer]
                controls = [share(rates[layer] if rates else None) for rates in (p.control_task, p.shuffled)]
                controls.append(share(best_control(p, layer)))
                table.add_row(
                    words(p.label, STREAMS), words(p.position, POSITIONS), str(layer), percent(right), *controls, percent(above, signed=True)
                )
        table.caption = (
            "The layer of the highest selectivity; 0 is the embeddings. Control task: a random label for each source, the same in all its clips; "
            "shuffled: labels shuffled clip by clip, which is chance. Best control: the highest of all, without sound and with random weights too. "
            "Selectivity: points above it."
        )
        tables.append(table)
    if findings.lens:
        table = titled("Lenses: true event words among the top k", "lens", "words for", "read at", "k", "best layer", "hit rate", "above shuffled")
        for n in [*findings.lens, *(findings.tuned.lens if findings.tuned else ())]:
            if (layer := _peak(n.corrected)) is not None:
                gained = percent(n.corrected[layer], signed=True)
                table.add_row(n.lens, words(n.label, STREAMS), words(n.position, POSITIONS), str(n.k), str(layer), percent(n.hit[layer]), gained)
        if findings.latent:
            table.caption = f"Latent audio understanding: {latent_text(findings.latent)}; {percent(findings.latent.said)} said aloud."
            if findings.tuned:
                table.caption += f" By the tuned lens: {latent_text(findings.tuned.latent)}."
        tables.append(table)
    if findings.shift:
        table = titled("Answers against the base without audio", "tokens", "clips", "its first choice", "2nd or 3rd", "beyond", "KL, nats", "n")
        for s in findings.shift:
            cells = (
                percent(s.unshifted),
                _short(s.marginal),
                _short(s.shifted),
                "–" if s.kl.value is None else f"{s.kl.value:.2f}",
                str(s.unshifted.n),
            )
            table.add_row(words(s.tokens, TOKENS), words(s.condition, CONDITIONS), *cells)
        tables.append(table)
    if findings.language:
        table = titled("Plain text, without picture and sound", "", "", "n")
        for label, show, estimate, of in language_numbers(findings.language):
            table.add_row(label, show(estimate), of)
        tables.append(table)
    return tables + _sentences("Left out", findings.left_out)


def _sentences(title: str, sentences: Sequence[str]) -> list[Table]:
    """A table of sentences; none where there are none."""
    if not sentences:
        return []
    table = titled(title, "")
    table.show_header = False
    for sentence in sentences:
        table.add_row(sentence)
    return [table]


def language_numbers(language: Language) -> list[tuple[str, Callable[[Estimate], str], Estimate, str]]:
    """The numbers of plain text: what it is, how it is shown, the number, and what it is over."""
    text, right = language.perplexity, language.right
    return [
        ("perplexity", number, text, f"{text.n} tokens in {text.clusters} passages"),
        ("simple questions answered right", percent, right, f"{right.n} questions"),
        ("their answers cut off", percent, language.cut_off, f"{language.cut_off.n} questions"),
    ]


def abstention_rows(findings: Findings) -> list[Following]:
    """The rows where abstention is right, then those where it is wrong."""
    return [row for condition, question in ABSTENTION if (row := findings.following_rate(condition, question))]


def fidelity_table(rows: Iterable[CaptionFidelity]) -> Table:
    """What captions get right, per judge, condition, question and cut."""
    columns = "judge", "clips", "asked about", "cut", "sound", "picture", "makes up", *UNREAD.values(), "n (sources)"
    table = titled("Caption fidelity (1 is ideal)", *columns)
    for row in rows:
        scores = (number(row.audio), number(row.video), *map(_short, (row.invented, row.unparsed, row.cut_off)), counted(row.unparsed))
        table.add_row(row.judge, words(row.condition, CONDITIONS), words(row.question, QUESTIONS), cut_words(row.cut), *scores)
    table.caption = "Makes up: share of captions with an event that the clip does not have. Unparsed captions are in no mean."
    return table


def agreement_table(rows: Iterable[Agreement]) -> Table:
    """How alike judges rank the same captions."""
    table = titled("Agreement of judges (Spearman's rank correlation)", "judges", "side", "rho", "captions")
    for row in rows:
        rho = "–" if row.rho is None else _digits(row.rho, 2)
        table.add_row(f"{row.first}, {row.second}", STREAMS["audio" if row.side == "audio" else "visual"], rho, str(row.n))
    return table


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Before against after: what answers name (with the paired difference), the Shortcut Index, and the strongest changes of the rest."""
    tables = _sentences("What was trained on", comparison.trained_on)
    changes = [c for c in comparison.changes if c.section == "following" and c.measure in ("audio", "vision")]
    if changes:
        columns = "clips", "asked about", "names the", "before", "after", "points", UNREAD_COLUMN, "n"
        table = titled("What the answers name, before and after", *columns)
        for c in changes:
            named = "event" if c.condition in ("factual", "unseen_factual") else "sound" if c.measure == "audio" else "picture"
            if named == "event" and c.measure == "vision":
                continue  # where sound and picture agree there is nothing else to name
            if (c.condition, {"audio": "hear", "vision": "see"}[c.measure]) in MISSING:
                continue  # the stream is not there
            rates = (_short(c.before), _short(c.after), percent(c.difference, signed=True), _unread_change(comparison, c))
            table.add_row(words(c.condition, CONDITIONS), words(c.question, QUESTIONS), named, *rates, str((c.difference or c.after).n))
        table.caption = (
            "Points: the paired difference, the same clip under the same question. Its 95 % interval is clustered by source. Unparsed, cut off: "
            "shares in %, before → after."
        )
        tables.append(table)
    nothing = [change for pair in ABSTENTION if (change := comparison.find("following", "nothing", *pair)) and change.after.value is not None]
    if nothing:
        table = titled(
            "Says that there is nothing, before and after",
            *("clips", "asked about", "right if it", "before", "after", "points", UNREAD_COLUMN, "n"),
        )
        for c in nothing:
            wanted = "abstains" if (c.condition, c.question) in MISSING else "does not"
            rates = (_short(c.before), _short(c.after), percent(c.difference, signed=True), _unread_change(comparison, c))
            table.add_row(words(c.condition, CONDITIONS), words(c.question, QUESTIONS), wanted, *rates, str((c.difference or c.after).n))
        tables.append(table)
    text, right = (comparison.find("language", measure) for measure in ("perplexity", "right"))
    if text and right:
        table = titled("Plain text, before and after", "", "before", "after", "change", "n")
        table.add_row("perplexity", number(text.before), number(text.after), relative(text.difference), f"{text.after.n} tokens")
        changed = percent(right.difference, signed=True) + (" points" if right.difference else "")
        table.add_row("questions answered right", _short(right.before), _short(right.after), changed, str(right.after.n))
        if cut := comparison.find("language", "cut_off"):
            changed = percent(cut.difference, signed=True) + (" points" if cut.difference else "")
            table.add_row("their answers cut off", _short(cut.before), _short(cut.after), changed, str(cut.after.n))
        table.caption = "Perplexity: change as a share of before, passage by passage. Questions: points, question by question."
        tables.append(table)
    for section, title, show, measures in _SECTIONS:
        rows = [c for c in comparison.changes if c.section == section and c.measure in measures]
        if section == "knockout":
            rows = [c for c in rows if (c.condition, c.question) == ("counterfactual", "hear")]
        strongest: dict[tuple, Change] = {}
        for c in rows:
            key = (_STEM.sub("", c.item), c.condition, c.question, c.measure)
            if key not in strongest or abs(c.before.value or 0.0) > abs(strongest[key].before.value or 0.0):
                strongest[key] = c
        if strongest:
            table = titled(title, "row", "before", "after", "n (sources)")
            for c in strongest.values():
                about = f"asked about {QUESTIONS[c.question]}" if section == "reliance" and c.question else ""
                item = _CUT.sub(lambda m: f"{cut_name(m[1])}, layers {layers(int(m[2]), int(m[3]))}", c.item)
                clips = "" if section == "knockout" else words(c.condition, CONDITIONS)
                where = ", ".join(part for part in (words(item, TOKENS), clips, about) if part)
                table.add_row(
                    where or {"latent": "understood inside", "said": "said aloud"}[c.measure], show(c.before), show(c.after), counted(c.after)
                )
            if len(strongest) < len(rows):
                table.caption = f"Of {len(rows)} layers or windows, the one with the largest number before, per row. All are in the comparison file."
            tables.append(table)
    return tables + _sentences("Left out", comparison.left_out)


def _unread_change(comparison: Comparison, row: Change) -> str:
    """Both shares of UNREAD among the answers that a rate is of, before and after: `unparsed 10.0 → 0.0`. "none" where all of them are 0."""
    found = {what: comparison.find("following", measure, row.condition, row.question) for measure, what in UNREAD.items()}
    ends = {what: (c.before.value, c.after.value) for what, c in found.items() if c}
    shown = [f"{what} {' → '.join('–' if v is None else f'{100 * v:.1f}' for v in values)}" for what, values in ends.items() if values != (0.0, 0.0)]
    return ", ".join(shown) or ("none" if len(ends) == len(UNREAD) else "–")


_STEM = re.compile(r" \[\d+, \d+\) \w+$|, layer \d+$")  # "video->audio [2, 5) window" -> "video->audio"

_CUT = re.compile(r"(\S+->\S+) \[(\d+), (\d+)\) \w+$")


def _gain(estimate: Estimate) -> str:
    return number(estimate, signed=True)


_SECTIONS: list[tuple[str, str, Callable[[Estimate], str], tuple[str, ...]]] = [
    ("reliance", "Shortcut Index (0 is ideal)", number, ("shortcut",)),
    ("knockout", "What a cut changes on conflicts: log p of the true sound, nats a token", _gain, ("delta_logprob",)),
    ("probe", "Probes: accuracy", percent, ("accuracy",)),
    ("latent", "Latent audio understanding", percent, ("latent", "said")),
    ("shift", "Token shift: share that is the base's first choice", percent, ("unshifted",)),
]


def best_control(probe: Probe, layer: int) -> float | None:
    """Accuracy of the control that selectivity is measured against: accuracy - selectivity."""
    right, above = probe.accuracy[layer].value, probe.selectivity[layer].value
    return None if right is None or above is None else right - above


def _peak(values: Sequence[Estimate]) -> int | None:
    known = [(e.value, layer) for layer, e in enumerate(values) if e.value is not None]
    return max(known, key=lambda pair: pair[0])[1] if known else None


def _short(estimate: Estimate) -> str:
    return share(estimate.value)


def share(value: float | None) -> str:
    """A share without interval: `64.2 %`."""
    return "–" if value is None else f"{100 * value:.1f} %"


def titled(title: str, *headers: str) -> Table:
    """An empty table in the style of all of them."""
    table = Table(
        title=title,
        box=SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
        collapse_padding=True,
        title_style="bold",
        header_style="dim",
        caption_style="dim italic",
    )
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
