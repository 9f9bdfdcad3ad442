"""What every diagnostic should find on the model of by_hand.py, worked out here on paper (numpy, a few lines a layer), and what they do find.

Attention is even, so a layer is "the mean over the rows I may see"; RMSNorm is "divide by the root of the mean square". `Paper` writes this
down for one prompt: it shares no code with the package, not even the layout of the prompt.
"""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from analysis.flow import FlowTally
from analysis.items import ItemStore
from analysis.knockout import CutAnswers, KnockoutSweep, asked, designated
from analysis.probing import LensTally, ProbeFeatures, probe_rows
from analysis.reliance import ScoreTable, reliance_rows, want_grids
from analysis.shift import ShiftTally
from analysis.visits import Subject, Visit
from models import SITES, Cut, Kind
from tests.analysis.by_hand import CLASSES, IDLE, NAMES, Gains, build, clips_for, token

GAINS = Gains()
EPS = 1e-6  # of every RMSNorm
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
QUESTION = {
    "hear": "What do you hear?<|im_end|>\n<|im_start|>assistant\n",
    "see": "What do you see?<|im_end|>\n<|im_start|>assistant\n",
}
ANSWER = {"hear": "I hear", "see": "I see"}  # the label's one word comes next


@cache
def tokens(model, text):
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])


class Paper:
    """One prompt: picture of class i, sound of class j (None: not given), a question, and answer tokens so far; a cut of `source` letters from
    `targets` letters in layers [start, stop).
    """

    def __init__(self, model, i, j, modality, answer=(), cut=None, gains=GAINS, emitters_start_after_prompt=False):
        g, tok = gains, lambda word: token(model, word)
        stops = {tok(word) for pair in CLASSES.values() for word in pair}
        media = [("v", "<|vision_bos|>")] if i is not None else []
        media += [("a", "<|audio_bos|>")] if j is not None else []
        media += [("v", "PICTURE")] * 2 if i is not None else []
        media += [("a", "SOUND")] * 4 if j is not None else []
        media += [("a", "<|audio_eos|>")] if j is not None else []
        media += [("v", "<|vision_eos|>")] if i is not None else []
        after = tokens(model, QUESTION[modality])
        rows = [("s", t) for t in tokens(model, SYSTEM)] + media + [("q", t) for t in after[:-1]] + [("e", after[-1])] + [("e", t) for t in answer]
        if emitters_start_after_prompt:  # a wrong definition: only rows after the prompt count as generated
            rows[len(rows) - len(answer) - 1] = ("q", after[-1])
        self.kinds, kinds = [k for k, _ in rows], np.array([k for k, _ in rows])
        n, self.first = len(rows), len(rows) - len(answer) - 1
        what = self.what = [t for _, t in rows]

        # What enters layer 0: one code a row at most, and a filler F that makes the mean square of the 64 numbers 1.
        v = np.array([g.v if t == "PICTURE" else 0.0 for t in what])
        a = np.array([g.a if t == "SOUND" else 0.0 for t in what])
        see, hear = (np.array([g.asked_word if t == tok(word) else 0.0 for t in what]) for word in ("see", "hear"))
        stop = np.array([g.stop if t in stops else 0.0 for t in what])
        f = np.sqrt(64 - (v + a + see + hear + stop) ** 2)
        nothing = np.zeros(n)

        # The rows that each row may see, and the even weights.
        weights = []
        for layer in (0, 1):
            allowed = np.tril(np.ones((n, n)))
            if cut and cut[2] <= layer < cut[3]:
                allowed[np.isin(kinds, list(cut[1]))[:, None] & np.isin(kinds, list(cut[0]))] = 0
            weights.append(allowed / allowed.sum(1, keepdims=True))
        w0, w1 = weights

        # Layer 0: R_i = relay * mean of V_i over the rows seen. The norm divides by sqrt(1 + EPS).
        rms0 = np.full(n, math.sqrt(1 + EPS))
        r = g.relay * w0 @ (v / rms0)
        # Layer 1: each row's mean square is now (64 + R²) / 64.
        rms1 = np.sqrt((64 + r**2) / 64 + EPS)
        o = np.zeros((6, n))
        if i is not None:
            o[i] += g.picture * w1 @ (v / rms1) + g.relayed * w1 @ (r / rms1)
        if j is not None:
            o[j] += g.sound * w1 @ (a / rms1)
        self.o = o
        saw, heard = g.asked * w1 @ (see / rms1), g.asked * w1 @ (hear / rms1)
        rms2 = np.sqrt((64 + r**2 + (o**2).sum(0) + saw**2 + heard**2) / 64 + EPS)

        # The head, on the states that enter layer 0, leave layer 0 and leave layer 1.
        self.logits = []
        for r_, o_, saw_, heard_, rms in (
            (nothing, 0 * o, nothing, nothing, rms0),
            (r, 0 * o, nothing, nothing, rms1),
            (r, o, saw, heard, rms2),
        ):
            out = np.zeros((n, model.head.weight.shape[0]))
            for c, (look, sound) in enumerate(CLASSES.values()):
                both, about = g.word * g.norm * o_[c], g.question * (1 + c / 50)
                out[:, tok(look)] = (both + about * saw_ + (g.look * r_ if c == i else 0)) / rms
                out[:, tok(sound)] = (both + about * heard_ + (g.sounds * a if c == j else 0)) / rms
            out[:, model.end_id] = g.end * stop / rms
            for word, strength in zip(IDLE, g.idle, strict=True):
                out[:, tok(word)] = strength * f / rms
            self.logits.append(out)

        # Values: V, R and F through the first key-value head, A, SEE, HEAR and F through the second; for the norms of the flow.
        self.values = [
            (np.sqrt(v**2 + r_**2 + f**2) / rms, np.sqrt(a**2 + see**2 + hear**2 + f**2) / rms) for r_, rms in ((nothing, rms0), (r, rms1))
        ]

    def logp(self, row=-1):
        """Log-probabilities at a row of the output."""
        x = self.logits[2][row]
        return x - math.log(np.exp(x).sum())


LETTER = {Kind.SYSTEM: "s", Kind.VIDEO: "v", Kind.AUDIO: "a", Kind.QUESTION: "q", Kind.EMITTER: "e"}


def letters(cut):
    """A cut in the letters of `Paper`."""
    return None if cut is None else ("".join(LETTER[k] for k in cut.source), "".join(LETTER[k] for k in cut.target), cut.start, cut.stop)


def classes(clip):
    return NAMES.index(clip.video_label), NAMES.index(clip.audio_label)


def word(modality, name):
    return CLASSES[name][0 if modality == "see" else 1]


def score(model, clip, modality, name, cut=None):
    """s: log p of the label's word after "I hear" / "I see"."""
    said = tokens(model, ANSWER[modality])
    return Paper(model, *classes(clip), modality, said, letters(cut)).logp()[token(model, word(modality, name))]


def greedy(model, i, j, modality, cut=None, **options):
    """Tokens up to the end token, each by a new piece of paper."""
    said = []
    while len(said) < 5:
        best = int(Paper(model, i, j, modality, said, cut, **options).logp().argmax())
        if best == model.end_id:
            break
        said.append(best)
    return said


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(tmp_path_factory.mktemp("by_hand"), GAINS)


@pytest.fixture(scope="module")
def clips(model):
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 3), (4, 2), (2, 4), (2, 2), (4, 4)]
    return clips_for([model], GAINS, pairs, grids=[(0, 1), (2, 4)])


@pytest.fixture(scope="module")
def subject(model, clips):
    return Subject(model, clips, max_new_tokens=5)


@pytest.fixture(scope="module")
def visits(subject, clips):
    """Conflicts in two visits, and the factual clips."""
    conflicts = clips.select("test", "counterfactual")
    parts = [(conflicts[:2], "counterfactual"), (conflicts[2:], "counterfactual"), (clips.select("test", "factual"), "factual")]
    return [Visit(subject, part, condition, taps=True) for part, condition in parts]


# ---------------------------------------------------------------- the model is the one on paper


def test_layout_logits_and_answers(visits, model):
    for visit in visits:
        for modality in ("hear", "see"):
            out, ids = visit.spoken(modality), visit.answer_ids(modality)
            for row, clip in enumerate(visit.clips):
                assert ids[row] == greedy(model, *classes(clip), modality)
                paper = Paper(model, *classes(clip), modality, ids[row])
                kinds = [*visit.prefix.kinds[row].tolist(), *out.kinds[row].tolist()]
                assert [LETTER[Kind(k)] for k in kinds] == paper.kinds
                assert np.allclose(out.logits[row].numpy(), paper.logits[2][paper.first :], atol=1e-5)


def test_it_says_what_the_picture_suggests_although_it_hears(visits):
    for visit in visits:
        for modality in ("hear", "see"):
            assert visit.answers(modality) == [word(modality, clip.video_label) for clip in visit.clips]


# ---------------------------------------------------------------- knockout


@pytest.fixture(scope="module")
def sweep(subject, visits):
    sweep = KnockoutSweep(subject, width=1)
    for visit in visits:
        sweep.add(visit)
    return sweep


@pytest.mark.parametrize("site", SITES)
def test_every_cut_in_every_window(sweep, model, site):
    assert {(w.start, w.stop) for w in sweep.windows} == {(0, 1), (1, 2), (0, 2)}
    modality, sizes = asked(site), []
    for w in sweep.windows:
        cut = Cut.at(site, w.start, w.stop)
        for condition in ("counterfactual", "factual"):
            clips, delta, margin = sweep.deltas(condition, modality, cut)
            for row, clip in enumerate(clips):
                own, other = designated(clip, modality)
                by_hand = [score(model, clip, modality, own, c) - score(model, clip, modality, own) for c in (cut, None)]
                assert delta[row] == pytest.approx(by_hand[0], abs=1e-5)
                against = score(model, clip, modality, other, cut) - score(model, clip, modality, other)
                assert margin[row] == pytest.approx(by_hand[0] - against, abs=1e-5)
                sizes.append(abs(by_hand[0]))
    assert max(sizes) > 1e-3


def test_the_leak(sweep, model, clips, subject, visits):
    """Cutting video -> emitters in all layers leaves a relay: question (and sound) rows saw the picture in layer 0 and are read in layer 1.

    O of the picture's class at the last prompt row, in numbers. Row k (from 0) sees k + 1 rows in layer 0; two of them are picture rows with V = 6
    once it comes after them, so R = relay * 12 / (k + 1).
    """
    paper = Paper(model, 0, 1, "hear")
    count = {kind: paper.kinds.count(kind) for kind in "svaqe"}
    n, first = sum(count.values()), count["s"] + 2  # rows in all; the first picture row, after <|vision_bos|> and <|audio_bos|>
    assert (count["v"], count["a"], count["e"]) == (4, 6, 1)
    of_the_picture = (first - 2, first, first + 1, first + 7)  # with its delimiters

    def o(cut, relaying):
        """`relaying`: rows from here on have seen nothing of the picture."""
        r = [0.0] * first + [6 * 6 / (first + 1)] + [6 * 12 / (k + 1) for k in range(first + 1, relaying)] + [0.0] * (n - relaying)
        rms = [math.sqrt((64 + x * x) / 64) for x in r]
        keys = [k for k in range(n) if not (cut and k in of_the_picture)]
        v = [6.0 if k in (first, first + 1) else 0.0 for k in range(n)]
        return sum(3 * v[k] / rms[k] + 5 * r[k] / rms[k] for k in keys) / len(keys)

    whole, leak, rest = o(False, n), o(True, n - 1), o(True, n - 1 - count["q"])
    cuts = None, ("v", "e", 0, 2), ("v", "qe", 0, 2)
    assert [Paper(model, 0, 1, "hear", (), cut).o[0, -1] for cut in cuts] == pytest.approx([whole, leak, rest], abs=1e-4)
    assert leak > 0.7 * whole and rest < 0.5 * whole  # what still comes of the picture: by the question, and by the sound's rows alone

    clip = next(c for c in clips.clips if classes(c) == (0, 1))
    visit = next(v for v in visits if clip in v.clips)
    for site, says in ((None, "barking"), ("video->emitters", "barking"), ("video->question+emitters", "meowing")):
        cut = (Cut.at(site, 0, 2),) if site else ()
        (ids,) = subject.greedy(visit.prefix, [visit.clips.index(clip)], "hear", [cut])
        assert subject.text(ids) == says
    change = {}
    for site in ("video->emitters", "video->question+emitters"):
        found, delta, _ = sweep.deltas("counterfactual", "hear", Cut.at(site, 0, 2))
        change[site] = delta[found.index(clip)]
    assert 1 < change["video->emitters"] < change["video->question+emitters"] - 0.5


def test_the_first_answer_token_comes_from_the_last_prompt_row(model, subject, visits):
    """Were only the rows after the prompt "generated", a cut of the picture from them would leave the first word as it was."""
    cut = ("v", "e", 0, 2)
    right, wrong = (Paper(model, 0, 1, "hear", (), cut, emitters_start_after_prompt=flag) for flag in (False, True))
    plain = Paper(model, 0, 1, "hear")
    assert np.array_equal(wrong.logits[2][-1], plain.logits[2][-1]) and np.abs(right.logits[2][-1] - plain.logits[2][-1]).max() > 0.5
    visit = visits[0]
    row = next(r for r, clip in enumerate(visit.clips) if classes(clip) == (0, 1))
    out = subject.model.extend(visit.prefix, [row], [subject.label_suffix("hear", "cat")], [(Cut.at("video->emitters", 0, 2),)])
    assert np.allclose(out.logits[0, 0].numpy(), right.logits[2][-1], atol=1e-5)


def test_following_under_cuts(sweep, subject, visits, model):
    """Shares of the rows: exactly those of the answers on paper."""
    cuts = [Cut.at(site, w.start, w.stop) for site in SITES for w in sweep.windows]
    answers = CutAnswers(sweep, cuts)
    for visit in visits:
        answers.add(visit)
    rows = {(r.site, r.start, r.stop, r.condition): r for r in sweep.rows(ItemStore())}
    conflicts = [clip for visit in visits if visit.condition == "counterfactual" for clip in visit.clips]
    for cut in cuts:
        modality, found = asked(cut.site), rows[cut.site, cut.start, cut.stop, "counterfactual"]
        said = [model.tokenizer.decode(greedy(model, *classes(c), modality, letters(cut))).strip() for c in conflicts]
        heard = [s == word(modality, c.audio_label) for s, c in zip(said, conflicts, strict=True)]
        seen = [s == word(modality, c.video_label) for s, c in zip(said, conflicts, strict=True)]
        assert (found.audio.value, found.vision.value) == (pytest.approx(np.mean(heard)), pytest.approx(np.mean(seen)))
    assert rows["video->question+emitters", 0, 2, "counterfactual"].audio.value == 1
    assert rows["video->emitters", 0, 2, "counterfactual"].vision.value == 1  # the leak


# ---------------------------------------------------------------- flow


def test_attention_mass_by_kind(visits, model):
    """Even weights: the plain mass of a row is the share of each kind among the rows up to it."""
    for visit in visits:
        tally = FlowTally()
        tally.add(visit)
        found = {(row.target, row.variant): row.mass for row in tally.rows(ItemStore())}
        expected = {key: [] for key in found}
        for clip, ids in zip(visit.clips, visit.answer_ids("hear"), strict=True):
            paper = Paper(model, *classes(clip), "hear", ids)
            kinds = np.array(paper.kinds)
            share = {key: np.zeros((5, 2)) for key in found}
            for target, letter in (("question", "q"), ("emitters", "e")):
                rows = np.flatnonzero(kinds == letter)
                for r in rows:
                    for s, kind in enumerate("svaqe"):
                        of_kind = kinds[: r + 1] == kind
                        share[target, "plain"][s] += of_kind.sum() / (r + 1) / len(rows)
                        share[target, "no_sink"][s] += of_kind[1:].sum() / r / len(rows)
                        for layer, heads in enumerate(paper.values):  # two query heads on each key-value head
                            for norm in heads:
                                share[target, "value_norm"][s, layer] += norm[: r + 1][of_kind].sum() / norm[: r + 1].sum() / 2 / len(rows)
            for key in found:
                expected[key].append(share[key])
        for key, mass in found.items():
            for s, kind in enumerate(("system", "video", "audio", "question", "emitters")):
                assert [e.value for e in mass[kind]] == pytest.approx(np.mean([x[s] for x in expected[key]], axis=0).tolist(), abs=1e-5)


# ---------------------------------------------------------------- lens


def test_words_in_the_top_five(subject, visits, model):
    tally = LensTally(subject, k=5)
    conflicts = [visit for visit in visits if visit.condition == "counterfactual"]
    for visit in conflicts:
        tally.add(visit)
    rows = {(row.position, row.label): row for row in tally.rows(ItemStore())}
    clips = [clip for visit in conflicts for clip in visit.clips]
    answers = [ids for visit in conflicts for ids in visit.answer_ids("hear")]
    for position, is_there in (
        ("audio", lambda paper: [w == "SOUND" for w in paper.what]),
        ("audio_end", lambda paper: [w == "<|audio_eos|>" for w in paper.what]),
        ("question", lambda paper: [kind == "q" for kind in paper.kinds]),
        ("emitters", lambda paper: [kind == "e" for kind in paper.kinds]),
    ):
        for label in ("audio", "visual"):
            words = [token(model, pair[label == "audio"]) for pair in CLASSES.values()]
            for layer in range(3):
                hits, others = [], []
                for clip, ids in zip(clips, answers, strict=True):
                    paper, true = Paper(model, *classes(clip), "hear", ids), classes(clip)[label == "audio"]
                    top = {int(t) for r in np.flatnonzero(is_there(paper)) for t in np.argsort(-paper.logits[layer][r])[:5]}
                    hits.append(words[true] in top)
                    others.append(np.mean([w in top for c, w in enumerate(words) if c != true]))
                found = rows[position, label]
                assert found.hit[layer].value == pytest.approx(np.mean(hits)) and found.control[layer] == pytest.approx(np.mean(others))
                assert found.corrected[layer].value == pytest.approx(np.mean(hits) - np.mean(others))
    # The same in words: the sound is read at its own rows from the start; the picture's look there and in the question from layer 0 on, by the relay.
    assert [e.value for e in rows["audio", "audio"].hit] == [1, 1, 1] and [e.value for e in rows["audio", "visual"].hit] == [0, 1, 1]
    assert [e.value for e in rows["question", "visual"].hit] == [0, 1, 1] and [e.value for e in rows["question", "audio"].hit] == [0, 0, 1]


# ---------------------------------------------------------------- reliance


def test_grid_effects_and_shortcut_index(clips, visits, model):
    by_id, table = clips.by_id(), ScoreTable()
    want_grids(table, clips.grids, by_id)
    for visit in visits:
        table.add(visit)
    rows = {row.question: row for row in reliance_rows(table, clips.grids, by_id, ItemStore(), 100, 0)}
    for modality in ("hear", "see"):
        audio, video = [], []
        for i, j in ((0, 1), (2, 4)):
            said = tokens(model, ANSWER[modality])
            m = {}
            for v in (i, j):
                for a in (i, j):
                    logp = Paper(model, v, a, modality, said).logp()
                    m[v, a] = logp[token(model, word(modality, NAMES[i]))] - logp[token(model, word(modality, NAMES[j]))]
            audio.append(((m[i, i] - m[i, j]) + (m[j, i] - m[j, j])) / 2)
            video.append(((m[i, i] - m[j, i]) + (m[i, j] - m[j, j])) / 2)
        found, e_a, e_v = rows[modality], np.mean(audio), np.mean(video)
        assert found.effect_audio.value == pytest.approx(e_a, abs=1e-5) and found.effect_video.value == pytest.approx(e_v, abs=1e-5)
        wrong = e_v if modality == "hear" else e_a
        assert found.shortcut.value == pytest.approx(abs(wrong) / (abs(e_a) + abs(e_v)), abs=1e-5)
        assert e_v > e_a > 0.5


# ---------------------------------------------------------------- token shift


OTHER = Gains(word=0.4, look=0.2, question=1.0, idle=(2.0, 1.0, 0.3, 0.2, 0.1))  # a base whose head prefers idle words


@pytest.mark.parametrize("kind", ["its own base", "the proxy"])
def test_ranks_and_divergence(subject, visits, model, clips, tmp_path, kind):
    gains, base = GAINS, None
    if kind == "its own base":
        gains, base = OTHER, build(tmp_path, OTHER)
        clips_for([base], OTHER, [(0, 1)])
    tally = ShiftTally(subject, base)
    for visit in visits:
        tally.add(visit)
    rows = {(row.condition, row.tokens): row for row in tally.rows(ItemStore())}
    ranks = {"counterfactual": {}, "factual": {}}
    for visit in visits:
        for modality in ("hear", "see"):
            for clip, ids in zip(visit.clips, visit.answer_ids(modality), strict=True):
                i, j = classes(clip)
                own, other = Paper(model, i, j, modality, ids), Paper(model, i, None, modality, ids, gains=gains)
                for a, t in enumerate([*ids, model.end_id]):
                    p, q = own.logp(own.first + a), other.logp(other.first + a)
                    name = ("audio_event" if modality == "hear" else "visual") if a == 0 else "rest"
                    one = (int((q > q[t] + 1e-9).sum()) + 1, float((np.exp(p) * (p - q)).sum()))
                    for key in ("all", name):
                        ranks[visit.condition].setdefault(key, []).append(one)
    for condition, by_class in ranks.items():
        for name, values in by_class.items():
            found, (rank, kl) = rows[condition, name], np.array(values).T
            assert found.kl.n == len(values) and found.kl.value == pytest.approx(kl.mean(), abs=1e-5)
            shares = [(rank == 1).mean(), ((rank == 2) | (rank == 3)).mean(), (rank > 3).mean()]
            assert [found.unshifted.value, found.marginal.value, found.shifted.value] == pytest.approx(shares)
    if kind == "the proxy":  # nothing heard was said
        assert rows["counterfactual", "audio_event"].unshifted.value == 1
    else:
        assert rows["counterfactual", "audio_event"].unshifted.value < 1


# ---------------------------------------------------------------- probes


def test_what_a_linear_probe_can_read(model):
    """The sound's class: at its own rows always; in the question after layer 1 only. The picture's class: nowhere before layer 0, then everywhere.

    Where nothing of a label is in the states, all classes but one can be ruled out at best: on conflicts the sound is not the picture's class.
    """
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    clips = clips_for([model], GAINS, pairs)
    subject = Subject(model, clips)
    found = [replace(c, id=f"{c.id} {n}", video_rendering=f"{c.id} {n}", audio_rendering=f"{c.id} {n}") for n in range(4) for c in clips.clips]
    features, silent = ProbeFeatures(), ProbeFeatures()
    features.add(Visit(subject, found, "counterfactual", taps=True))
    silent.add(Visit(subject, found, "without sound", audio=False, taps=True))
    rows = {(row.position, row.label): row for row in probe_rows(features, silent, None, 10, ItemStore(), 0)}
    readable = {
        ("audio", "audio"): (1, 1, 1), ("audio", "visual"): (0, 1, 1),
        ("audio_end", "audio"): (0, 0, 1), ("audio_end", "visual"): (0, 1, 1),
        ("question", "audio"): (0, 0, 1), ("question", "visual"): (0, 1, 1),
        ("last_prompt", "audio"): (0, 0, 1), ("last_prompt", "visual"): (0, 1, 1),
    }  # fmt: skip
    for key, layers in readable.items():
        for layer, there in enumerate(layers):
            accuracy = rows[key].accuracy[layer].value
            assert accuracy == 1 if there else accuracy < 0.3
            assert rows[key].shuffled[layer] < 0.3
    assert max(rows["question", "audio"].audio_removed) < 0.3
    # Each class is one recording with an axis of its own, so any labels of recordings can be read as well: nothing shows that it is the class.
    assert rows["question", "audio"].control_task[2] == 1 and rows["question", "audio"].selectivity[2].value == 0
