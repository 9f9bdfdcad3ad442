"""The whole diagnosis on a small model: what is asked for is there, the same seed gives the same findings, batches change nothing."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import yaml

from analysis.compare import compare
from analysis.diagnose import DiagnoseSettings, SettingsError, choose, cut_off_sentences, diagnose, used
from analysis.findings import Findings, Sample
from data.clips import DataError
from data.questions import question
from models import SITES, load_model
from tests.analysis.conftest import teach

SMALL = DiagnoseSettings(
    counterfactual=12, factual=6, alone=4, bare=3, grids=4, shift=6, knockout=6, knockout_factual=2, knockout_media=2, knockout_width=2,
    probe_folds=3, probe_random=True, max_new_tokens=10, flips=50, batch=7,
)  # fmt: skip


@pytest.fixture(scope="module")
def findings(model, clips):
    return diagnose(model, clips, SMALL, "test", progress=False)


def test_everything_asked_for_is_there(findings, model, clips):
    assert (findings.split, findings.n_layers, findings.data_hash) == ("test", 3, clips.hash_of("test"))
    assert (findings.model, findings.base) == (model.path, model.base_path)
    n = {
        "counterfactual": 12,
        "factual": 6,
        "audio_only": 4,
        "video_only": 4,
        "muted": 3,
        "near_silent": 3,
        "blanked": 3,
        "near_black": 3,
        "unseen_factual": 6,
        "unseen_counterfactual": len(clips.select("unseen", "counterfactual")),
    }
    asked = {(c, m): count for c, count in n.items() for m in ("hear", "see")}
    assert {(f.condition, f.question): f.audio.n + f.trained for f in findings.following} == asked
    of_trains = {"unseen_factual": 1, "unseen_counterfactual": len([c for c in clips.select("unseen", "counterfactual") if c.audio_label == "train"])}
    for f in findings.following:  # pictures are all of a style that is not trained on; only the train has a recording like that
        left = n[f.condition] - of_trains[f.condition] if f.question == "hear" and f.condition in of_trains else 0
        assert f.trained == left, (f.condition, f.question)
    assert [(r.question, r.shortcut.n) for r in findings.reliance] == [("hear", 4), ("see", 4)]
    assert len(findings.flow) == 2 * 3 * 2 and {f.mass["video"][0].n for f in findings.flow} == {12, 6}
    assert len(findings.lens) == 8 and all(len(x.hit) == 4 and x.hit[0].n == 12 for x in findings.lens)
    assert len(findings.probes) == 8 and all(len(p.accuracy) == 4 and p.random_weights is not None for p in findings.probes)
    assert findings.latent is not None
    assert {(s.condition, s.tokens) for s in findings.shift} == {
        (c, t) for c in ("factual", "counterfactual") for t in ("all", "audio_event", "visual", "rest", "first_event")
    }
    assert {e.site for e in findings.knockout} == set(SITES)
    for e in findings.knockout:
        cuts_media = e.site in ("video->audio", "audio->video")
        assert e.delta_logprob.n == (2 if cuts_media or e.condition == "factual" else 6)
        if e.family == "from" and e.site in SMALL.knockout_curves:
            assert e.audio.n == e.delta_logprob.n
    assert any(e.audio for e in findings.knockout if e.site == "audio->emitters")
    assert len(findings.samples) == 2 * sum(n.values()) - sum(f.trained for f in findings.following)
    assert all(s.answer == s.answer.strip() for s in findings.samples)


def test_findings_survive_the_disk(findings, tmp_path):
    findings.save(tmp_path / "f.json")
    assert Findings.load(tmp_path / "f.json") == findings


def test_settings_that_move_scores_are_stated(findings, model):
    settings = findings.settings
    assert settings["questions"] == {modality: question(modality) for modality in ("see", "hear", "both")}
    assert settings["system_prompt"] == model.system_prompt and settings["dtype"] == "float32" and settings["seed"] == 0
    assert settings["versions"]["torch"] and settings["processor"]["video_processor"]["size"]
    assert settings["subset"].startswith("6 of 12 factual and 12 of")


def test_the_same_seed_gives_the_same_findings(model_folder, clips):
    """To the last bit, from fresh models: towers that ran before on other batches leave features that differ in the seventh digit."""
    first, second = (diagnose(load_model(model_folder), clips, SMALL, "test", progress=False) for _ in range(2))
    assert dataclasses.asdict(first) == dataclasses.asdict(second)


@pytest.mark.parametrize("batch", [1, 8])
def test_batches_change_nothing(findings, model, clips, batch):
    other = diagnose(model, clips, dataclasses.replace(SMALL, batch=batch), "test", progress=False)
    assert [dataclasses.astuple(s) for s in sorted(other.samples, key=repr)] == [dataclasses.astuple(s) for s in sorted(findings.samples, key=repr)]
    changes = compare(findings, other).changes
    assert len(changes) > 500
    for change in changes:
        for bound in ("value", "low", "high"):
            a, b = getattr(change.before, bound), getattr(change.after, bound)
            assert (a is None) == (b is None) and (a is None or math.isclose(a, b, abs_tol=1e-5)), change


def test_subsets_are_nested_and_follow_the_seed(clips):
    small, large = (choose(clips, "test", DiagnoseSettings(counterfactual=n, factual=n, grids=n)) for n in (4, 8))
    for a, b in zip(small[:3], large[:3], strict=True):
        assert [x.id for x in a] == [x.id for x in b][:4]
    few = choose(clips, "test", DiagnoseSettings(bare=2)).bare
    for name, found in choose(clips, "test", DiagnoseSettings()).bare.items():
        assert len(found) == 6 and few[name] == found[:2]  # of 12 clips that lack the stream, half are noise
    assert {c.id for c in small.counterfactual} == {name for g in small.grids[:2] for name in (g.ox, g.xo)}
    other = choose(clips, "test", DiagnoseSettings(counterfactual=8, factual=8, grids=8, seed=1))
    assert [c.id for c in other.counterfactual] != [c.id for c in large.counterfactual]
    everything = choose(clips, "test", DiagnoseSettings(grids=None))
    assert len(everything.counterfactual) == len(clips.select("test", "counterfactual")) and len(everything.factual) == 12


def test_quick_is_following_and_reliance_only(model, clips):
    found = diagnose(model, clips, DiagnoseSettings.quick(6, max_new_tokens=10, flips=20), "selection", progress=False)
    assert {f.condition for f in found.following} == {"factual", "counterfactual", "muted", "near_silent", "blanked", "near_black"}
    assert {f.nothing.n for f in found.following if f.condition not in ("factual", "counterfactual")} == {1} and len(found.reliance) == 2
    assert not (found.flow or found.lens or found.probes or found.shift or found.knockout) and found.latent is None
    assert any("Not measured: flow, lens, probes, token shift, caption fidelity, knockout" in s for s in found.left_out)


def test_clips_that_lack_a_stream(findings, clips):
    """Each kind by itself, answered as its clips are; intervals by the stream that is there; nothing counts where the other stream is asked about."""
    by_id = clips.by_id()
    kinds = {"muted": "silence", "near_silent": "near_silence", "blanked": "black", "near_black": "near_black"}
    for condition, rendering in kinds.items():
        there, missing = ("audio", "see") if rendering.endswith("black") else ("video", "hear")
        for row in (findings.following_rate(condition, "hear"), findings.following_rate(condition, "see")):
            samples = [s for s in findings.samples if (s.condition, s.modality) == (condition, row.question)]
            mine = [by_id[s.clip] for s in samples]
            assert len(mine) == row.nothing.n == 3
            assert {c.audio_rendering if there == "video" else c.video_rendering for c in mine} == {rendering}
            assert row.nothing.clusters == len({c.video_source if there == "video" else c.audio_source for c in mine})
            assert row.nothing.value == sum(s.verdict == "nothing" for s in samples) / 3
            assert row.correct.value == pytest.approx(sum(s.correct for s in samples) / 3)
            assert row.invented == pytest.approx(sum(s.verdict in ("audio", "vision", "both", "neither") for s in samples) / 3)
            if row.question == missing:
                assert row.correct.value == row.nothing.value
            else:
                label = (lambda c: c.video_label) if there == "video" else (lambda c: c.audio_label)
                assert row.correct.value == sum(s.verdict == ("vision" if there == "video" else "audio") for s in samples) / 3
                assert all(label(c) for c in mine)
        for caption in (c for c in findings.captions if c.condition == condition):
            assert (caption.seen == "") == (there == "audio") and (caption.heard == "") == (there == "video")
        for row in (f for f in findings.fidelity if f.condition == condition):
            assert (row.audio is not None) == (there == "audio" and row.question != "see")
            assert (row.video is not None) == (there == "video" and row.question != "hear")


def test_a_split_without_clips_that_lack_a_stream(model, clips):
    """People's own folders have none: nothing is measured there, and the findings say so."""
    own = dataclasses.replace(clips, clips=tuple(c for c in clips.clips if c.condition in ("factual", "counterfactual")))
    found = diagnose(model, own, DiagnoseSettings.quick(4, max_new_tokens=4, flips=20), "test", progress=False)
    assert {f.condition for f in found.following} == {"factual", "counterfactual"}
    assert any("Abstention was not measured on muted and blanked clips" in s for s in found.left_out)
    without = diagnose(model, clips, DiagnoseSettings.quick(4, bare=0, max_new_tokens=4, flips=20), "test", progress=False)
    assert {f.condition for f in without.following} == {"factual", "counterfactual"} and not any("Abstention" in s for s in without.left_out)


def test_a_model_that_has_learnt_to_hear_nothing(model_folder, clips):
    """Taught on built muted clips alone it says so of every clip: abstention where nothing can be heard, false abstention where something can."""
    model = load_model(model_folder)
    teach(model, clips, True, 100, ("muted",))
    found = diagnose(model, clips, DiagnoseSettings.quick(12, bare=None, grids=0, max_new_tokens=10, flips=20), "test", progress=False)
    for condition, n in (("muted", 6), ("near_silent", 6), ("factual", 12), ("counterfactual", 12)):
        row = found.following_rate(condition, "hear")
        assert (row.nothing.value, row.nothing.n, row.invented) == (1.0, n, 0.0), condition
        assert row.correct.value == (0.0 if condition.endswith("factual") else 1.0)
    for row in (found.following_rate("muted", "see"), found.following_rate("blanked", "see")):
        assert row.nothing.value == 0.0


def test_grids_beyond_the_clips_asked_about_are_still_scored(model, clips):
    settings = DiagnoseSettings.quick(2, grids=3, max_new_tokens=4, flips=20)
    found = diagnose(model, clips, settings, "test", progress=False)
    assert found.reliance[0].shortcut.n == 3 and found.following_rate("factual", "hear").audio.n == 2


def test_without_a_base_the_findings_say_so(model_folder, clips):
    model = load_model(model_folder)
    model.base_path = None
    settings = DiagnoseSettings.quick(4, shift=2, max_new_tokens=10, flips=20)
    found = diagnose(model, clips, settings, "test", progress=False)
    assert found.base is None and found.shift and any("proxy is the same model without its sound" in s for s in found.left_out)


def test_a_split_without_clips_is_refused(model, clips):
    with pytest.raises(DataError, match="no factual or counterfactual clips of the split 'test'"):
        diagnose(model, clips, DiagnoseSettings(counterfactual=0, factual=0), "test", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch"),
        ({"factual": -1}, "factual is -1"),
        ({"probe_folds": 1}, "probe_folds"),
        ({"factual": 0, "alone": 4}, "of 0 factual clips"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(SettingsError, match=message):
        DiagnoseSettings(**change)


@pytest.mark.parametrize("name", ["counterfactual", "alone", "bare", "grids", "unseen"])
def test_each_kind_of_clip_can_be_left_out_alone(clips, name):
    read = {(c.split, c.condition) for c in used(clips, "test", dataclasses.replace(SMALL, **{name: 0}))}
    assert {split for split, _ in read} == ({"test"} if name == "unseen" else {"test", "unseen"})
    assert ("test", "factual") in read and (("test", "muted") in read) == (name != "bare")


def test_what_ablations_measure(model, clips):
    """Their sets leave the unseen split out and ask about streams alone."""
    named = [yaml.safe_load(path.read_text())["common"] for path in Path("configs/ablations").glob("*.yaml")]
    [asked] = {json.dumps(common["diagnosis.test"], sort_keys=True) for common in named if "alone" in common.get("diagnosis.test", {})}
    small = {"counterfactual": 4, "factual": 4, "bare": 2, "grids": 2, "max_new_tokens": 4, "alone": 4, "captions": 2}
    found = diagnose(model, clips, DiagnoseSettings(**json.loads(asked) | small), "test", progress=False)
    assert {f.condition for f in found.following} >= {"factual", "counterfactual", "audio_only", "video_only"}
    assert not any(f.condition.startswith("unseen") for f in found.following) and found.fidelity and found.reliance


def test_a_site_that_there_is_not_is_refused(model, clips):
    with pytest.raises(SettingsError, match="knockout_sites names x; the sites are video->emitters"):
        diagnose(model, clips, DiagnoseSettings(knockout_sites=("x",)), progress=False)


def test_captions_under_cuts_are_those_of_clips_that_did_not_choose_them(findings, model, clips):
    assert {(c.condition, c.modality) for c in findings.captions if c.cut is None} == {
        (c, m) for c in ("factual", "counterfactual", "muted", "near_silent", "blanked", "near_black") for m in ("see", "hear", "both")
    }
    under = [c for c in findings.captions if c.cut]
    assert len({c.cut for c in under}) == 5 and not any("->audio" in c.cut or "->video" in c.cut for c in under)
    chosen_on = {c.clip for c in under if c.condition == "counterfactual"}
    swept = [c.id for c in choose(clips, "test", SMALL).counterfactual[:6]]
    assert chosen_on < set(swept)
    for row in findings.fidelity:
        assert row.unparsed.n == len([c for c in findings.captions if (c.condition, c.modality, c.cut) == (row.condition, row.question, row.cut)])
        assert (row.audio_change is not None) == (row.cut is not None and row.question != "see")
        if row.audio_change:
            plain = {c.clip: c.scores[0].audio for c in findings.captions if (c.condition, c.modality, c.cut) == (row.condition, row.question, None)}
            mine = [c for c in under if (c.condition, c.modality, c.cut) == (row.condition, row.question, row.cut) and c.scores[0].parsed]
            changes = [c.scores[0].audio - plain[c.clip] for c in mine if plain[c.clip] is not None]
            assert row.audio_change.value == pytest.approx(sum(changes) / len(changes)) and row.audio_change.n == len(changes)


@pytest.fixture(scope="module")
def half_trained(clips):
    """The unseen split by hand: of six classes the recordings of the first three and the pictures of the last four are in the train split; in one
    of them, the dog's recording, only in a swapped clip.
    """
    trained = {"video": NAMES[2:], "audio": NAMES[:3]}
    swapped = next(c for c in clips.select("train", "counterfactual") if c.audio_label == "dog")
    factual = {c.video_label: c for c in clips.select("train", "factual")}

    def source(clip, stream):
        label = getattr(clip, f"{stream}_label")
        if clip is swapped and stream == "audio":
            return "the dog of swaps"
        if clip.split != "unseen" or not label:
            return getattr(clip, f"{stream}_source")
        if label == "dog" and stream == "audio":
            return "the dog of swaps"
        return getattr(factual[label], f"{stream}_source") if label in trained[stream] else f"new {stream} of a {label}"

    changed = (dataclasses.replace(c, video_source=source(c, "video"), audio_source=source(c, "audio")) for c in clips.clips)
    return dataclasses.replace(clips, clips=tuple(changed))


NAMES = ["dog", "cat", "rooster", "train", "bell", "rain"]


def test_no_rate_of_unseen_sources_has_a_trained_one(model, half_trained):
    found = diagnose(model, half_trained, dataclasses.replace(SMALL.answers_only(), unseen=None), "test", progress=False)
    conflicts = half_trained.select("unseen", "counterfactual")
    heard, seen = ([c for c in conflicts if c.audio_label in NAMES[3:]], [c for c in conflicts if c.video_label in NAMES[:2]])
    assert 0 < len(heard) < len(conflicts) and 0 < len(seen) < len(conflicts)
    counts = {(f.condition, f.question): (f.correct.n, f.trained) for f in found.following if f.condition.startswith("unseen")}
    assert counts == {
        ("unseen_factual", "hear"): (3, 3),
        ("unseen_factual", "see"): (2, 4),
        ("unseen_counterfactual", "hear"): (len(heard), len(conflicts) - len(heard)),
        ("unseen_counterfactual", "see"): (len(seen), len(conflicts) - len(seen)),
    }
    named = {f.condition: f.correct.value for f in found.following if f.question == "hear"}
    asked = [s for s in found.samples if (s.condition, s.modality) == ("unseen_counterfactual", "hear")]
    assert {s.clip for s in asked} == {c.id for c in heard}
    assert named["unseen_counterfactual"] == pytest.approx(sum(s.correct for s in asked) / len(asked))
    assert all(s.audio_source.startswith("new") for s in asked)
    dogs = {c.id for c in half_trained.clips if c.split == "unseen" and c.audio_source == "the dog of swaps"}
    assert dogs and not dogs & {s.clip for s in found.samples if s.modality == "hear"}
    [test, unseen] = found.sources
    assert test.split == "test" and dataclasses.astuple(unseen)[:-1] == ("unseen", 4, 6, 3, 6)
    said = found.trained_on()
    assert said[1] == "Unseen split: 4 of 6 pictures and 3 of 6 recordings are in the train split too, in other renderings."
    left = "3 clips of a new recording; 3 whose recording the train split has are left out."
    assert f"Unseen sources, factual clips, asked what it hears: {left}" in said
    again = diagnose(model, half_trained, dataclasses.replace(SMALL.answers_only(), unseen=2), "test", progress=False)
    sums = {(f.condition, f.question): f.correct.n + f.trained for f in again.following if f.condition.startswith("unseen")}
    assert sums == dict.fromkeys(counts, 2)


def test_the_unseen_split_itself_looks_into_new_clips_only(model, half_trained):
    """Everything but answers is of clips that are new in both streams; of the six classes no factual clip is, a conflict has to be of a new sound
    with a new picture.
    """
    settings = dataclasses.replace(SMALL, counterfactual=None, factual=None, grids=None, knockout=None, captions=None, bare=None)
    found = diagnose(model, half_trained, settings, "unseen", progress=False)
    whole = {c.id for c in half_trained.select("unseen", "counterfactual") if c.audio_label in NAMES[3:] and c.video_label in NAMES[:2]}
    assert whole and not found.reliance
    assert found.captions and {c.clip for c in found.captions} <= whole
    for row in found.following:
        new = [s for s in found.samples if (s.condition, s.modality) == (row.condition, row.question)]
        assert row.correct.n == len(new) and all((s.audio_source if row.question == "hear" else s.video_source).startswith("new") for s in new)
    for items in found.items:
        if any(not key.startswith(("following", "reliance")) for key in items.values):
            assert set(items.ids) <= whole
    assert any("have no source that the train split has" in sentence for sentence in found.left_out)


def test_disjoint_sources_and_no_train_split_are_said(model, clips):
    few = dataclasses.replace(SMALL.answers_only(), counterfactual=2, factual=2, bare=0, grids=0)
    own = [dataclasses.replace(c, video_source=f"my {c.video_source}", audio_source=f"my {c.audio_source}") for c in clips.select("test")]
    rest = [c for c in clips.clips if c.split != "test"]
    found = diagnose(model, dataclasses.replace(clips, clips=(*own, *rest)), few, "test", progress=False)
    assert found.trained_on()[0].startswith("Test split: 0 of ") and " and 0 of " in found.trained_on()[0]
    tested = dataclasses.replace(clips, clips=tuple(clips.select("test")), grids=())
    [first, last] = diagnose(model, tested, few, "test", progress=False).trained_on()
    assert first.startswith("Test split: 0 of ")
    assert last == "The clip folder has no train split, so whether its sources were trained on is not known."


def test_findings_warn_where_many_answers_ended_at_the_limit():
    """Of 20 answers to a question 2 are more than 5 %, 1 is not; the sentence says which question, how many, the limit and what to raise."""

    def said(i, modality, cut_off):
        return Sample(f"c{i}", "f", "factual", "a dog", "a dog barking", "?", modality, "", "unparsed", "p", "s", cut_off)

    made = Findings("m", None, None, "test", "h", 2, {}, samples=[said(i, m, i < n) for m, n in (("hear", 2), ("see", 1)) for i in range(20)])
    (sentence,) = cut_off_sentences(made, {"hear": 24, "see": 24, "both": 48})
    assert sentence.startswith("10 % of the answers to “What do you hear?” ended at the limit of 24 tokens") and "--max-new-tokens" in sentence
