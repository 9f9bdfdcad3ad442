"""Names of scalars, and the small multiples of the page."""

import re

import pytest

from analysis.findings import CaptionFidelity, CutEffect, Effect, Estimate, Findings, Flow, Following, Latent, Probe, Readout, Reliance
from analysis.report import write_report
from analysis.report_training import small_multiples
from analysis.trajectory import headline, panel


def e(value, n=100):
    return Estimate(value, None if value is None else value - 0.1, None if value is None else value + 0.1, n, 10)


def d(value):
    return Effect(value, value - 0.1, value + 0.1, 100, 10)


def follow(condition, question, audio, vision, correct):
    return Following(condition, question, e(audio), e(vision), e(0.0), e(1 - audio - vision), e(0.0), e(0.0), e(correct))


def cut(site, question, audio, vision, logprob):
    return CutEffect(site, 0, 2, "window", "counterfactual", question, d(logprob), None, *(None if v is None else e(v) for v in (audio, vision)))


def findings(split="test", hears=0.3, deep=True):
    found = Findings("m", None, None, split, f"clips of {split}", 2, {})
    found.following = [follow("counterfactual", "hear", hears, 0.6, hears), follow("factual", "see", 0.98, 0.0, 0.98)]
    found.reliance = [Reliance("hear", d(2.0), d(3.0), e(0.6))]
    if deep:
        found.fidelity = [
            CaptionFidelity("labels", "counterfactual", "both", None, e(0.2), e(0.8), e(0.0), e(0.1)),
            CaptionFidelity("labels", "counterfactual", "both", "video->emitters 0:2", e(0.9), e(0.1), e(0.0), e(0.1)),
            CaptionFidelity("llm:x", "counterfactual", "both", None, e(0.25), e(0.75), e(0.0), e(0.1)),
        ]
        found.latent = Latent(1, e(0.4), e(None), end=Readout(2, e(0.65)))
        found.probes = [Probe("audio", "audio", [e(0.5), e(0.9), e(0.7)], [0.1] * 3, None, None, [d(0.1), d(0.2), d(0.5)], "folds")]
        found.flow = [
            Flow("emitters", "no_sink", "counterfactual", {"audio": [e(0.2), e(0.4)], "video": [e(0.5), e(0.7)]}),
            Flow("emitters", "plain", "counterfactual", {"audio": [e(0.0), e(0.0)]}),
        ]
        found.knockout = [
            cut("video->emitters", "hear", 0.7, 0.2, 1.0),
            cut("video->question", "hear", None, None, 1.5),
            cut("audio->emitters", "hear", 0.99, 0.0, 9.0),
            cut("audio->emitters", "see", 0.1, 0.85, 0.5),
        ]
    return found


def test_every_scalar_under_its_name():
    values = {name: estimate.value for name, estimate in headline(findings()).items()}
    assert values == {
        "following/counterfactual/hear/audio": 0.3,
        "following/counterfactual/hear/vision": 0.6,
        "abstention/counterfactual/hear": 0.0,
        "following/factual/see/correct": 0.98,
        "abstention/factual/see": 0.0,
        "reliance/hear/shortcut": 0.6,
        "reliance/hear/effect_audio": 2.0,
        "reliance/hear/effect_video": 3.0,
        "captions/counterfactual/both/audio": 0.2,  # the first judge's, without a cut
        "captions/counterfactual/both/video": 0.8,
        "captions/counterfactual/both/invented": 0.1,
        "captions/counterfactual/both/unparsed": 0.0,
        "unparsed/counterfactual/hear": 0.0,
        "unparsed/factual/see": 0.0,
        "latent/logit": 0.4,  # what was not measured is not there
        "latent/end": 0.65,
        "probes/audio/audio": 0.7,  # where it is most above its controls, not where it is highest
        "attention/counterfactual/audio": pytest.approx(0.3),
        "attention/counterfactual/video": pytest.approx(0.6),
        "knockout/hear/named": 0.7,  # of cuts of the stream that was not asked about
        "knockout/hear/logprob": 1.5,
        "knockout/see/named": 0.85,
        "knockout/see/logprob": 0.5,
    }
    assert headline(findings())["attention/counterfactual/audio"].low == pytest.approx(0.2)


def test_every_name_has_a_panel_and_lines_of_a_panel_differ():
    names = list(headline(findings()))
    lines = [(panel(name).title, panel(name).line) for name in names]
    assert len(set(lines)) == len(names)
    with pytest.raises(ValueError, match="no name"):
        panel("following/nonsense")


def test_panels_on_the_page(tmp_path):
    """What checkpoints and ends measured gets lines and lone dots; what only one of the findings has gets no panel."""
    history = [
        ("before", findings(hears=0.1)),
        ("step 0", findings("selection", 0.12, deep=False)),
        ("step 5", findings("selection", 0.5, deep=False)),
        ("after", findings(hears=0.52, deep=False)),
    ]
    write_report(tmp_path / "page.html", history, tmp_path)
    section = (tmp_path / "page.html").read_text().split('<section id="training">')[1].split("</section>")[0]
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", section)
    assert "Conflicts, asked what it hears" in titles and "Shortcut Index (0 is ideal)" in titles
    assert not [t for t in titles if "Captions" in t or "probe" in t]
    assert "before, after (test split)" in section
    hears = section.split("Conflicts, asked what it hears</figcaption>")[1].split("</figure>")[0]
    assert hears.count("<polyline") == 2 and hears.count('class="dot t-audio before"') == 2 and hears.count('class="dot t-audio"') == 2
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in re.findall(r"<tr>(.*?)</tr>", hears)]
    assert rows[0][1:] == [
        "names the sound, test split",
        "names the sound, selection split",
        "names the picture, test split",
        "names the picture, selection split",
    ]
    assert [cell.strip() for cell in rows[1][1:3]] == ["10.0 %", "–"] and [cell.strip() for cell in rows[3][1:3]] == ["–", "50.0 %"]


def test_two_findings_are_no_trajectory(tmp_path):
    write_report(tmp_path / "page.html", [("before", findings()), ("after", findings())], tmp_path)
    assert "Every diagnostic" not in (tmp_path / "page.html").read_text()


def test_shares_of_unread_answers_are_drawn_or_said_to_be_0():
    """Two panels of every three would else be empty: answers that name nothing known are 10 % of conflicts, and none anywhere else."""
    history = [(name, findings(deep=False)) for name in ("a", "b", "c")]
    for _, found in history:
        found.following[0].unparsed, found.following[0].cut_off = e(0.1), e(0.0)
    figures, never = small_multiples(history)
    titles = [figure.title for figure in figures]
    assert "Answers that name nothing known, conflicts" in titles and "Answers that name nothing known, factual clips" not in titles
    assert "Answers that end at the token limit, conflicts" not in titles
    assert never == (
        "Not drawn, since they are 0 throughout: answers that end at the token limit (conflicts); answers that name nothing known (factual clips)."
    )
    history[1][1].following[1].unparsed = e(0.01)
    figures, never = small_multiples(history)
    assert "Answers that name nothing known, factual clips" in [figure.title for figure in figures] and "nothing known" not in never
    assert "Says that there is nothing, factual clips" in titles  # of other numbers 0 is a finding, and drawn
