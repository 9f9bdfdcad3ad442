"""Before against after: pairs are the same clips, and only like is compared with like."""

import copy
import itertools
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from analysis.compare import Comparison, _rows, compare
from analysis.diagnose import DiagnoseSettings, diagnose
from analysis.events import VERDICTS
from analysis.findings import CutEffect, Effect, Estimate, Findings, FindingsError, Following, Latent, Lens, Probe, Readout, Reliance, Shift, Tuned
from analysis.items import ItemStore, Key, cut_item, packed, unpacked
from analysis.report_answers import following_table
from analysis.report_layers import probe_figures
from analysis.statistics import Dyads, Intervals, shortcut
from analysis.tables import best_cuts, comparison_tables, findings_tables, layers, number, percent


def e(value, n=4, k=2):
    return Estimate(value, None if value is None else value - 0.05, None if value is None else value + 0.05, n, k)


def d(value, n=4, k=2):
    return Effect(value, value - 0.05, value + 0.05, n, k, 0.01, None, 1.0)


# Clips 0, 1 share a picture, 1, 2 a recording, 2, 3 a picture; grids all pairs of 9 sources.
CLIPS = (["c0", "c1", "c2", "c3"], (["v0", "v0", "v1", "v1"], ["a0", "a1", "a1", "a2"]))
PAIRS = list(itertools.combinations("ABCDEFGHI", 2))
GRIDS = ([f"{i}{j}" for i, j in PAIRS], Dyads([i for i, _ in PAIRS], [j for _, j in PAIRS]))


def above(*values):
    return [Effect(value, value - 0.1, value + 0.1, 4, 2, 0.01) for value in values]


CUTS = [(0, "from"), (0, "all"), (1, "from")]  # the first two are one window of two families


def kept(verdicts, scores, audio=(), video=(), clips=CLIPS):
    """Items: what each clip's answer names; s under two cuts; effects of grids; KL of two tokens, then of 0, 1 and 3."""
    store = ItemStore()
    group = store.of(*clips)
    for measure in (*VERDICTS, "correct"):
        named = "audio" if measure == "correct" else measure
        group.keep(Key("following", "counterfactual", "hear", "", measure), [v == named for v in verdicts])
    for k, family in CUTS:
        item = cut_item("video->emitters", k, 2, family)
        group.keep(Key("knockout", "counterfactual", "hear", item, "delta_logprob"), np.array(scores) - k)
    if len(verdicts) == 4:
        group.keep(Key("shift", "counterfactual", None, "all", "kl"), np.array(scores) * 2, [2, 0, 1, 3])
    if len(audio):
        store.of(*GRIDS).keep(Key("reliance", None, "hear", "", "effect_audio"), audio)
        store.of(*GRIDS).keep(Key("reliance", None, "hear", "", "effect_video"), video)
    return store.saved()


def findings(audio, items, **changes):
    made = Findings(
        "model", None, "base", "test", "hash", 2, {"dtype": "float32", "prompts": {"hear": "What do you hear?"}, "seed": 0, "device": "cpu"},
        following=[Following("counterfactual", "hear", e(audio), e(0.5), e(0.0), e(0.0), e(0.0), e(0.0), e(audio))],
        reliance=[Reliance("hear", d(1.0), d(1.0), e(0.5))],
        knockout=[
            CutEffect("video->emitters", k, 2, family, "counterfactual", "hear", d(1.0 - k), d(1.0), e(0.9 - k / 2), e(0.1)) for k, family in CUTS
        ],
        probes=[Probe("audio", "audio", [e(0.1), e(0.7), e(0.6)], [0.1] * 3, None, None, above(0.0, 0.6, 0.5), "2 folds")],
        lens=[Lens("audio", "audio", 5, [e(0.1), e(0.3), e(0.2)], [0.1] * 3, above(0.0, 0.2, 0.1))],
        latent=Latent(1, e(0.4), e(audio), end=Readout(2, e(0.7)), end_swapped=Readout(1, e(0.75))),
        tuned=Tuned(
            20, 480, [e(2.0), e(1.0), e(0.0)], [e(0.8), e(0.6), e(0.0)],
            [Lens("audio", "audio", 5, [e(0.2), e(0.65), e(0.2)], [0.1] * 3, above(0.1, 0.55, 0.1), "tuned")],
            Latent(1, e(0.55), e(audio), end=Readout(0, e(0.8))),
        ),
        shift=[Shift("all", "counterfactual", e(0.6), e(0.3), e(0.1), e(2.0))],
        items=items,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(made, name, value)
    return made


RNG = np.random.default_rng(0)
AUDIO, VIDEO = RNG.normal(1, 0.3, (2, 36)).round(3), RNG.normal(2, 0.3, (2, 36)).round(3)
BEFORE = findings(0.25, kept(["vision", "vision", "audio", "neither"], [0.5, 1.0, 0.0, -0.5], AUDIO[0], VIDEO[0]))
AFTER = findings(1.0, kept(["audio", "audio", "audio", "vision"], [1.5, 1.5, 0.5, 1.5], AUDIO[1], VIDEO[1] / 4))


def test_paired_differences_by_hand():
    comparison = compare(BEFORE, AFTER)
    audio = comparison.find("following", "audio", "counterfactual", "hear")
    assert (audio.before.value, audio.after.value) == (0.25, 1.0)
    expected = Intervals(CLIPS[1], 4).effects([[1.0], [1], [0], [0]])[0]
    assert audio.difference == expected and expected.value == 0.5  # from the clips, not from the two rates
    assert (audio.difference.n, audio.difference.clusters) == (4, 2)
    assert comparison.find("following", "vision", "counterfactual", "hear").difference.value == pytest.approx((-1 - 1 + 0 + 1) / 4)
    cut = comparison.find("knockout", "delta_logprob", "counterfactual", "hear", "video->emitters [1, 2) from")
    assert cut.before.value == 0.0 and cut.difference.value == pytest.approx((1 + 0.5 + 0.5 + 2) / 4)
    # Both windows change alike, so p of both is twice p of one.
    expected = Intervals(CLIPS[1], 4).effects([[1.0], [0.5], [0.5], [2.0]])[0]
    assert cut.difference.p == pytest.approx(expected.p) and cut.difference.p_corrected == pytest.approx(min(1, 2 * expected.p))
    assert audio.difference.p_corrected is None  # no layers
    assert comparison.find("latent", "said").difference is None
    assert any(
        "no paired difference (knockout, latent, lens, probe, shift, tuned): one of the findings keeps no value" in s for s in comparison.left_out
    )
    assert comparison.find("lens", "hit", item="audio words in the top 5 at audio, layer 1").after.value == pytest.approx(0.3)
    assert comparison.find("lens", "hit", item="audio words in the top 5 at audio, tuned lens, layer 1").after.value == pytest.approx(0.65)
    assert comparison.find("latent", "latent", item="tuned lens").before.value == pytest.approx(0.55)
    ends = {name: comparison.find("latent", "latent", item=f"{name}end-of-audio token") for name in ("", "tuned lens, ")}
    assert {name: change.before.value for name, change in ends.items()} == {"": 0.7, "tuned lens, ": 0.8}
    assert comparison.find("latent", "latent", item="end-of-audio token, halves exchanged").after.value == 0.75
    assert comparison.find("latent", "latent", item="halves exchanged") is None
    assert comparison.find("tuned", "kl_after", item="KL to the final output, layer 1").before.value == pytest.approx(0.6)


def test_token_shift_is_compared_as_a_ratio_of_sums():
    """Σ KL / Σ tokens before: 2 (0.5 + 1 + 0 - 0.5) / 6, after: 2 (1.5 + 1.5 + 0.5 + 1.5) / 6."""
    found = compare(BEFORE, AFTER).find("shift", "kl", "counterfactual", None, "all").difference
    assert found.value == pytest.approx(8 / 6)
    # Both sides have the same weights, so the influence is that of the differences 2 (1, .5, .5, 2): (x - 8/6 w) / 1.5
    influence = (2 * np.array([1, 0.5, 0.5, 2]) - 8 / 6 * np.array([2, 0, 1, 3])) / 1.5
    error = Intervals(CLIPS[1], 4).spread(influence[:, None])
    assert (found.high - found.value) == pytest.approx(stats.t.ppf(0.975, error.freedom[0]) * error.error[0])


def test_the_shortcut_index_is_compared_on_the_same_grids():
    found = compare(BEFORE, AFTER).find("reliance", "shortcut", None, "hear").difference

    def index(audio, video):
        return abs(video.mean()) / (abs(audio.mean()) + abs(video.mean()))

    expected = index(AUDIO[1], VIDEO[1] / 4) - index(AUDIO[0], VIDEO[0])
    assert found.value == pytest.approx(expected, abs=1e-5) and (found.n, found.clusters) == (36, 9)
    assert found.low < expected < found.high < 0 and found.p < 0.05
    # The standard error of the delta method against leaving out one grid at a time (jackknife), grids taken as independent.
    without = [[np.delete(side, k) for side in (AUDIO[0], VIDEO[0], AUDIO[1], VIDEO[1] / 4)] for k in range(36)]
    leave = np.array([index(a1, v1) - index(a0, v0) for a0, v0, a1, v1 in without])
    jackknife = math.sqrt(35 / 36 * ((leave - leave.mean()) ** 2).sum())
    psi_a, psi_b = shortcut(VIDEO[0], AUDIO[0])[1], shortcut(VIDEO[1] / 4, AUDIO[1])[1]
    assert Intervals(range(36), 36).spread((psi_b - psi_a)[:, None]).error[0] == pytest.approx(jackknife, rel=0.05)
    assert compare(BEFORE, AFTER).find("reliance", "effect_audio", None, "hear").difference.value == pytest.approx((AUDIO[1] - AUDIO[0]).mean())


def test_the_same_answers_make_no_difference_but_one_may_hide():
    comparison = compare(BEFORE, BEFORE)
    audio = comparison.find("following", "audio", "counterfactual", "hear").difference
    assert audio.value == 0 and audio.low < 0 < audio.high and audio.p == 1
    cut = comparison.find("knockout", "delta_logprob", "counterfactual", "hear", "video->emitters [1, 2) from").difference
    assert (cut.value, cut.low, cut.high, cut.p, cut.p_corrected) == (0, 0, 0, 1, 1)


def test_clips_in_another_order_are_the_same_clips():
    order = [2, 0, 3, 1]
    ids, (video, audio) = CLIPS
    turned = ([ids[i] for i in order], ([video[i] for i in order], [audio[i] for i in order]))
    verdicts, scores = ["audio", "audio", "audio", "vision"], [1.5, 1.5, 0.5, 1.5]
    after = findings(1.0, kept([verdicts[i] for i in order], [scores[i] for i in order], clips=turned))
    for measure, item in (("audio", ""), ("delta_logprob", "video->emitters [0, 2) from")):
        section = "knockout" if item else "following"
        found, expected = (compare(BEFORE, a).find(section, measure, "counterfactual", "hear", item).difference for a in (after, AFTER))
        assert (found.value, found.low, found.p) == pytest.approx((expected.value, expected.low, expected.p))


def test_clips_without_a_partner_are_left_out_and_named():
    fewer = copy.deepcopy(AFTER)
    ids, (video, audio) = CLIPS
    fewer.items = kept(["audio", "audio", "vision"], [1.5, 0.5, 1.5], clips=(ids[1:], (video[1:], audio[1:])))
    fewer.probes = []
    comparison = compare(BEFORE, fewer)
    assert comparison.find("following", "audio", "counterfactual", "hear").difference.n == 3
    assert any(s.startswith("Paired differences (following): up to 1 items have no partner") for s in comparison.left_out)
    assert any("(knockout, latent, lens, reliance, shift, tuned): one of the findings keeps no value" in s for s in comparison.left_out)
    assert any(s.startswith("6 numbers were measured before only (probe)") for s in comparison.left_out)
    assert comparison.find("probe", "accuracy", item="audio label at audio, layer 1") is None


def test_no_common_clips():
    ids, clusters = CLIPS
    other = findings(1.0, kept(["audio"] * 4, [0.0] * 4, clips=([f"x{i}" for i in ids], clusters)))
    comparison = compare(BEFORE, other)
    assert comparison.find("following", "audio", "counterfactual", "hear").difference is None
    assert any("share none of their items" in s for s in comparison.left_out)
    assert any("keeps no value" in s for s in compare(BEFORE, findings(1.0, [])).left_out)


def test_other_sources_are_refused():
    ids, (video, _) = CLIPS
    other = findings(1.0, kept(["audio"] * 4, [0.0] * 4, clips=(ids, (video, ["z"] * 4))))
    with pytest.raises(ValueError, match="other sources"):
        compare(BEFORE, other)


def test_another_base_drops_the_token_shift():
    comparison = compare(BEFORE, findings(1.0, AFTER.items, base="other"))
    assert comparison.find("shift", "unshifted", "counterfactual", None, "all") is None
    assert any("bases differ" in s for s in comparison.left_out)


@pytest.mark.parametrize("values", [[0, 1, 1, 0], [1.0], [0.0], [7], [0.25, -1.5, 3e-7, 12345.678], [10, 11], [0.1234567]])
def test_packed_values_come_back(values):
    text = packed(values)
    assert unpacked(text, len(values)).tolist() == pytest.approx(values, rel=1e-5)
    assert (" " in text) == (len(values) > 1 and not set(values) <= {0, 1})
    with pytest.raises(ValueError, match="values are kept for"):
        unpacked(text, len(values) + 1)


def test_items_need_different_ids():
    with pytest.raises(ValueError, match="told apart"):
        ItemStore().of(["a", "a"], ["x", "y"])


def test_a_diagnosis_keeps_the_values_behind_every_number(model, clips):
    """Every estimate is the mean of what is kept under its key, pairing it with itself gives no difference, and a file of it is read back."""
    settings = DiagnoseSettings(max_new_tokens=6, lens_k=3, probe_folds=3, knockout_media=4, grids=8, flips=50, knockout=12, knockout_factual=8)
    found = diagnose(model, clips, settings, progress=False)
    values = {key: (items, text) for items in found.items for key, text in items.values.items()}
    numbers = dict(_rows(found))
    assert {key.section for key in numbers} == {"following", "reliance", "knockout", "flow", "probe", "lens", "tuned", "latent", "captions", "shift"}
    for key, estimate in numbers.items():
        if key.measure != "shortcut" and estimate.value is not None:
            items, text = values[key.text]
            column = unpacked(text, len(items.ids))
            weight = unpacked(items.weights[key.text], len(items.ids)) if key.text in items.weights else np.ones(len(column))
            assert column.sum() / weight.sum() == pytest.approx(estimate.value, abs=1e-5), key
            assert round(weight.sum()) == estimate.n
    comparison = compare(found, found)
    for change in comparison.changes:
        if change.before.value is None:
            assert change.difference is None
        else:
            assert change.difference.value == 0 and change.difference.p in (None, 1.0), change
    assert comparison.left_out == [] or all("nothing to measure" in s for s in comparison.left_out)


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
        compare(BEFORE, findings(1.0, AFTER.items, **changes))
    assert message in str(caught.value)


def test_where_it_ran_does_not_matter():
    compare(BEFORE, findings(1.0, AFTER.items, settings=BEFORE.settings | {"device": "cuda", "batch_size": 8}))


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
    assert "65.0 % (60.0–70.0)" in text and "By the tuned lens: 55.0 %" in " ".join(text.split())
    text = rendered(comparison_tables(compare(BEFORE, AFTER)))
    assert "+50.0" in text and "100.0 %" in text
    empty = Findings("m", None, None, "test", "h", 1, {})
    assert findings_tables(empty) == [] and comparison_tables(compare(empty, empty)) == []


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


def test_what_could_not_be_read_stands_beside_every_rate_of_a_comparison():
    """Before 30 % of the answers name nothing known and 5 % end at the limit, after it 10 % and none: in the row of each rate of these answers."""

    def told(unparsed, cut_off):
        shares = (e(0.2), e(0.3), e(0.0), e(0.0), e(0.2), e(unparsed), e(0.2))
        rows = [Following(condition, "hear", *shares, cut_off=e(cut_off)) for condition in ("counterfactual", "muted")]
        return Findings("m", None, None, "test", "h", 2, {}, following=rows)

    before, after = told(0.3, 0.05), told(0.1, 0.0)
    said, nothing = (
        {str(c.header): list(c.cells) for c in t.columns} for t in comparison_tables(compare(before, after)) if "before and after" in t.title
    )
    assert said["names the"] == ["sound", "picture", "picture"]
    for table, rows in ((said, 3), (nothing, 2)):
        assert table["unparsed, cut off"] == ["unparsed 30.0 → 10.0, cut off 5.0 → 0.0"] * rows
    [_, read] = [t for t in comparison_tables(compare(told(0.0, 0.0), told(0.0, 0.0))) if "before and after" in t.title]
    assert [list(c.cells) for c in read.columns if c.header == "unparsed, cut off"] == [["none"] * 2]
    [table] = [t for t in findings_tables(before) if t.title == "Says that there is nothing"]
    assert [list(c.cells) for c in table.columns if c.header == "unparsed, cut off"] == [["30.0, 5.0 %"] * 2]


def test_selectivity_can_be_recomputed_from_its_table():
    """0.9 where the model hears, 0.2 by a random label, 0.1 by shuffled ones, 0.6 without sound: 30 points above the best."""
    probe = Probe("question", "audio", [e(0.9)], [0.1], [0.6], None, [Effect(0.3, 0.2, 0.4, 4, 2)], "2 folds", [0.2])
    found = Findings("m", None, None, "test", "h", 1, {}, probes=[probe])
    [table] = findings_tables(found)
    cells = {str(c.header): next(iter(c.cells)) for c in table.columns}
    assert (cells["control task"], cells["shuffled"], cells["best control"]) == ("20.0 %", "10.0 %", "60.0 %")
    [figure] = probe_figures([("now", found)])
    assert dict(zip(figure.header, figure.rows[0], strict=True))["best control, the sound"] == "60.0 %"


def test_clips_left_out_of_an_unseen_rate_stand_beside_its_n():
    row = Following("unseen_factual", "hear", *[e(0.1)] * 7, trained=7)
    table = findings_tables(Findings("m", None, None, "test", "h", 1, {}, following=[row]))[-1]
    assert [list(c.cells) for c in table.columns][-1] == ["4 (2), 7 left out"]
    assert following_table([("now", Findings("m", None, None, "test", "h", 1, {}, following=[row]))], None)["rows"][0][-1] == "4 (2), 7 left out"
