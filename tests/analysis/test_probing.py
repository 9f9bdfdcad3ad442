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
    SHRINKAGE,
    LensTally,
    ProbeFeatures,
    first_token,
    halves,
    lens_hits,
    make_folds,
    probe_predictions,
    probe_rows,
    random_weights,
)
from analysis.visits import Subject, Visit
from data.clips import Clip
from data.questions import question
from models import Kind, load_model
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
    found = probe_predictions(states, [labels, other], folds, 5)
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
    found = probe_predictions(states, [labels], [(np.arange(6), np.array([6])), (np.arange(0), np.arange(6))], 3)[0]
    assert found[6] in (0, 1) and (found[:6] == -1).all()


def features_of(clips, make) -> ProbeFeatures:
    """Features whose layer l at position p are make(l, p, clip)."""
    out = ProbeFeatures()
    out.clips = clips
    out._states = [np.array([[[make(layer, p, c) for p in range(3)] for layer in range(2)] for c in clips])]
    return out


def test_probes_find_a_planted_label_and_controls_do_not():
    clips, rng = conflicts(200, classes=6, renderings=30), np.random.default_rng(0)
    code = {f"k{i}": rng.normal(size=10) for i in range(6)}

    def planted(layer, position, clip):
        return rng.normal(size=10) * 0.3 + (code[clip.audio_label] if layer == 1 and position == 2 else 0)

    silent = features_of(clips, lambda *_: rng.normal(size=10))
    rows = {(r.position, r.label): r for r in probe_rows(features_of(clips, planted), silent, silent, k=5, items=ItemStore(), seed=0)}
    found = rows["last_prompt", "audio"]
    assert found.accuracy[1].value > 0.95 and found.accuracy[0].value < 0.35
    assert found.selectivity[1].value > 0.6 and abs(found.selectivity[0].value) < 0.15
    assert max(found.shuffled) < 0.3 and found.audio_removed is not None and found.random_weights is not None
    assert found.selectivity[1].value == pytest.approx(
        found.accuracy[1].value - max(found.shuffled[1], found.audio_removed[1], found.random_weights[1])
    )
    assert rows["last_prompt", "visual"].accuracy[1].value < 0.35 and rows["question", "audio"].accuracy[1].value < 0.35
    assert rows["audio", "audio"].audio_removed is None and rows["last_prompt", "visual"].audio_removed is None
    assert found.accuracy[1].n == 200 and "no rendering" in found.folds


def test_knowing_the_rendering_only_does_not_help():
    """States that tell renderings apart, and nothing else: with folds that leak, accuracy would be near 1."""
    clips, rng = conflicts(240, classes=6, renderings=5), np.random.default_rng(1)
    code = {r: rng.normal(size=40) for r in {c.audio_rendering for c in clips}}
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
    assert states.shape == (3, model.n_layers + 1, 3, model.hidden_size)
    for row, clip in enumerate(found):
        batch = model.batch([model.sequence(model.media(clip, clips.root), question("hear"), "")])
        whole, kinds = reference.forward(model, batch, [()])[1], batch.kinds[0]
        for layer, x in enumerate(whole):
            expected = torch.stack([x[0, kinds == Kind.AUDIO].mean(0), x[0, kinds == Kind.QUESTION].mean(0), x[0, -1]])
            assert np.allclose(states[row, layer], expected, atol=1e-4)
    silent = ProbeFeatures()
    silent.add(Visit(subject, found, "x", audio=False, taps=True))
    assert np.isnan(silent.states()[:, :, 0]).all() and np.isfinite(silent.states()[:, :, 1:]).all()


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
    tally._hits = {(position, label): [hits] for position in ("audio", "question", "emitters") for label in ("audio", "visual")}
    tally.said = [row % 2 == 0 for row in range(n)]
    rows = {(r.position, r.label): r for r in tally.rows(ItemStore())}
    assert len(rows) == 6 and rows["audio", "audio"].k == 5
    assert [e.value for e in rows["audio", "audio"].hit] == [0, 0, 1, 0]
    assert rows["audio", "audio"].control == pytest.approx([0, 0, 0.2, 0]) and [e.value for e in rows["audio", "audio"].corrected] == pytest.approx(
        [0, 0, 0.8, 0]
    )
    latent = tally.latent(ItemStore())
    _, report = halves(tally.clips)
    assert latent.layer == 2 and latent.latent.value == pytest.approx(0.8) and latent.latent.n == len(report)
    assert latent.said.value == pytest.approx(np.mean([tally.said[i] for i in report]))


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
