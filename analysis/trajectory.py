"""Every scalar of a diagnosis under a stable name: what trackers log per checkpoint, and what the page draws over training.

    from analysis.trajectory import headline, panel
    for name, estimate in headline(findings).items():
        tracker.log({name: estimate.value}, step)
    panel("following/counterfactual/hear/audio").title      # the chart that the number belongs to

Names say diagnostic/condition/question/measure as far as they apply: `reliance/hear/shortcut`, `captions/counterfactual/both/audio`, `latent/logit`.
Only what was measured is there: names come and go with the settings of a diagnosis, but a name always means the same number. Where a layer or cut
is the best one, it is best on these same clips, so the number flatters a little. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from analysis.findings import Estimate, Findings

MUTED = ("muted", "near_silent", "video_only")  # conditions in which there is nothing to hear
BLANKED = ("blanked", "near_black", "audio_only")  # and nothing to see


class Panel(NamedTuple):
    """The small chart that a number is drawn in, and its line there."""

    title: str
    line: str
    tone: str  # of templates/chart.css
    rate: bool = True  # a share of 0 to 1, shown in percent


def headline(findings: Findings) -> dict[str, Estimate]:
    """Every scalar that was measured, in the order in which a page shows them."""
    found: dict[str, Estimate | None] = {}
    for row in findings.following:
        at = f"{row.condition}/{row.question}"
        conflict = row.condition.endswith("counterfactual")
        asked_what_is_there = (row.condition, row.question) not in [*((c, "hear") for c in MUTED), *((c, "see") for c in BLANKED)]
        for measure in ("audio", "vision") if conflict else ("correct",) if asked_what_is_there else ():
            found[f"following/{at}/{measure}"] = getattr(row, measure)
        found[f"abstention/{at}"] = row.nothing
        found |= {f"unparsed/{at}": row.unparsed, f"cut_off/{at}": row.cut_off}
    for r in findings.reliance:
        for measure in ("shortcut", "effect_audio", "effect_video"):
            found[f"reliance/{r.question}/{measure}"] = getattr(r, measure)
    judge = next((row.judge for row in findings.fidelity), None)
    for c in findings.fidelity:
        if c.judge == judge and c.cut is None:
            for measure in ("audio", "video", "invented", "unparsed", "cut_off"):
                found[f"captions/{c.condition}/{c.question}/{measure}"] = getattr(c, measure)
    if findings.latent:
        found |= {"latent/logit": findings.latent.latent, "latent/said": findings.latent.said}
        if findings.latent.end:
            found["latent/end"] = findings.latent.end.rate
    if findings.tuned:
        found["latent/tuned"] = findings.tuned.latent.latent
    for p in findings.probes:
        layers = [k for k, s in enumerate(p.selectivity) if s.value is not None]
        if layers:
            found[f"probes/{p.label}/{p.position}"] = p.accuracy[max(layers, key=lambda k: p.selectivity[k].value or 0.0)]
    for flow in findings.flow:
        if (flow.target, flow.variant) == ("emitters", "no_sink"):
            for kind in ("audio", "video"):
                if kind in flow.mass:
                    found[f"attention/{flow.condition}/{kind}"] = _over_layers(flow.mass[kind])
    for s in findings.shift:
        found[f"shift/{s.condition}/{s.tokens}/unshifted"] = s.unshifted
    if findings.language:
        found |= {f"language/{measure}": getattr(findings.language, measure) for measure in ("perplexity", "right", "cut_off")}
    for question, source, measure in (("hear", "video->", "audio"), ("see", "audio->", "vision")):
        cuts = [c for c in findings.knockout if (c.condition, c.question) == ("counterfactual", question) and c.site.startswith(source)]
        found[f"knockout/{question}/named"] = _largest(getattr(c, measure) for c in cuts)
        found[f"knockout/{question}/logprob"] = _largest(c.delta_logprob for c in cuts)
    return {name: e for name, e in found.items() if e is not None and e.value is not None}


def panel(name: str) -> Panel:
    """Where a number of `headline` is drawn. Raises ValueError for a name that is none of its names."""
    kind, *rest = name.split("/")
    match kind, rest:
        case "following", [condition, question, measure] if measure in ("audio", "vision"):
            line = "names the sound" if measure == "audio" else "names the picture"
            return Panel(f"{_capital(_clips(condition))}, asked what it {question}s", line, measure)
        case "following", ["audio_only" | "video_only", question, _]:
            return Panel(
                "One stream alone", "right about the sound alone" if question == "hear" else "right about the picture alone", _tone(question)
            )
        case "following", [condition, question, _]:
            return Panel(_capital(_clips(condition)), f"right about {_stream(question)}", _tone(question))
        case "abstention", [condition, question]:
            return Panel(f"Says that there is nothing, {_clips(condition)}", f"nothing to {question}", _tone(question))
        case "unparsed" | "cut_off", [condition, question]:
            what = "name nothing known" if kind == "unparsed" else "end at the token limit"
            return Panel(f"Answers that {what}, {_clips(condition)}", f"asked what it {question}s", _tone(question))
        case "reliance", [question, "shortcut"]:
            return Panel("Shortcut Index (0 is ideal)", f"asked what it {question}s", _tone(question), rate=False)
        case "reliance", [question, measure]:
            stream = measure.removeprefix("effect_")
            line = f"swapping the {'sound' if stream == 'audio' else 'picture'}"
            return Panel(f"What moves the margin, nats, asked what it {question}s", line, "audio" if stream == "audio" else "vision", rate=False)
        case "captions", [condition, question, "invented"]:
            line = "asked about both" if question == "both" else f"asked about {_stream(question)}"
            return Panel(f"Captions that make something up, {_clips(condition)}", line, _tone(question))
        case "captions", [condition, question, "unparsed" | "cut_off" as measure]:
            line = "asked about both" if question == "both" else f"asked about {_stream(question)}"
            what = "name nothing known" if measure == "unparsed" else "end at the token limit"
            return Panel(f"Captions that {what}, {_clips(condition)}", line, _tone(question))
        case "captions", [condition, question, side]:
            about = "asked about both" if question == "both" else "asked about one"
            return Panel(
                f"Captions of {_clips(condition)}, {about}",
                "sound side" if side == "audio" else "picture side",
                "audio" if side == "audio" else "vision",
            )
        case "latent", [lens]:
            line, tone = {
                "logit": ("logit lens", "near"),
                "end": ("logit lens, end-of-audio token", "far"),
                "tuned": ("tuned lens", "base"),
                "said": ("said aloud", "audio"),
            }[lens]
            return Panel("Latent audio understanding", line, tone)
        case "probes", [label, position]:
            at = {"audio": "audio tokens", "audio_end": "end-of-audio token", "last_prompt": "last prompt token"}.get(position, position)
            return Panel(f"Best probe at the {at}", "the sound" if label == "audio" else "the picture", "audio" if label == "audio" else "vision")
        case "attention", [condition, stream]:
            line = "to audio tokens" if stream == "audio" else "to video tokens"
            return Panel(f"Attention of the answer, {_clips(condition)}", line, "audio" if stream == "audio" else "vision")
        case "shift", [condition, tokens, _]:
            tones = {"all": "neither", "audio_event": "audio", "visual": "vision", "rest": "unparsed", "first_event": "both"}
            return Panel(f"First choice of the base too, {_clips(condition)}", tokens.replace("_", " "), tones.get(tokens, "control"))
        case "language", ["perplexity"]:
            return Panel("Perplexity of plain text", "without picture and sound", "neither", rate=False)
        case "language", [measure]:
            return Panel("Plain-text questions", *(("answered right", "neither") if measure == "right" else ("end at the token limit", "unparsed")))
        case "knockout", [question, "named"]:
            line = f"names {_stream(question)}, {'video' if question == 'hear' else 'audio'} cut"
            return Panel("Under the best cut, conflicts", line, _tone(question))
        case "knockout", [question, _]:
            line = f"log p of {_stream(question)}, {'video' if question == 'hear' else 'audio'} cut"
            return Panel("What the best cut adds, nats a token", line, _tone(question), rate=False)
    raise ValueError(f"{name!r} is no name that analysis.trajectory.headline gives.")


def unread(name: str) -> bool:
    """Whether a name is that of a share of answers that were not read or were cut off."""
    kind, *rest = name.split("/")
    return kind in ("unparsed", "cut_off") or (kind == "captions" and rest[-1] in ("unparsed", "cut_off"))


def _over_layers(layers: list[Estimate]) -> Estimate | None:
    """Mean over layers. Its bounds are the means of the layers' bounds: too wide, as if all layers erred together."""
    if not layers or any(e.value is None for e in layers):
        return None
    value, low, high = (
        None if any(v is None for v in column) else sum(column) / len(layers)
        for column in zip(*((e.value, e.low, e.high) for e in layers), strict=True)
    )
    return Estimate(value, low, high, min(e.n for e in layers), min(e.clusters for e in layers))


def _largest(estimates: Iterable[Estimate | None]) -> Estimate | None:
    known = [e for e in estimates if e is not None and e.value is not None]
    return max(known, key=lambda e: e.value or 0.0, default=None)


def _clips(condition: str) -> str:
    names = {"counterfactual": "conflicts", "factual": "factual clips", "audio_only": "sound alone", "video_only": "picture alone"}
    names |= {"unseen_counterfactual": "conflicts of unseen sources", "unseen_factual": "factual clips of unseen sources"}
    return names.get(condition, condition.replace("_", " "))


def _stream(question: str) -> str:
    return "the sound" if question == "hear" else "the picture"


def _tone(question: str) -> str:
    return {"hear": "audio", "see": "vision"}.get(question, "both")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
