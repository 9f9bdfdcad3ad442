"""What the page says about depth: cuts, probes, both lenses, attention flow and token shift.

    knockout_groups([("before", before), ("after", after)])    # a figure per site, in groups of one stream and one kind of cut
    lens_figures([("now", findings)])                          # a figure per position

Every function takes the first and the last findings (or the only ones), the first drawn dashed, and gives an empty list or None where nothing was
measured. Panels that are to be compared share their axis.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.charts import RATES, Series, columns, lines, span, stacked_rows
from analysis.report_parts import Figure, Group, Named, capital, line_figure, rate_of
from analysis.tables import (
    CONDITIONS,
    POSITIONS,
    STREAMS,
    TOKENS,
    UNREAD,
    best_control,
    counted,
    cut_name,
    effect,
    latent_text,
    layers,
    number,
    percent,
    share,
    words,
)

STREAM_TONES = {"audio": "audio", "visual": "vision"}
VARIANTS = {"plain": "all mass", "no_sink": "without the first token", "value_norm": "weighted by value norm"}


def knockout_groups(ends: list[Named]) -> list[Group]:
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
                panels = [p for site in sites if (p := cut_panel(ends, site, family, condition, question, span(gains)))]
                if panels:
                    title = f"{capital(source)} cut {when}: {words(condition, CONDITIONS)}, asked what it {question}s"
                    groups.append(Group(title, panels, folded=place > 0 or (source == "audio") == (question == "hear")))
    return groups


def cut_panel(
    ends: list[Named], site: str, family: str, condition: str, question: str, gain_ticks: Sequence[float], size: tuple[float, float] = (262, 175)
) -> Figure | None:
    """One site against the first layer cut: following rates ("none" is the uncut model), below them the change of log p of the designated label."""
    starts: dict[int, str] = {}
    followed, gained = [], []
    unread: dict[str, list[float]] = {}
    for k, (name, findings) in enumerate(ends):
        key, dashed = (site, family, condition, question), len(ends) > 1 and k == 0
        cuts = sorted((c for c in findings.knockout if (c.site, c.family, c.condition, c.question) == key), key=lambda c: c.start)
        starts |= {c.start: layers(c.start, c.stop) if family != "from" else str(c.start) for c in cuts}
        for measure, tone, label in (("audio", "audio", "names the sound"), ("vision", "vision", "names the picture")):
            points = [(float(c.start), e) for c in cuts if (e := getattr(c, measure)) is not None and e.value is not None]
            if points and (condition.endswith("counterfactual") or tone == "audio"):  # on factual clips there is one event to name
                followed.append(Series(f"{label}, {name}", tone, points, dashed, apart=rate_of(findings, condition, question, measure)))
        for measure, what in UNREAD.items():
            unread.setdefault(what, []).extend(e.value for c in cuts if (e := getattr(c, measure)) is not None and e.value is not None)
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
        tables.append(line_figure("", [], followed, [*ticks, none], percent))
    if gained:
        what = f"log p of the true {'sound' if question == 'hear' else 'picture'}"
        shared = [*ticks, (none[0], "")] if followed else ticks  # so that both charts share their x axis
        drawing = lines(gained, shared, gain_ticks, f"{cut_name(site)}, {what}", x_title, as_percent=False, width=width, height=height - 35)
        drawings.append((f"Δ {what}, nats a token", drawing))
        tables.append(line_figure("", [], gained, ticks, effect))
    if not tables:
        return None
    rows = [
        sum((t.rows[k][1:] if k < len(t.rows) else ["–"] * (len(t.header) - 1) for t in tables), [tables[0].rows[k][0]])
        for k in range(len(tables[0].rows))
    ]
    most = ", ".join(f"{what} {share(max(shares))}" for what, shares in unread.items() if shares)
    note = " ".join(part for part in (tables[-1].note, f"Answers under these cuts, at most: {most}." if most else "") if part)
    return Figure(cut_name(site), drawings, sum((t.header[1:] for t in tables), [""]), rows, note)


def probe_figures(ends: list[Named]) -> list[Figure]:
    """Per position: accuracy for the sound and the picture over layers; the grey band spans the controls of the last findings, the two of labels and
    the best of all, which selectivity is measured against, have columns of their own.
    """
    figures = []
    for position in dict.fromkeys(p.position for _, f in ends for p in f.probes):
        series, controls, beside, folds = [], [], dict[str, list[float | None]](), ""
        for k, (name, findings) in enumerate(ends):
            for p in findings.probes:
                if p.position == position:
                    points = [(float(layer), e) for layer, e in enumerate(p.accuracy)]
                    label = f"{words(p.label, STREAMS)}, {name}" if len(ends) > 1 else words(p.label, STREAMS)
                    series.append(Series(label, STREAM_TONES.get(p.label, "neither"), points, dashed=len(ends) > 1 and k == 0))
                    folds = p.folds
                    if k == len(ends) - 1:
                        controls += [c for c in (p.shuffled, p.control_task, p.audio_removed, p.random_weights) if c]
                        labels = (("control task", p.control_task), ("shuffled", p.shuffled))
                        beside |= {f"{what}, {words(p.label, STREAMS)}": [*c] for what, c in labels if c}
                        beside[f"best control, {words(p.label, STREAMS)}"] = [best_control(p, layer) for layer in range(len(p.accuracy))]
        figure = _layer_figure(f"Read at the {words(position, POSITIONS)}", series, controls, RATES, f"Folds: {folds}." if folds else "")
        figure.header += beside
        for layer, row in enumerate(figure.rows):
            row += [share(rates[layer]) for rates in beside.values()]
        figures.append(figure)
    return figures


def lens_figures(ends: list[Named], tuned: bool = False) -> list[Figure]:
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


def tuned_group(ends: list[Named]) -> Group | None:
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
    figures = [line_figure(title, [("", drawing)], series, ticks, number, note), *lens_figures(ends, tuned=True)]
    return Group("The same through a tuned lens: an affine map a layer, fitted to the final output", figures, folded=True)


def _layer_figure(title: str, series: list[Series], controls: list[list[float]], y_ticks: Sequence[float], note: str = "") -> Figure:
    count = max((len(s.points) for s in series), default=0)
    ticks = [(float(layer), str(layer)) for layer in range(count)]
    band = [(float(k), min(v), max(v)) for k in range(count) if (v := [c[k] for c in controls if k < len(c)])]
    figure = line_figure(title, [("", lines(series, ticks, y_ticks, title, "layer", grey_band=band))], series, ticks, percent, note)
    if band:
        figure.header.append("controls")
        for row, (_, low, high) in zip(figure.rows, band, strict=False):
            row.append(f"{100 * low:.1f}–{100 * high:.1f} %")
    return figure


def latent_sentences(ends: list[Named]) -> list[str]:
    """What is understood inside, by both lenses, and what is said aloud."""
    sentences = []
    for name, f in ends:
        if f.latent:
            tuned = f" By the tuned lens: {latent_text(f.tuned.latent)}." if f.tuned else ""
            sentences.append(
                f"{capital(name)}: the true sound can be read inside, above shuffled references, in {latent_text(f.latent)}; "
                f"it is said aloud in {percent(f.latent.said)}.{tuned}"
            )
    return sentences


def flow_groups(ends: list[Named]) -> list[Group]:
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


def shift_groups(ends: list[Named]) -> list[Group]:
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
