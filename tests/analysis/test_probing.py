"""Folds that leak nothing, probes against scikit-learn and on planted labels, the lens with hand-made weights."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.preprocessing import StandardScaler

from analysis.items import ItemStore
from analysis.probing import (
    DRAWS,
    POSITIONS,
    SHRINKAGE,
    SHUFFLES,
    LensTally,
    ProbeFeatures,
    control_task,
    first_token,
    halves,
    lens_hits,
    make_folds,
    probe_predictions,
    probe_rows,
    random_weights,
    several,
    sound_rows,
)
from analysis.visits import Subject, Visit
from data.clips import Clip
from data.questions import question
from models import Kind, load_model
from tests.analysis import brute
from tests.models import reference


def conflicts(n, classes=12, renderings=4, seed=0) -> list[Clip]:
    """Random conflicts in which every rendering is used by about n / (classes x renderings) clips of each kind."""
    rng = random.Random(seed)
    out = []
    while len(out) < n:
        v, a = rng.sample(range(classes), 2)
        i, j = rng.randrange(renderings), rng.randrange(renderings)
        out.append(
            Clip(
                f"c{len(out)}", "f.mp4", "test", "counterfactual", f"k{v}", f"k{a}", "s", "h", f"p{v}", f"r{a}", f"{v}_{i}", f"{a}_{j}", "x", "y", 2.0
            )
        )
    return out


@pytest.mark.parametrize(("n", "k", "seed"), [(60, 2, 0), (60, 5, 1), (150, 10, 2), (7, 3, 3), (3, 5, 4)])
def test_folds_leak_neither_renderings_nor_pairs(n, k, seed):
    clips = conflicts(n, seed=seed)
    folds = make_folds(clips, k)
    assert sorted(i for _, test in folds for i in test) == list(range(n))
    for train, test in folds:
        assert len(test) <= -(-n // k)
        for key in (lambda c: c.video_rendering, lambda c: c.audio_rendering, lambda c: frozenset((c.video_label, c.audio_label))):
            assert not {key(clips[i]) for i in train} & {key(clips[i]) for i in test}
    assert [(a.tolist(), b.tolist()) for a, b in folds] == [(a.tolist(), b.tolist()) for a, b in make_folds(clips, k)]


def test_folds_keep_most_training_clips_of_a_real_set(clips):
    found = clips.select("test", "counterfactual")
    folds = make_folds(found, 4)
    assert all(set(train) | set(test) for train, test in folds)
    grid = make_folds(conflicts(300, classes=40, renderings=8), 10)
    assert np.mean([len(train) for train, _ in grid]) > 200


def test_halves():
    choose, report = halves(conflicts(80))
    assert len(choose) == 40 and 0 < len(report) <= 40 and not set(choose) & set(report)
    assert [len(part) for part in halves(conflicts(1))] == [1, 0]


@pytest.mark.parametrize("width", [6, 200])
def test_predictions_are_those_of_scikit_learn_with_equal_priors(width):
    rng = np.random.default_rng(0)
    labels, other = rng.integers(5, size=90), rng.integers(5, size=90)
    states = rng.normal(size=(90, width)) * rng.uniform(0.5, 3, size=width) + rng.normal(size=(5, width))[labels]
    folds = [(np.setdiff1d(np.arange(90), test), test) for test in np.array_split(rng.permutation(90), 4)]
    found = probe_predictions(states, [labels, other], folds)
    for target, prediction in zip((labels, other), found, strict=True):
        for train, test in folds:
            scaler = StandardScaler().fit(states[train])
            lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE).fit(scaler.transform(states[train]), target[train])
            scores = lda.decision_function(scaler.transform(states[test])) - np.log(lda.priors_)
            assert np.array_equal(scores.argmax(1), prediction[test])
    assert (found[0] == labels).mean() > 0.5


def test_a_class_without_training_clips_is_never_predicted():
    labels = np.array([0, 0, 0, 1, 1, 1, 2])
    states = np.random.default_rng(0).normal(size=(7, 3))
    found = probe_predictions(states, [labels], [(np.arange(6), np.array([6])), (np.arange(0), np.arange(6))])[0]
    assert found[6] in (0, 1) and (found[:6] == -1).all()


def features_of(clips, make) -> ProbeFeatures:
    """Features whose layer l at position p are make(l, p, clip)."""
    out = ProbeFeatures()
    out.clips = clips
    out._states = [np.array([[[make(layer, p, c) for p in POSITIONS] for layer in range(2)] for c in clips])]
    return out


def sourced(clips, pictures=1, recordings=1) -> list[Clip]:
    """The clips with so many sources to a class, each rendering from one of them."""

    def source(rendering: str, kind: str, count: int) -> str:
        name, rank = rendering.split("_")
        return f"{kind}{name}.{int(rank) % count}"

    return [replace(c, video_source=source(c.video_rendering, "p", pictures), audio_source=source(c.audio_rendering, "r", recordings)) for c in clips]


def test_probes_find_a_planted_label_and_controls_do_not():
    clips, rng = sourced(conflicts(200, classes=6, renderings=30), recordings=5), np.random.default_rng(0)
    code = {f"k{i}": rng.normal(size=10) for i in range(6)}

    def planted(layer, position, clip):
        return rng.normal(size=10) * 0.3 + (code[clip.audio_label] if layer == 1 and position == "last_prompt" else 0)

    silent = features_of(clips, lambda _, position, __: rng.normal(size=10) * (np.nan if position.startswith("audio") else 1))
    rows = {
        (r.position, r.label): r
        for r in probe_rows(features_of(clips, planted), silent, features_of(clips, lambda *_: rng.normal(size=10)), k=5, items=ItemStore(), seed=0)
    }
    found = rows["last_prompt", "audio"]
    assert found.accuracy[1].value > 0.95 and found.accuracy[0].value < 0.35
    assert found.selectivity[1].value > 0.6 and abs(found.selectivity[0].value) < 0.15
    assert max(found.shuffled) < 0.3 and found.audio_removed is not None and found.random_weights is not None
    assert found.selectivity[1].value == pytest.approx(
        found.accuracy[1].value - max(found.shuffled[1], found.control_task[1], found.audio_removed[1], found.random_weights[1])
    )
    assert rows["last_prompt", "visual"].accuracy[1].value < 0.35 and rows["question", "audio"].accuracy[1].value < 0.35
    assert rows["audio", "audio"].audio_removed is None and rows["last_prompt", "visual"].audio_removed is None
    assert found.accuracy[1].n == 200 and "no rendering" in found.folds


def test_the_control_task_is_a_random_label_a_source():
    """Twelve recordings of six classes draw from these classes, twice as often from the class that has twice as many."""
    clips = [c for c in sourced(conflicts(400, classes=6, renderings=12), recordings=2) if c.audio_label != "k0" or c.audio_source == "r0.0"]
    drawn: dict[str, int] = {}
    for seed in range(300):
        task = control_task(clips, "audio", np.random.default_rng(seed))
        by_source = {c.audio_source: name for c, name in zip(clips, task, strict=True)}
        assert all(by_source[c.audio_source] == name for c, name in zip(clips, task, strict=True)) and len(by_source) == 11
        for name in by_source.values():
            drawn[name] = drawn.get(name, 0) + 1
    share = {name: count / 300 / 11 for name, count in drawn.items()}
    assert share == pytest.approx({"k0": 1 / 11, **{f"k{i}": 2 / 11 for i in range(1, 6)}}, abs=0.03)
    assert control_task(clips, "audio", np.random.default_rng(4)) == control_task(clips, "audio", np.random.default_rng(4))
    visual = control_task(clips, "visual", np.random.default_rng(0))
    assert len({(c.video_source, name) for c, name in zip(clips, visual, strict=True)}) == 6


def test_a_probe_that_knows_sources_by_heart_has_no_selectivity():
    """One source a class, each on an axis of its own: any labels of sources can be read off, so it is not the class that was found."""
    clips, rng = conflicts(240, classes=8, renderings=30), np.random.default_rng(0)
    axis = {source: row for source, row in zip(sorted({c.audio_source for c in clips}), np.eye(8), strict=True)}
    rows = probe_rows(
        features_of(clips, lambda *args: axis[args[2].audio_source] + 0.01 * rng.normal(size=8)), None, None, k=6, items=ItemStore(), seed=0
    )
    found = next(r for r in rows if (r.position, r.label) == ("last_prompt", "audio"))
    assert [e.value for e in found.accuracy] == found.control_task == [1, 1] and max(found.shuffled) < 0.3
    assert [e.value for e in found.selectivity] == [0, 0]
    assert f"a random label for each of 8 recordings, mean of {DRAWS} draws (seed 0)" in found.folds


def test_a_label_read_in_many_sources_is_selective():
    """Six recordings a class, none of them known from training: the class is read, and labels of recordings are not."""
    clips, rng = sourced(conflicts(300, classes=6, renderings=30), recordings=6), np.random.default_rng(0)
    code = {name: rng.normal(size=12) for name in [*(f"k{i}" for i in range(6)), *sorted({c.audio_source for c in clips})]}
    rows = probe_rows(
        features_of(clips, lambda *args: 3 * code[args[2].audio_label] + code[args[2].audio_source] + 0.1 * rng.normal(size=12)),
        None, None, k=6, items=ItemStore(), seed=0,
    )  # fmt: skip
    found = next(r for r in rows if (r.position, r.label) == ("last_prompt", "audio"))
    assert found.accuracy[0].value > 0.9 and found.control_task[0] < 0.35 and found.selectivity[0].value > 0.6
    assert "for the 6 of 6 classes that have several recordings, any recording" in found.folds
    visual = next(r for r in rows if (r.position, r.label) == ("last_prompt", "visual"))
    assert "for the 0 of 6 classes that have several pictures" in visual.folds


def test_recordings_by_heart_are_no_class_where_a_class_has_several():
    """Recordings are told apart, and nothing ties those of one class together: with a recording in both parts the class could be read by heart."""
    clips, rng = sourced(conflicts(300, classes=6, renderings=30), recordings=3), np.random.default_rng(0)
    axis = {source: row for source, row in zip(sorted({c.audio_source for c in clips}), np.eye(18), strict=True)}
    rows = probe_rows(
        features_of(clips, lambda *args: axis[args[2].audio_source] + 0.01 * rng.normal(size=18)), None, None, k=6, items=ItemStore(), seed=0
    )
    assert next(r for r in rows if (r.position, r.label) == ("last_prompt", "audio")).accuracy[0].value < 0.4


@pytest.mark.parametrize(("n", "k", "recordings", "seed"), [(150, 10, 2, 0), (80, 5, 3, 1), (200, 2, 2, 2), (120, 10, 5, 3)])
def test_no_source_of_a_class_that_has_several_is_in_both_parts(n, k, recordings, seed):
    clips = sourced(conflicts(n, renderings=10, seed=seed), recordings=recordings)
    clips = [replace(c, audio_source="r0.0") if c.audio_label == "k0" else c for c in clips]
    groups = several(clips, "audio")
    assert {c.audio_label for c, group in zip(clips, groups, strict=True) if not group} == {"k0"} and not any(several(clips, "visual"))
    folds = make_folds(clips, k, "audio")
    assert sorted(i for _, test in folds for i in test) == list(range(n)) and len(folds) <= 2 * k + 1
    for train, test in folds:
        assert not {groups[i] for i in train if groups[i]} & {groups[i] for i in test if groups[i]}
        for key in (lambda c: c.video_rendering, lambda c: c.audio_rendering, lambda c: frozenset((c.video_label, c.audio_label))):
            assert not {key(clips[i]) for i in train} & {key(clips[i]) for i in test}
    untaught = [i for train, test in folds for i in test if clips[i].audio_label not in {clips[j].audio_label for j in train}]
    assert not untaught or k == 2


def test_the_control_task_is_read_by_the_same_probe_in_the_same_folds():
    """Against scikit-learn, labelling by labelling."""
    clips, rng = sourced(conflicts(160, classes=7, renderings=20), recordings=2), np.random.default_rng(3)
    code = {source: rng.normal(size=5) for source in sorted({c.audio_source for c in clips})}
    features = features_of(clips, lambda *args: code[args[2].audio_source] + 0.3 * rng.normal(size=5))
    rows = {(r.position, r.label): r for r in probe_rows(features, None, None, k=5, items=ItemStore(), seed=11)}
    order = np.random.default_rng(11)
    for _ in range(2 * SHUFFLES):
        order.permutation(len(clips))
    for label in ("audio", "visual"):
        tasks = [control_task(clips, label, order) for _ in range(DRAWS)]
        folds = make_folds(clips, 5, label)
        for layer in range(2):
            wanted = np.mean([brute.probe_accuracy(features.states()[:, layer, 2], task, folds) for task in tasks])
            assert rows["question", label].control_task[layer] == pytest.approx(wanted)
    assert 0.05 < rows["question", "visual"].control_task[0] < 0.9


def test_knowing_the_rendering_only_does_not_help():
    """States that tell renderings apart, and nothing else: with folds that leak, accuracy would be near 1."""
    clips, rng = conflicts(240, classes=6, renderings=5), np.random.default_rng(1)
    code = {r: rng.normal(size=40) for r in sorted({c.audio_rendering for c in clips})}
    rows = probe_rows(
        features_of(clips, lambda _, __, c: code[c.audio_rendering] + 0.01 * rng.normal(size=40)), None, None, k=10, items=ItemStore(), seed=0
    )
    assert next(r for r in rows if (r.position, r.label) == ("question", "audio")).accuracy[0].value < 0.4


def test_classes_that_no_fold_could_teach_are_counted():
    """Four clips, each class in one of them: whichever is tested, nothing of its class is left to learn from."""
    clips = [
        replace(c, video_label=f"v{i}", audio_label=f"a{i}", video_rendering=f"v{i}", audio_rendering=f"a{i}") for i, c in enumerate(conflicts(4))
    ]
    rows = probe_rows(features_of(clips, lambda *_: np.zeros(3)), None, None, 2, ItemStore(), 0)
    assert all("100.0% of clips are of a class without training clips" in row.folds for row in rows)
    rows = probe_rows(features_of(conflicts(200, classes=6, renderings=30), lambda *_: np.zeros(3)), None, None, 5, ItemStore(), 0)
    assert all("; 0.0% of clips" in row.folds for row in rows)


def test_a_control_of_other_clips_is_refused():
    clips = conflicts(20)
    other = features_of(list(reversed(clips)), lambda *_: np.zeros(3))
    with pytest.raises(ValueError, match="same clips in the same order"):
        probe_rows(features_of(clips, lambda *_: np.zeros(3)), other, None, 2, ItemStore(), 0)


def test_features_are_the_states_of_a_whole_forward_pass(subject, clips, model):
    found = clips.select("test", "counterfactual")[:3]
    features = ProbeFeatures()
    features.add(Visit(subject, found, "counterfactual", taps=True))
    states = features.states()
    assert states.shape == (3, model.n_layers + 1, 4, model.hidden_size)
    for row, clip in enumerate(found):
        batch = model.batch([model.sequence(model.media(clip, clips.root), question("hear"), "")])
        whole, kinds, ids = reference.forward(model, batch, [()])[1], batch.kinds[0], batch.inputs["input_ids"][0]
        end = ids == model.tokenizer.convert_tokens_to_ids("<|audio_eos|>")
        for layer, x in enumerate(whole):
            expected = torch.stack([x[0, ids == model.audio_id].mean(0), x[0, end][0], x[0, kinds == Kind.QUESTION].mean(0), x[0, -1]])
            assert np.allclose(states[row, layer], expected, atol=1e-4)
    silent = ProbeFeatures()
    silent.add(Visit(subject, found, "x", audio=False, taps=True))
    assert np.isnan(silent.states()[:, :, :2]).all() and np.isfinite(silent.states()[:, :, 2:]).all()


def test_random_weights_come_and_go(subject, clips, model):
    found = clips.select("test", "counterfactual")[:2]

    def states():
        out = ProbeFeatures()
        out.add(Visit(subject, found, "x", taps=True))
        return out.states()

    before = states()
    with pytest.raises(RuntimeError, match="on purpose"), random_weights(model, seed=1):
        inside = states()
        raise RuntimeError("on purpose")
    with random_weights(model, seed=1):
        assert np.array_equal(states(), inside)
    assert np.array_equal(states(), before)
    assert np.allclose(inside[:, 0], before[:, 0]) and not np.allclose(inside[:, -1], before[:, -1], atol=0.1)


# ---------------------------------------------------------------- logit lens


@pytest.fixture(scope="module")
def lettered(model_folder):
    """The tiny model with a head in which state axis i raises token i alone, and a norm that changes no order."""
    model = load_model(model_folder)
    with torch.no_grad():
        model.text_model.norm.weight.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[torch.arange(20), torch.arange(20)] = torch.linspace(2.0, 1.0, 20)
    return model


def hits_of(model, states, mask, table, k):
    return lens_hits(lambda rows, _: model.lens(rows), 0, states, mask, table, k)


def test_lens_hits_by_hand(lettered):
    """Three clips of two rows; classes {token 3}, {tokens 5, 7}. Top 1 is the largest axis; in top 2 the next one comes in too."""
    axes = torch.eye(20, lettered.hidden_size)
    states = torch.stack([torch.stack([9 * axes[3] + axes[5], axes[0]]), torch.stack([axes[7], axes[3]]), torch.stack([axes[1], axes[2]])])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    table = torch.zeros(lettered.head.weight.shape[0], 2, dtype=torch.bool)
    table[3, 0] = table[5, 1] = table[7, 1] = True
    assert hits_of(lettered, states, mask, {"audio": table}, 1)["audio"].tolist() == [[True, False], [False, True], [False, False]]
    assert hits_of(lettered, states[:1], mask[:1], {"audio": table}, 2)["audio"].tolist() == [[True, True]]


def test_lens_goes_through_the_final_norm(lettered):
    """A large constant on a muted axis drowns the rest unless the norm's weight takes it out."""
    state = torch.zeros(1, 1, lettered.hidden_size)
    state[..., 4], state[..., 6] = 1.0, 50.0
    table = torch.zeros(lettered.head.weight.shape[0], 1, dtype=torch.bool)
    table[4, 0] = True
    assert not hits_of(lettered, state, torch.ones(1, 1, dtype=torch.bool), {"audio": table}, 1)["audio"].any()
    with torch.no_grad():
        lettered.text_model.norm.weight[6] = 0.0
        hit = hits_of(lettered, state, torch.ones(1, 1, dtype=torch.bool), {"audio": table}, 1)["audio"]
        lettered.text_model.norm.weight[6] = 1.0
    assert hit.all()


def test_corrected_rate_and_latent_layer_by_hand(subject, clips):
    """Hits planted so that in layer 2 the true sound is always seen, and one wrong class of the five; in the other layers nothing."""
    tally = LensTally(subject, k=5)
    tally.clips = clips.select("test", "counterfactual")
    n, classes = len(tally.clips), len(tally.classes)
    assert classes == 6
    hits = np.zeros((n, 4, classes), dtype=bool)
    for row, clip in enumerate(tally.clips):
        true = tally.classes.index(clip.audio_label)
        hits[row, 2, [true, (true + 1) % classes]] = True
    choose, report = halves(tally.clips)
    end = np.zeros_like(hits)  # at the delimiter layer 3 sees the sound in every clip of one half and in none of the other, layer 1 in half of them
    for row, clip in enumerate(tally.clips):
        end[row, 3, tally.classes.index(clip.audio_label)] = row in set(report)
        end[row, 1, tally.classes.index(clip.audio_label)] = row in set(choose[::2]) | set(report[::2])
    tally._hits = {(position, label): [hits] for position in ("audio", "question", "emitters") for label in ("audio", "visual")}
    tally._hits |= {("audio_end", label): [end] for label in ("audio", "visual")}
    tally.said = [row % 2 == 0 for row in range(n)]
    rows = {(r.position, r.label): r for r in tally.rows(ItemStore())}
    assert len(rows) == 8 and rows["audio", "audio"].k == 5
    assert [e.value for e in rows["audio", "audio"].hit] == [0, 0, 1, 0]
    assert rows["audio", "audio"].control == pytest.approx([0, 0, 0.2, 0]) and [e.value for e in rows["audio", "audio"].corrected] == pytest.approx(
        [0, 0, 0.8, 0]
    )
    items = ItemStore()
    latent = tally.latent(items)
    assert latent.layer == 2 and latent.latent.value == pytest.approx(0.8) and latent.latent.n == len(report)
    assert latent.said.value == pytest.approx(np.mean([tally.said[i] for i in report])) and (latent.k, latent.pooling) == (5, "any row")
    assert latent.swapped.layer == 2 and latent.swapped.rate.value == pytest.approx(0.8) and latent.swapped.rate.n == len(choose)
    # Chosen where half of the clips are read, reported on the other half of the clips; and chosen where all are, reported where none is.
    assert latent.end.layer == 1 and latent.end.rate.value == pytest.approx(len(report[::2]) / len(report))
    assert latent.end_swapped.layer == 3 and latent.end_swapped.rate.value == 0 and latent.end_swapped.rate.n == len(choose)
    kept = [key for found in items.saved() for key in found.values]
    assert sorted(kept) == sorted(
        [f"latent|||{name}|latent" for name in ("", "halves exchanged", "end-of-audio token", "end-of-audio token, halves exchanged")]
        + ["latent||||said"]
    )


def test_the_sounds_own_rows_and_its_end(subject, clips, model):
    """The delimiters stand once, around picture and sound of all chunks; the closing one is neither among the sound's rows nor the opening one."""
    found = clips.select("test", "counterfactual")[:3]
    visit = Visit(subject, found, "counterfactual")
    own, end = sound_rows(visit)
    for row, clip in enumerate(found):
        media = model.media(clip, clips.root)
        ids = model.layout(media).ids.tolist()
        names = {name: model.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("audio_bos", "audio_eos", "AUDIO", "VIDEO")}
        assert ids.count(names["audio_bos"]) == ids.count(names["audio_eos"]) == 1
        assert own[row].nonzero()[:, 0].tolist() == [i for i, t in enumerate(ids) if t == names["AUDIO"]]
        assert int(own[row].sum()) == len(media.audio.features)
        assert end[row].nonzero()[:, 0].tolist() == [ids.index(names["audio_eos"])] and ids.index(names["audio_eos"]) > max(
            i for i, t in enumerate(ids) if t in (names["AUDIO"], names["VIDEO"])
        )
    alone = sound_rows(Visit(subject, found, "audio_only", video=False))
    assert alone[1].sum(1).tolist() == [1, 1, 1] and torch.equal(alone[0].sum(1), own.sum(1))
    assert not any(rows.any() for rows in sound_rows(Visit(subject, found, "video_only", audio=False)))


def test_what_only_the_end_of_the_sound_says_is_not_read_in_the_sound(subject, clips, lettered):
    """Every row of the prompt says a word of no class, the closing delimiter the true sound's: nothing at the sound's rows, all at the delimiter."""
    found = clips.select("test", "counterfactual")
    tally = LensTally(subject, k=1, read=lambda states, _: states)  # states are logits
    visit = Visit(subject, found, "counterfactual", taps=True)
    table = tally.table["audio"]
    idle = int((~table.any(1)).nonzero()[0])
    own = [int((table[:, tally.classes.index(c.audio_label)] & (table.sum(1) == 1)).nonzero()[0]) for c in found]
    eos = subject.model.tokenizer.convert_tokens_to_ids("<|audio_eos|>")
    said = torch.nn.functional.one_hot(torch.full(visit.prefix.kinds.shape, idle), len(table)).float()
    for row, media in enumerate(visit.media):
        at = subject.model.layout(media).ids.tolist().index(eos)
        said[row, at] = torch.nn.functional.one_hot(torch.tensor(own[row]), len(table)).float()
    spoken = visit.spoken("hear")
    visit.prefix.hidden = (said,) * 4
    spoken.hidden = (torch.nn.functional.one_hot(torch.full(spoken.kinds.shape, idle), len(table)).float(),) * 4
    tally.add(visit)
    latent = tally.latent(ItemStore())
    assert (latent.latent.value, latent.swapped.rate.value) == (0, 0) and (latent.end.rate.value, latent.end_swapped.rate.value) == (1, 1)
    rows = {(r.position, r.label): r for r in tally.rows(ItemStore())}
    assert rows["audio", "audio"].hit[1].value == rows["question", "audio"].hit[1].value == 0 and rows["audio_end", "audio"].hit[1].value == 1


def test_lens_reads_the_spoken_answer_at_the_last_layer(subject, clips):
    """In the last layer the lens is the model's own output, so with k = 1 the emitters hit exactly the classes of the tokens that were said."""
    tally = LensTally(subject, k=1)
    visit = Visit(subject, clips.select("test", "counterfactual"), "counterfactual", taps=True)
    tally.add(visit)
    last = tally._hits["emitters", "audio"][0][:, -1]
    for row, ids in enumerate(visit.answer_ids("hear")):
        said = tally.table["audio"][torch.tensor([*ids, subject.model.end_id])].any(0)
        assert last[row].tolist() == said.tolist()


def test_first_token_stands_for_a_word_inside_a_sentence(model):
    ids = model.tokenizer("I hear a dog barking.", add_special_tokens=False)["input_ids"]
    assert first_token(model, "dog") in ids and model.tokenizer.decode([first_token(model, "dog")]).strip()


def test_no_hits_without_classes(clips, model):
    """The vocabulary is the clip folder's: other labels, other tables."""
    other = replace(clips, manifest={**copy.deepcopy(clips.manifest), "labels": [["x", "a dog", "a dog barking"], ["y", "a cat", "a cat meowing"]]})
    tally = LensTally(Subject(model, other))
    assert tally.table["audio"].shape[1] == 2 and int(tally.table["audio"][:, 0].sum()) == 2 and int(tally.table["visual"][:, 0].sum()) == 1
