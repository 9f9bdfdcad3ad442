"""The tuned lens on planted maps, against scikit-learn and written-out sums; what it is fitted on and what it is reported on."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from analysis import probing, tuned_lens
from analysis.items import ItemStore
from analysis.probing import LABELS, LENS_POSITIONS, LensTally, halves, lens_hits
from analysis.tuned_lens import PENALTIES, TunedLens, TunedLensFit, TunedTally, divergence, divergences, fit_layer, ridge, sampled
from analysis.visits import Subject, Visit
from models import Kind, load_model


@pytest.fixture(scope="module")
def conflicts(clips):
    return clips.select("test", "counterfactual")


@pytest.fixture(scope="module")
def fit(subject, conflicts):
    return fitted(subject, conflicts)


def fitted(subject, conflicts, parts=2) -> TunedLensFit:
    fit = TunedLensFit(subject, conflicts)
    for part in np.array_split(np.arange(len(conflicts)), parts):
        fit.add(Visit(subject, [conflicts[i] for i in part], "counterfactual", taps=True))
    return fit


@pytest.fixture(scope="module")
def lens(fit) -> TunedLens:
    found = fit.fit()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def tally(subject, lens, fit) -> TunedTally:
    tally = TunedTally(subject, lens)
    for start in range(0, len(fit.report), 5):
        tally.add(Visit(subject, fit.report[start : start + 5], "counterfactual", taps=True))
    return tally


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


# ---------------------------------------------------------------- the fit


def test_layers_that_turn_and_shift_the_states_are_undone(model):
    """The layers above turn and shift the states: the logit lens reads nothing right, the tuned lens nearly everything."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, model.hidden_size, generator=generator)
    turn, shift = rotation(model.hidden_size), torch.randn(model.hidden_size, generator=generator)
    y = x @ turn.T + shift
    held, new = torch.arange(600) % 5 == 0, torch.randn(100, model.hidden_size, generator=generator)
    weight, bias = fit_layer(model, x, y, held)
    lens = TunedLens(weight[None], bias[None], (), 600, 0)
    final = new @ turn.T + shift
    before, after = divergences(model, final, new), divergences(model, final, lens.states(new, 0))
    assert before.mean() > 0.1 and after.max() < 1e-4
    assert torch.allclose(weight, turn - torch.eye(len(turn)), atol=1e-2) and torch.allclose(bias, shift, atol=1e-2)
    said = model.lens(final).argmax(-1)
    table = {"audio": torch.nn.functional.one_hot(said, model.head.weight.shape[0]).T.bool()}  # class i: what row i says

    def hit(read):
        return lens_hits(read, 0, new[:, None], torch.ones(100, 1, dtype=torch.bool), table, 1)["audio"].diagonal().mean()

    assert hit(lambda states, _: model.lens(states)) < 0.2 and hit(lambda states, layer: lens.logits(model, states, layer)) == 1


def test_identity_where_the_layers_above_do_nothing(model_folder, clips, conflicts):
    model = load_model(model_folder)
    with torch.no_grad():
        for layer in model.text_model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    lens = fitted(Subject(model, clips, 12), conflicts).fit()
    assert lens.weight[0].abs().max() > 1e-3 and lens.bias[0].abs().max() > 1e-3
    assert not lens.weight[1:].any() and not lens.bias[1:].any()


def test_ridge_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)) * rng.uniform(0.1, 30, size=6) + 2
    y = x @ rng.normal(size=(6, 6)) + rng.normal(size=(50, 6)) * rng.uniform(0.5, 5, size=(50, 1))
    found = ridge(torch.from_numpy(x).float(), torch.from_numpy(y).float())
    weight = 1 / (y**2).mean(1)
    weight /= weight.sum()
    spread = np.sqrt(weight @ (x - weight @ x) ** 2)  # in these units every input has a weighted sum of squares of 1
    for penalty, (a, b) in zip(PENALTIES, found, strict=True):
        reference = Ridge(alpha=penalty).fit(x / spread, y - x, sample_weight=weight)
        assert np.allclose(a, reference.coef_ / spread, atol=1e-4) and np.allclose(b, reference.intercept_, atol=1e-3)
    assert found[-1][0].abs().max() < found[0][0].abs().max()


def test_descent_starts_from_the_best_start_and_only_improves(model, fit):
    _, _, array = (np.concatenate(part) for part in zip(*fit._parts, strict=True))
    states = torch.from_numpy(array)
    y, held = states[:, -1], torch.arange(len(states)) % 5 == 0

    def read(weight, bias, x):
        return divergences(model, y[held], x[held] + x[held] @ weight.T + bias)

    reached = []
    for x in states[:, :-1].unbind(1):
        start = min(read(*s, x).mean() for s in [(torch.zeros(64, 64), torch.zeros(64)), *ridge(x[~held], y[~held])])
        found = fit_layer(model, x, y, held)
        reached.append(float(read(*found, x).mean() / start))
    assert max(reached) <= 1 + 1e-5 and min(reached) < 0.95
    assert start < 0.5 * read(torch.zeros(64, 64), torch.zeros(64), x).mean()
    moved = x + 3.0  # a constant in the states is the bias's business
    assert torch.allclose(read(*fit_layer(model, moved, y, held), moved), read(*found, x), atol=0.01)


def test_divergence_by_hand(model_folder):
    """Two tokens: p = softmax(1, 0) = (0.7311, 0.2689), q = softmax(0, 1): KL = 0.7311 ln(0.7311 / 0.2689) + 0.2689 ln(0.2689 / 0.7311) = 0.4621."""
    model = load_model(model_folder)
    with torch.no_grad():
        model.text_model.norm.weight.fill_(1.0)
        model.head.weight.fill_(0.0)
        model.head.weight[2:, 0] = -1e4  # two tokens remain wherever the state's axis 0 is positive
        model.head.weight[0, 1], model.head.weight[1, 2] = 1.0, 1.0
    size = model.hidden_size
    axes = torch.eye(size) * size**0.5  # a state of mean square 1 passes the norm unchanged
    common = torch.zeros(size)
    common[0], common[3] = 1.0, (size - 2.0) ** 0.5
    p, q = common + axes[1] / size**0.5, common + axes[2] / size**0.5
    assert divergence(model, p[None], q[None]).item() == pytest.approx(0.4621172, abs=1e-4)
    assert divergence(model, p[None], p[None]).item() == 0


def test_the_same_again_in_other_visits_and_other_chunks(subject, conflicts, lens, tally, fit, monkeypatch):
    again = fitted(subject, conflicts, parts=2).fit()
    assert torch.equal(again.weight, lens.weight) and torch.equal(again.bias, lens.bias) and again == again and again.layer == lens.layer
    for module in (probing, tuned_lens):
        monkeypatch.setattr(module, "LENS_CELLS", 2 * 10 * 704 + 1)  # 10 rows at a time
    small = fit.fit()
    assert small.fitted_on == lens.fitted_on and torch.allclose(small.weight, lens.weight, atol=2e-3)
    other = TunedTally(subject, lens)
    other.add(Visit(subject, fit.report, "counterfactual", taps=True))
    assert np.allclose(np.concatenate(other._divergence), np.concatenate(tally._divergence), atol=1e-4)


def test_it_survives_being_a_record(lens):
    found = TunedLens.of_record(lens.record())
    assert torch.equal(found.weight, lens.weight) and torch.equal(found.bias, lens.bias)
    assert (found.fitted_on, found.rows, found.layer, found.end_layer) == (lens.fitted_on, lens.rows, lens.layer, lens.end_layer)


# ---------------------------------------------------------------- which clips and rows


def test_nothing_of_the_reporting_half_is_in_the_fit(subject, conflicts, fit, lens):
    choose, report = halves(conflicts)
    assert set(lens.fitted_on) == {conflicts[i].id for i in choose} and fit.report == [conflicts[i] for i in report]
    mine = [c for c in conflicts if c.id in lens.fitted_on]
    for key in (lambda c: c.video_rendering, lambda c: c.audio_rendering, lambda c: frozenset((c.video_label, c.audio_label))):
        assert not {key(c) for c in mine} & {key(c) for c in fit.report}
    other = TunedLensFit(subject, conflicts)
    record = other.measure(Visit(subject, fit.report[:3], "counterfactual", taps=True))
    assert len(record["clip"]) == 0 and record["states"].shape == (0, subject.model.n_layers + 1, subject.model.hidden_size)
    with pytest.raises(ValueError, match="fitted on"):
        TunedTally(subject, lens).measure(Visit(subject, [fit.report[0], mine[0]], "counterfactual", taps=True))


def test_states_are_those_of_evenly_spaced_rows(subject, conflicts, model):
    visit = Visit(subject, conflicts[:3], "counterfactual", taps=True)
    clip, position, states = sampled(visit, 4, [0, 2])
    assert sorted(set(clip)) == [0, 2] and sorted(set(position)) == [0, 1, 2, 3]
    ids = model.layout(visit.media[2]).ids
    rows = (ids == model.audio_id).nonzero()[:, 0]
    n = len(rows)
    wanted = rows[[0, round((n - 1) / 3), round(2 * (n - 1) / 3), n - 1]]
    found = states[(clip == 2) & (position == 0)]
    assert torch.equal(found, torch.stack([x[2, wanted] for x in visit.prefix.hidden], dim=1))
    end = (ids == model.tokenizer.convert_tokens_to_ids("<|audio_eos|>")).nonzero()[:, 0]
    assert torch.equal(states[(clip == 2) & (position == 1)], torch.stack([x[2, end] for x in visit.prefix.hidden], dim=1)) and len(end) == 1
    spoken = visit.spoken("hear")
    said = int((spoken.kinds[0] == Kind.EMITTER).sum())
    assert len(states[(clip == 0) & (position == 3)]) == min(4, said)


def test_fewer_rows_where_memory_would_not_do(subject, conflicts, monkeypatch):
    whole = TunedLensFit(subject, conflicts)
    assert whole.rows == 8
    monkeypatch.setattr(tuned_lens, "STATE_CELLS", (3 * 2 + 1) * len(whole.fitting) * 4 * 64)  # rows (one is the delimiter), clips, layers + 1, width
    assert TunedLensFit(subject, conflicts).rows == 2


def test_too_few_clips(subject, conflicts):
    assert fitted(subject, conflicts[:1], parts=1).fit() is None
    assert TunedLensFit(subject, []).fit() is None


# ---------------------------------------------------------------- the report


def test_closer_to_the_output_on_clips_it_has_not_seen(tally, lens, model):
    found = tally.tuned(ItemStore())
    before, after = ([e.value for e in kl] for kl in (found.kl_before, found.kl_after))
    assert len(before) == model.n_layers + 1 and before[-1] == after[-1] == 0
    assert all(a < b for a, b in zip(after[:-1], before[:-1], strict=True))
    assert found.clips == len(lens.fitted_on) and found.rows == lens.rows and found.kl_after[0].n == len(tally.clips)
    assert [(r.position, r.label, r.lens) for r in found.lens] == [(p, label, "tuned") for p in LENS_POSITIONS for label in LABELS]
    audio = next(r for r in found.lens if (r.position, r.label) == ("audio", "audio"))
    assert found.latent.layer == lens.layer and found.latent.latent.value == pytest.approx(audio.corrected[lens.layer].value)
    assert found.latent.said.value == pytest.approx(np.mean(tally.said)) and found.latent.swapped is found.latent.end_swapped is None
    end = next(r for r in found.lens if (r.position, r.label) == ("audio_end", "audio"))
    assert found.latent.end.layer == lens.end_layer and found.latent.end.rate.value == pytest.approx(end.corrected[lens.end_layer].value)


@torch.no_grad()
def test_divergence_is_the_mean_over_a_clips_rows(tally, lens, subject, fit, model):
    """One clip, the rows written out."""
    visit = Visit(subject, fit.report[:1], "counterfactual", taps=True)
    rows = []
    ids, spoken = model.layout(visit.media[0]).ids, visit.spoken("hear")
    for there, hidden in (
        (ids == model.audio_id, visit.prefix.hidden),
        (ids == model.tokenizer.convert_tokens_to_ids("<|audio_eos|>"), visit.prefix.hidden),
        (spoken.kinds[0] == Kind.QUESTION, spoken.hidden),
        (spoken.kinds[0] == Kind.EMITTER, spoken.hidden),
    ):
        there = there.nonzero()[:, 0]
        picked = sorted({round(i) for i in np.linspace(0, len(there) - 1, min(8, len(there)))})
        rows.append([(x[0, there[picked]], hidden[-1][0, there[picked]]) for x in hidden])
    found = np.concatenate(tally._divergence)[0]
    for layer in range(model.n_layers + 1):
        x, y = (torch.cat([r[layer][i] for r in rows]) for i in (0, 1))
        target = torch.softmax(model.head(model.text_model.norm(y)), -1)
        mapped = x if layer == model.n_layers else x + x @ lens.weight[layer].T + lens.bias[layer]
        for which, states in enumerate((x, mapped)):
            q = torch.softmax(model.head(model.text_model.norm(states)), -1)
            assert found[which, layer] == pytest.approx(float((target * (target / q).log()).sum(1).mean()), abs=1e-4)


def test_hits_are_those_of_the_logit_lens_in_the_last_layer_and_of_the_map_below(tally, lens, subject, fit, model):
    logit = LensTally(subject)
    visit = Visit(subject, fit.report, "counterfactual", taps=True)
    logit.add(visit)
    for name, hits in logit._hits.items():
        found = np.concatenate(tally._hits[name])
        assert np.array_equal(found[:, -1], np.concatenate(hits)[:, -1])
    x = visit.prefix.hidden[1]
    mapped = x + x @ lens.weight[1].T + lens.bias[1]
    top = model.head(model.text_model.norm(mapped)).topk(5).indices
    for row, clip in enumerate(fit.report[:4]):
        rows = model.layout(visit.media[row]).ids == model.audio_id
        words = tally.table["audio"][:, tally.classes.index(clip.audio_label)]
        assert np.concatenate(tally._hits["audio", "audio"])[row, 1, tally.classes.index(clip.audio_label)] == bool(words[top[row][rows]].any())


def test_the_layer_is_where_held_out_clips_are_read_best(subject, fit, lens, model):
    """States planted so that the identity map reads every clip's true sound in layer 1 only."""
    nothing = TunedLens(torch.zeros_like(lens.weight), torch.zeros_like(lens.bias), (), 0, 0)
    clip, position = np.repeat(np.arange(len(fit.clips)), 2), np.tile([0, 1], len(fit.clips))
    states = torch.zeros(len(clip), model.n_layers + 1, model.hidden_size)
    table = LensTally(subject).table["audio"]
    for row, c in enumerate(clip):
        word = int(table[:, list(subject.labels).index(fit.clips[c].audio_label)].nonzero()[0])
        states[row, 1 if position[row] == 0 else 2] = 10 * model.head.weight[word] / model.text_model.norm.weight
    one = TunedLensFit(subject, fit.clips, k=1)
    one.clips = fit.clips
    assert one._best_layer(nothing, clip, position, states, "audio") == 1 and one._best_layer(nothing, clip, position, states, "audio_end") == 2
