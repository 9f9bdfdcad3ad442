"""Before against after: pairs are the same clips, and only like is compared with like."""

import copy

import pytest
from rich.console import Console

from analysis.compare import Comparison, compare
from analysis.findings import CutEffect, Estimate, Findings, FindingsError, Following, Latent, Lens, Probe, Reliance, Sample, Shift, Tuned
from analysis.tables import best_cuts, comparison_tables, findings_tables, layers, number, percent


def e(value, n=4, k=2):
    return Estimate(value, None if value is None else value - 0.05, None if value is None else value + 0.05, n, k)


def answers(verdicts, condition="counterfactual", modality="hear"):
    """One clip per verdict; clips 0, 1 share a picture, 1, 2 a recording."""
    return [
        Sample(f"{condition}{i}", f"{i}.mp4", condition, "a dog", "a bell", "What do you hear?", modality, "…", v, f"v{i // 2}", f"a{(i + 1) // 2}")
        for i, v in enumerate(verdicts)
    ]


def findings(audio, verdicts, **changes):
    made = Findings(
        "model", None, "base", "test", "hash", 2, {"dtype": "float32", "prompts": {"hear": "What do you hear?"}, "seed": 0, "device": "cpu"},
        following=[Following("counterfactual", "hear", e(audio), e(0.5), e(0.0), e(0.0), e(0.0), e(audio))],
        reliance=[Reliance("hear", e(1.0), e(1.0), e(0.5))],
        knockout=[
            CutEffect("video->emitters", k, 2, "from", "counterfactual", "hear", e(1.0 - k), e(1.0), e(0.9 - k / 2), e(0.1)) for k in range(2)
        ],
        probes=[Probe("audio", "audio", [e(0.1), e(0.7), e(0.6)], [0.1] * 3, None, None, [0.0, 0.6, 0.5], "2 folds")],
        lens=[Lens("audio", "audio", 5, [e(0.1), e(0.3), e(0.2)], [0.1] * 3, [0.0, 0.2, 0.1])],
        latent=Latent(1, e(0.4), e(audio)),
        tuned=Tuned(
            20, 480, [e(2.0), e(1.0), e(0.0)], [e(0.8), e(0.6), e(0.0)],
            [Lens("audio", "audio", 5, [e(0.2), e(0.65), e(0.2)], [0.1] * 3, [0.1, 0.55, 0.1], "tuned")], Latent(1, e(0.55), e(audio)),
        ),
        shift=[Shift("all", "counterfactual", e(0.6), e(0.3), e(0.1), e(2.0))],
        samples=answers(verdicts),
    )  # fmt: skip
    for name, value in changes.items():
        setattr(made, name, value)
    return made


BEFORE = findings(0.25, ["vision", "vision", "audio", "neither"])
AFTER = findings(1.0, ["audio", "audio", "audio", "vision"])


def test_paired_differences_by_hand():
    comparison = compare(BEFORE, AFTER)
    audio = comparison.find("following", "audio", "counterfactual", "hear")
    assert (audio.before.value, audio.after.value) == (0.25, 1.0)
    assert audio.difference.value == pytest.approx((1 + 1 + 0 + 0) / 4)  # from the clips, not from the two rates
    assert (audio.difference.n, audio.difference.clusters) == (4, 2)
    assert comparison.find("following", "vision", "counterfactual", "hear").difference.value == pytest.approx((-1 - 1 + 0 + 1) / 4)
    assert comparison.find("following", "correct", "counterfactual", "hear").difference.value == pytest.approx(0.5)
    assert comparison.find("reliance", "shortcut", None, "hear").difference is None
    cut = comparison.find("knockout", "audio", "counterfactual", "hear", "video->emitters [1, 2) from")
    assert cut.before.value == pytest.approx(0.4)
    assert comparison.find("lens", "hit", item="audio words in the top 5 at audio, layer 1").after.value == pytest.approx(0.3)
    assert comparison.find("lens", "hit", item="audio words in the top 5 at audio, tuned lens, layer 1").after.value == pytest.approx(0.65)
    assert comparison.find("latent", "latent", item="tuned lens").before.value == pytest.approx(0.55)
    assert comparison.left_out == []


def test_the_same_answers_make_no_difference():
    comparison = compare(BEFORE, BEFORE)
    audio = comparison.find("following", "audio", "counterfactual", "hear")
    assert (audio.difference.value, audio.difference.low, audio.difference.high) == (0, 0, 0)


def test_clips_without_a_partner_are_left_out_and_named():
    fewer = copy.deepcopy(AFTER)
    fewer.samples = fewer.samples[1:]
    fewer.probes = []
    comparison = compare(BEFORE, fewer)
    assert comparison.find("following", "audio", "counterfactual", "hear").difference.n == 3
    assert any(s.startswith("1 answers have no partner") for s in comparison.left_out)
    assert any(s.startswith("3 numbers were measured before only (probe)") for s in comparison.left_out)
    assert comparison.find("probe", "accuracy", item="audio label at audio, layer 1") is None


def test_no_common_clips():
    other = findings(1.0, [])
    assert any("No paired differences" in s for s in compare(BEFORE, other).left_out)


def test_another_base_drops_the_token_shift():
    comparison = compare(BEFORE, findings(1.0, ["audio"] * 4, base="other"))
    assert comparison.find("shift", "unshifted", "counterfactual", None, "all") is None
    assert any("bases differ" in s for s in comparison.left_out)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data_hash": "other"}, "data_hash is 'hash' before and 'other' after"),
        ({"split": "selection"}, "split is 'test' before and 'selection' after"),
        ({"n_layers": 3}, "n_layers is 2 before and 3 after"),
        ({"settings": BEFORE.settings | {"dtype": "bfloat16"}}, "setting dtype is 'float32' before and 'bfloat16' after"),
        ({"settings": BEFORE.settings | {"prompts": {"hear": "Listen!"}}}, "setting prompts.hear is"),
        ({"settings": {k: v for k, v in BEFORE.settings.items() if k != "seed"}}, "setting seed is 0 before and 'not stated' after"),
    ],
)
def test_unlike_findings_are_refused(changes, message):
    with pytest.raises(ValueError, match="not measured alike") as caught:
        compare(BEFORE, findings(1.0, ["audio"] * 4, **changes))
    assert message in str(caught.value)


def test_where_it_ran_does_not_matter():
    compare(BEFORE, findings(1.0, ["audio"] * 4, settings=BEFORE.settings | {"device": "cuda", "batch_size": 8}))


def test_round_trip(tmp_path):
    comparison = compare(BEFORE, AFTER)
    comparison.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == comparison
    BEFORE.save(tmp_path / "f.json")
    with pytest.raises(FindingsError, match="comparison"):
        Comparison.load(tmp_path / "f.json")


def rendered(tables):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    return "\n".join(lines)


def test_terminal_tables_hold_the_numbers():
    text = rendered(findings_tables(BEFORE))
    assert "25.0 % (20.0–30.0)" in text and "4 (2)" in text
    assert "0.50 (0.45, 0.55)" in text  # Shortcut Index
    assert "video ↛ answer" in text and "0–1" in text and "90.0 % (85.0–95.0)" in text  # the strongest cut
    assert "70.0 % (65.0–75.0)" in text and "+60.0" in text  # the best probe layer
    assert "65.0 % (60.0–70.0)" in text and "By the tuned lens: 55.0 %" in text
    text = rendered(comparison_tables(compare(BEFORE, AFTER)))
    assert "+50.0" in text and "100.0 %" in text
    empty = Findings("m", None, None, "test", "h", 1, {})
    assert findings_tables(empty) == [] and comparison_tables(compare(empty, empty))[-1].title == "Left out"


def test_number_formats():
    assert percent(Estimate(0.5, None, None, 3, 1)) == "50.0 %"
    assert percent(Estimate(None, None, None, 0, 0)) == percent(None) == "–"
    assert percent(Estimate(-0.1, -0.2, 0.05, 3, 2), signed=True) == "−10.0 (−20.0 to +5.0)"
    assert percent(Estimate(-0.018, -0.115, 0.108, 3, 2)) == "−1.8 % (−11.5 to 10.8)"
    assert number(Estimate(-0.001, -0.001, 0.2, 3, 2), signed=True) == "+0.00 (0.00, 0.20)"
    assert number(Estimate(-1.5, -2.0, -1.0, 3, 2)) == "−1.50 (−2.00, −1.00)"
    assert [layers(2, 5), layers(7, 8), layers(3, 3)] == ["2–4", "7", "none"]


def test_best_cuts_judge_cuts_of_audio_by_the_harm():
    def cut(site, start, audio):
        return CutEffect(site, start, 2, "from", "counterfactual", "hear", e(0.0), None, e(audio), None)

    best = best_cuts([cut("video->emitters", 0, 0.8), cut("video->emitters", 1, 0.9), cut("audio->emitters", 0, 0.1), cut("audio->emitters", 1, 0.3)])
    assert [(c.site, c.start) for c in best] == [("video->emitters", 1), ("audio->emitters", 0)]
