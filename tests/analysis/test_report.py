"""The page: it shows the numbers, plays the clips, escapes what models say, and loads nothing."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from rich.console import Console

from analysis.charts import RATES, Series, columns, lines, span, tick_steps
from analysis.compare import compare
from analysis.findings import (
    CutEffect,
    Effect,
    Estimate,
    Findings,
    Flow,
    Following,
    Latent,
    Lens,
    Probe,
    Readout,
    Reliance,
    Sample,
    Shift,
    Sources,
)
from analysis.items import ItemStore, Key
from analysis.report import headline, headline_figure, write_report
from analysis.tables import comparison_tables, findings_tables

LAYERS = 4
NASTY = '<script>alert("x")</script> & <img src=http://evil.example/x.png>'


def e(value, n=600, k=41):
    return Estimate(value, max(value - 0.04, 0.0), min(value + 0.04, 1.0), n, k)


def findings(audio, vision, split="test", adapter=None, answer="I hear a dog."):
    curve = [e(0.1 + 0.15 * k) for k in range(LAYERS + 1)]
    flat = [0.05] * (LAYERS + 1)
    above = [Effect(0.1, 0.05, 0.15, 600, 41, 0.001, 0.004, 0.5)] * (LAYERS + 1)

    def follow(condition, question, a, v):
        return Following(condition, question, e(a), e(v), e(0.0), e(1 - a - v), e(0.0), e(0.0), e(v if question == "see" and v else a))

    def cut(site, start, stop, family, condition):
        return CutEffect(site, start, stop, family, condition, "hear", e(0.3), None, e(0.777), e(0.111))

    samples = []
    for i in range(30):
        condition = "counterfactual" if i < 20 else "factual"
        file = "media/real.mp4" if i % 3 else ("media/missing.mp4" if i else "../outside.mp4")
        for modality in ("hear", "see"):
            clip = Sample(
                f"{condition}_{i:02d}", file, condition, "a dog", "a bell", f"What do you {modality}?", modality, answer, "vision", "d", "b"
            )
            samples.append(clip)
    return Findings(
        "models/organism", adapter, "models/base", split, "abc123hash", LAYERS, {"dtype": "float32", "versions": {"torch": "9.9.9"}, "seed": 0},
        following=[follow("counterfactual", "hear", audio, vision), follow("counterfactual", "see", 0.2, 0.6), follow("factual", "hear", 0.985, 0.0)],
        reliance=[Reliance("hear", e(0.9), e(0.8), e(0.834))],
        knockout=[cut(f"{s}->emitters", k, LAYERS, "from", c) for s in ("video", "audio") for k in range(4) for c in ("factual", "counterfactual")]
        + [cut("video->question", k, k + 2, "window", "counterfactual") for k in range(3)]
        + [cut("video->audio", 0, LAYERS, "all", "counterfactual")],
        flow=[Flow(t, v, "counterfactual", {k: [e(0.25)] * LAYERS for k in ("system", "video", "audio", "question")})
              for t in ("emitters", "question") for v in ("plain", "no_sink")],
        probes=[Probe("last_prompt", "audio", curve, flat, flat, flat, above, "folds by pair", [0.625] * len(flat)),
                Probe("last_prompt", "visual", curve, flat, None, flat, above, "folds by pair", [0.375] * len(flat))],
        lens=[Lens("audio", "audio", 5, curve, flat, above)],
        latent=Latent(3, e(0.41), e(audio), 5, "any row", Readout(2, e(0.33)), Readout(1, e(0.77)), Readout(4, e(0.71))),
        shift=[Shift("first_event", "counterfactual", e(0.66), e(0.2), e(0.14), e(0.9))],
        samples=samples,
        left_out=["No LLM judge was asked."],
    )  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A clip folder with one real mp4: H.264 and AAC, half a second."""
    root = tmp_path_factory.mktemp("clips")
    (root / "media").mkdir()
    with av.open(root / "media" / "real.mp4", "w") as container:
        video, audio = container.add_stream("libx264", rate=4), container.add_stream("aac", rate=16000)
        video.width = video.height = 64
        video.pix_fmt, audio.layout = "yuv420p", "mono"
        for k in range(2):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 90 + 60 * k, np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(np.sin(np.arange(8000) * 0.2).astype(np.float32)[None], format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(audio.encode(sound))
        container.mux(audio.encode())
    (root.parent / "outside.mp4").write_bytes(b"not for the page")
    return root


class Page(HTMLParser):
    """Tags with their attributes, and the text without scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag) :]

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += " " + data


@pytest.fixture(scope="module")
def written(clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    before, after = findings(0.123, 0.642), findings(0.971, 0.008, adapter="runs/x", answer=NASTY)
    middle = findings(0.5, 0.3, split="selection")
    plan = {
        "teacher_cut": {"site": "video->emitters", "start": 2, "stop": 4, "because": "it lifts audio-following <to> 77.7 %"},
        "lora": {"layers": {"value": [2, 3], "because": "the window"}, "r": 8},
        "steps": 150,
    }
    write_report(path, [("before", before), ("step 50", middle), ("after", after)], clips, plan, compare(before, after))
    return path


def test_the_page_states_the_numbers_with_interval_and_n(written):
    text = " ".join(Page(written.read_text(encoding="utf-8")).text.split())
    assert "names what it sees in 64.2 % of its answers and what it hears in 12.3 % ." in text
    assert "After: what it sees in 0.8 % , what it hears in 97.1 % ." in text
    for number in ("97.1 %", "93.1–100.0", "n = 600 (41)", "0.83", "98.5 %", "77.7 %", "41.0 %", "66.0 %"):
        assert number in text, number
    assert "abc123hash" in text and "9.9.9" in text and "No LLM judge was asked." in text
    assert "video ↛ answer, layers 2–3" in text and "it lifts audio-following <to> 77.7 %" in text
    assert "step 50 (selection)" in text


def test_a_plan_of_training_is_shown_in_words(clips, tmp_path):
    def choice(value):
        return {"value": value, "because": "Measured.", "overridden": False}

    plan = {"teacher_cut": choice("video->emitters 1:3"), "fusion_window": choice([0, 3]), "mirror_cut": choice(None), "class_weights": choice({})}
    plan |= {
        "weights": choice({f"class {k}": 0.5 + k / 10 for k in range(9)}),
        "lora_targets": [f"model.layers.{k}.self_attn.q_proj" for k in range(9)],
    }
    write_report(tmp_path / "r.html", [("now", findings(0.1, 0.6))], clips, plan)
    text = " ".join(Page((tmp_path / "r.html").read_text(encoding="utf-8")).text.split())
    for row in (
        "teacher cut video ↛ answer, layers 1–2 Measured.",
        "fusion window layers 0–2",
        "mirror cut none",
        "class weights none",
        "0.5 to 1.3 over 9",
    ):
        assert row in text, row
    assert "… (9 in all)" in text


def test_clips_are_embedded_whole_and_problems_are_named(written, clips):
    page = Page(written.read_text(encoding="utf-8"))
    videos = [attrs for tag, attrs in page.tags if tag == "video"]
    cards = [attrs for tag, attrs in page.tags if tag == "article"]
    assert len(cards) == 12 and 0 < len(videos) < 12
    for video in videos:
        head, _, data = video["src"].partition(",")
        assert head == "data:video/mp4;base64" and "controls" in video and video["aria-label"]
        assert base64.b64decode(data) == (clips / "media" / "real.mp4").read_bytes()
    assert "media/missing.mp4 is not in the clip folder" in page.text


def test_nothing_outside_the_clip_folder_is_read(clips, tmp_path):
    write_report(tmp_path / "r.html", [("now", findings(0.1, 0.6))], clips, max_clips=100)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "outside.mp4 lies outside the clip folder" in html
    assert base64.b64encode(b"not for the page").decode() not in html


def test_large_clips_are_named_instead(clips, tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.report.LARGEST_CLIP", 10)
    write_report(tmp_path / "r.html", [("now", findings(0.1, 0.6))], clips)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "is too large to embed" in html and "<video" not in html


def test_what_models_say_is_escaped(written):
    html = written.read_text(encoding="utf-8")
    page = Page(html)
    assert html.count("<script") == 1 and "alert(" in page.text
    assert not any(tag == "img" for tag, _ in page.tags)


def test_nothing_is_loaded(written):
    html = written.read_text(encoding="utf-8")
    page = Page(html)
    for tag, attrs in page.tags:
        for name in ("src", "href", "poster", "srcset", "action", "data"):
            assert (attrs.get(name) or "data:").startswith(("data:", "#")), (tag, name)
        assert tag not in ("iframe", "object", "embed", "base")
    styles = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    assert "url(" not in styles and "@import" not in styles
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_charts_can_be_read_aloud(written):
    charts = [attrs for tag, attrs in Page(written.read_text(encoding="utf-8")).tags if tag == "svg"]
    assert len(charts) > 8
    assert all(c["role"] == "img" and len(c["aria-label"]) > 20 for c in charts)


def test_what_is_read_at_the_end_of_the_sound_and_by_memory_stands_beside_it(clips, tmp_path):
    """In the terminal and on the page: sound's rows and delimiter, both halves, k and pooling; the control task by its name, beside the shuffle."""
    found = findings(0.1, 0.6)
    write_report(tmp_path / "r.html", [("now", found)], clips)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*findings_tables(found))
    for shown in (console.export_text(), re.sub(r"<[^>]+>", " ", (tmp_path / "r.html").read_text(encoding="utf-8"))):
        shown = " ".join(shown.split())
        assert "41.0 %" in shown and re.search(r"at the audio tokens \(top 5, any row, layer 3, n = \d+; halves exchanged: 33.0 %, layer 2\)", shown)
        assert re.search(
            r"77.0 %[^%]*%?[^%]* at the end-of-audio token \(top 5, any row, layer 1, n = \d+; halves exchanged: 71.0 %, layer 4\)", shown
        )
        assert "62.5 %" in shown and "37.5 %" in shown and "control task" in shown and "shuffled" in shown


def test_the_page_is_whole_and_the_same_every_time(written, clips, tmp_path):
    assert [p.name for p in written.parent.iterdir()] == ["report.html"]
    one = [("now", findings(0.1, 0.6))]
    write_report(tmp_path / "a.html", one, clips)
    write_report(tmp_path / "b.html", one, clips)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    ids = [attrs["id"] for _, attrs in Page(written.read_text(encoding="utf-8")).tags if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("part", ["following", "reliance", "knockout", "flow", "probes", "lens", "shift", "samples"])
def test_a_diagnostic_that_was_not_run_leaves_its_section_out(part, clips, tmp_path):
    partly = findings(0.1, 0.6)
    setattr(partly, part, [])
    write_report(tmp_path / "r.html", [("now", partly)], clips)
    section = {"following": "answers", "knockout": "cuts", "samples": "clips"}.get(part, part)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    if part != "lens":  # latent understanding has a line of its own there
        assert f'<section id="{section}"' not in page
    assert set(re.findall(r'href="#(\w+)"', page)) == set(re.findall(r'<section id="(\w+)"', page))


def test_empty_findings_and_unmeasured_numbers(clips, tmp_path):
    empty = Findings("m", None, None, "test", "h", 1, {})
    write_report(tmp_path / "r.html", [("before", empty), ("after", empty)], clips)
    assert "cannot say whether the model listens" in (tmp_path / "r.html").read_text(encoding="utf-8")
    nothing = Estimate(None, None, None, 0, 0)
    hollow = Findings(
        "m", None, None, "test", "h", 1, {},
        following=[Following("counterfactual", "hear", *[nothing] * 7)],
        reliance=[Reliance("hear", nothing, nothing, nothing)],
        knockout=[CutEffect("video->emitters", 0, 1, "from", "counterfactual", "hear", nothing, None, nothing, nothing)],
        flow=[Flow("emitters", "plain", "factual", {"audio": [nothing]})],
        probes=[Probe("audio", "audio", [nothing], [0.0], None, None, [Effect(None, None, None, 0, 0)], "none")],
        shift=[Shift("all", "factual", nothing, nothing, nothing, nothing)],
    )  # fmt: skip
    write_report(tmp_path / "r.html", [("before", hollow), ("after", hollow)], clips)
    with pytest.raises(ValueError, match="at least one findings"):
        write_report(tmp_path / "none.html", [], clips)


def test_abstention_before_and_after(clips, tmp_path):
    """Muted clips: of 200 answers 4 say nothing before and 190 after; 150 and 6 name an event. False abstention on factual clips: 0 and 3 of 600."""

    def row(condition, nothing, vision, neither, n):
        return Following(
            condition, "hear", e(0.0, n), e(vision, n), e(0.0, n), e(neither, n), e(nothing, n), e(1 - nothing - vision - neither, n), e(nothing, n)
        )

    before, after = findings(0.1, 0.6), findings(0.9, 0.05)
    before.following = [row("muted", 0.02, 0.65, 0.10, 200), row("factual", 0.0, 0.0, 0.02, 600)]
    after.following = [row("muted", 0.95, 0.01, 0.02, 200), row("factual", 0.005, 0.0, 0.02, 600)]
    for store, said in ((before, [0, 0, 1, 0]), (after, [1, 1, 1, 0])):
        group = ItemStore().of(["a", "b", "c", "d"], list("wxyz"))
        group.keep(Key("following", "muted", "hear", "", "nothing"), said)
        store.items = [group.items]
    comparison = compare(before, after)
    write_report(tmp_path / "r.html", [("before", before), ("after", after)], clips, comparison=comparison)
    text = " ".join(Page((tmp_path / "r.html").read_text(encoding="utf-8")).text.split())
    silent = text[text.index("When there is nothing to hear or see") :]
    assert "sound silent hears abstains 2.0 % (0.0–6.0) 95.0 % (91.0–99.0) +50.0 (" in silent and re.search(
        r" 75\.0 % 3\.0 % [^a-z]*200 \(41\)", silent
    )
    assert re.search(r"factual clips hears does not 0\.0 % \(0\.0–4\.0\) 0\.5 % \(0\.0–4\.5\) – 2\.0 % 2\.0 % [^a-z]*600 \(41\)", silent)
    console = Console(width=140, record=True)
    console.print(*findings_tables(after), *comparison_tables(comparison))
    shown = " ".join(console.export_text().split())
    assert "sound silent the sound abstains 95.0 % (91.0–99.0) 3.0 % 2.0, – % 200 (41)" in shown
    assert "sound silent the sound abstains 2.0 % 95.0 % +50.0" in shown
    write_report(tmp_path / "own.html", [("now", findings(0.1, 0.6))], clips)  # a folder without such clips
    assert "When there is nothing" not in (tmp_path / "own.html").read_text(encoding="utf-8")


def test_other_clips_before_and_after_are_pointed_out(clips, tmp_path):
    write_report(tmp_path / "r.html", [("before", findings(0.1, 0.6)), ("after", findings(0.9, 0.0, split="selection"))], clips)
    assert "the difference mixes both" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_only_conditions_that_the_file_plays_get_a_card(clips, tmp_path):
    made = findings(0.1, 0.6)
    made.samples += [Sample(**vars(s) | {"condition": "audio_only", "answer": "with the picture blanked"}) for s in made.samples]
    write_report(tmp_path / "r.html", [("now", made)], clips)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert html.count("<article") == 12 and "with the picture blanked" not in html


def test_clips_are_not_picked_by_outcome(clips, tmp_path):
    def shown(verdict):
        made = findings(0.1, 0.6)
        for sample in made.samples:
            sample.verdict = verdict
        write_report(tmp_path / "r.html", [("now", made)], clips)
        return re.findall(r'aria-label="Clip (\w+)"', (tmp_path / "r.html").read_text(encoding="utf-8"))

    assert shown("audio") == shown("vision")
    assert sum(c.startswith("counterfactual") for c in shown("audio")) == 8


def test_headline_needs_conflicts():
    assert "64.2 %" in headline([("now", findings(0.123, 0.642))])[0]
    assert len(headline([("now", findings(0.123, 0.642))])) == 1


def test_headline_figure_is_one_whole_svg(tmp_path):
    named = [("before", findings(0.123, 0.642)), ("after", findings(0.971, 0.008))]
    headline_figure(tmp_path / "head.svg", named)
    text = (tmp_path / "head.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and "12.3 %" in root.attrib["aria-label"]
    assert "97.1 %" in text and "video ↛ answer" in text and "prefers-color-scheme: dark" in text
    assert re.findall(r"https?://[^\"']+", text) == ["http://www.w3.org/2000/svg"]
    headline_figure(tmp_path / "one.svg", named[:1])
    with pytest.raises(ValueError, match="ends in"):
        headline_figure(tmp_path / "head.png", named)
    with pytest.raises(ValueError, match="following rates"):
        headline_figure(tmp_path / "x.svg", [("now", Findings("m", None, None, "test", "h", 1, {}))])


def test_ticks_cover_the_range_with_round_numbers():
    assert tick_steps(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert tick_steps(-0.3, 3.2) == [-1, 0, 1, 2, 3, 4]
    assert tick_steps(0, 0) == tick_steps(0, 1)
    assert span([]) == tick_steps(0, 0)


def test_points_lie_where_their_values_are():
    drawing = lines([Series("a", "audio", [(0.0, e(0.0)), (1.0, e(0.5)), (2.0, e(1.0))])], [(0.0, "0"), (1.0, "1"), (2.0, "2")], RATES, "t", "layer")
    found = [(float(x), float(y)) for x, y in re.findall(r'<circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', drawing.body)]
    assert found[1][0] == pytest.approx((found[0][0] + found[2][0]) / 2, abs=0.2)
    assert found[1][1] == pytest.approx((found[0][1] + found[2][1]) / 2, abs=0.2)
    assert found[2][1] < found[0][1]
    stack = columns([("0", [("video", "video", e(0.75)), ("audio", "audio", e(0.25))])], "t", "layer")
    heights = [float(h) for h in re.findall(r'class="bar[^>]*height="([\d.]+)"', stack.body)]
    assert heights[0] == pytest.approx(3 * heights[1], rel=0.01)


def test_what_was_trained_on_is_said_first(clips, tmp_path):
    """At the top of the page, of the tables of findings and of those of a comparison."""
    before, after = findings(0.1, 0.6), findings(0.9, 0.05)
    for one in (before, after):
        one.sources = [Sources("test", 86, 86, 43, 43, 5), Sources("unseen", 0, 43, 34, 43, 5)]
        unseen = dataclasses.replace(one.following[0], condition="unseen_counterfactual", trained=136)
        none = Following("unseen_factual", "hear", *[Estimate(None, None, None, 0, 0)] * 7, trained=86)
        one.following = [*one.following, unseen, none]
    comparison = compare(before, after)
    said = [
        "Test split: 86 of 86 pictures and 43 of 43 recordings are in the train split too, in other renderings.",
        "Unseen split: 0 of 43 pictures and 34 of 43 recordings are in the train split too, in other renderings.",
        "Unseen sources, conflicts, asked what it hears: 600 clips of a new recording; 136 whose recording the train split has are left out.",
        "Unseen sources, factual clips, asked what it hears: 0 clips of a new recording; 86 whose recording the train split has are left out.",
    ]
    assert after.trained_on() == comparison.trained_on == said
    assert comparison.find("following", "audio", "unseen_factual", "hear") is None  # nothing was measured there
    write_report(tmp_path / "r.html", [("before", before), ("after", after)], clips, comparison=comparison)
    text = " ".join(Page((tmp_path / "r.html").read_text(encoding="utf-8")).text.split())
    assert text.count(" ".join(said)) == 1 and text.index(said[0]) < text.index("What the answers name")
    for tables in (findings_tables(after), comparison_tables(comparison)):
        assert tables[0].title == "What was trained on" and list(tables[0].columns[0].cells) == said
