"""Plain text: perplexity and answers against the stock model and by hand, and what becomes of them in every table."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

import analysis.diagnose
from analysis.ablation import Ablation, Run, compare_arms
from analysis.ablation_report import ablation_tables, markdown
from analysis.compare import Comparison, compare
from analysis.diagnose import DiagnoseSettings, diagnose
from analysis.findings import Findings, Language, PlainAnswer
from analysis.items import ItemStore, Key
from analysis.language import TextJob, is_right, language_rows, measured, text_estimates, text_jobs
from analysis.plain_text import PASSAGES, QUESTIONS, Question
from analysis.report import write_report
from analysis.tables import comparison_tables, findings_tables
from analysis.trajectory import headline, panel
from models import load_model
from models.avllm import ModelError
from models.tiny import build_tiny
from tests.analysis.by_hand import Gains, build, clips_for

T2 = 4.302653  # 97.5 % point of t with 2 degrees of freedom
QUICK = DiagnoseSettings.quick(2, bare=0, grids=0, max_new_tokens=2, language=True, batch=15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model that is sure of some tokens, and whose layers do enough that it does not repeat the last one."""
    folder = build_tiny(tmp_path_factory.mktemp("model"), layers=2, hidden=32, tower=32, tower_layers=1)
    model = load_model(folder)
    with torch.no_grad():
        model.text_model.embed_tokens.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        for layer in model.text_model.layers:
            for parameter in layer.parameters():
                parameter.mul_(15.0 if parameter.ndim == 2 else 3.0)
    model.thinker.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


# ---------------------------------------------------------------- what is measured


def test_texts_are_of_one_size_and_questions_can_be_answered():
    assert len(PASSAGES) == len({p.name for p in PASSAGES}) == len({p.text for p in PASSAGES}) == 20
    assert all(50 <= len(p.text.split()) <= 100 and "\n" not in p.text for p in PASSAGES)
    assert len(QUESTIONS) == len({q.text for q in QUESTIONS}) == 40
    for question in QUESTIONS:
        assert all(is_right(f"It is {answer}.", question) for answer in question.accepted)
        assert not is_right(question.text, question), "repeating the question would be right"


@torch.no_grad()
def test_a_passage_is_scored_as_the_stock_model_scores_it(model, folder):
    """After the system prompt, at the head of what the user says; log-softmax by hand."""
    stock = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    record = measured(model, TextJob("passages", 3, 6), 24)
    for k, passage in enumerate(PASSAGES[3:6]):
        said = [{"role": "system", "content": model.system_prompt}, {"role": "user", "content": passage.text}]
        before, own = model.processor.apply_chat_template(said, tokenize=False).split(passage.text)[0], passage.text
        start, ids = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, before + own))
        logits = stock(input_ids=torch.tensor([ids])).logits[0].double()
        logprobs = logits - logits.exp().sum(-1, keepdim=True).log()
        expected = [-float(logprobs[row - 1, ids[row]]) for row in range(len(start) + 1, len(ids))]
        assert record["tokens"][k] == len(expected) and np.std(expected) > 0.5
        assert record["nll"][k] == pytest.approx(sum(expected), rel=1e-5)


@torch.no_grad()
def test_answers_are_greedy_and_at_most_24_tokens_long(model, folder):
    stock = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    lengths = []
    record = measured(model, TextJob("questions", 4, 10), 24)
    for question, said, ended in zip(QUESTIONS[4:10], record["answers"], record["cut_off"], strict=True):
        asked = [{"role": "system", "content": model.system_prompt}, {"role": "user", "content": question.text}]
        prompt = model.processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = model.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        for _ in range(24):
            token = stock(input_ids=ids).logits[0, -1].argmax()
            if int(token) == model.end_id:
                break
            ids = torch.cat([ids, token[None, None]], 1)
        assert said == model.tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()
        lengths.append(ids.shape[1] - length)
        assert ended == (lengths[-1] == 24)
        assert len(said) > 30
    assert max(lengths) == 24, lengths


def test_a_text_of_one_token_is_refused(model):
    with pytest.raises(ModelError, match="'x' has fewer than two tokens"):
        model.passage("x")


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("The capital of France is Paris.", ("Paris",), True),
        ("PARIS!", ("Paris",), True),
        ("The Parisian capital.", ("Paris",), False),
        ("A comparison.", ("Paris",), False),
        ("There are 7 days.", ("seven", "7"), True),
        ("Seven", ("seven", "7"), True),
        ("There are 17 days, or 7.5.", ("seven",), False),
        ("In 1977.", ("seven", "7"), False),
        ("Twenty four hours", ("twenty-four", "24"), True),
        ("twenty-four", ("twenty-four", "24"), True),
        ("twenty hours and four minutes", ("twenty-four", "24"), False),
        ("four twenty", ("twenty-four",), False),
        ("Brazil lies in South\nAmerica.", ("South America",), True),
        ("South of Central America", ("South America",), False),
        ("South", ("South America",), False),
        ("It's a cat's voice", ("cat", "cats"), True),
        ("", ("cat",), False),
    ],
)
def test_an_answer_counts_where_it_has_the_accepted_words(answer, accepted, right):
    assert is_right(answer, Question("?", accepted)) is right


# ---------------------------------------------------------------- what it comes to


def test_perplexity_by_hand():
    """12 ln 2 over 6 tokens: 4. A mean over passages of their own perplexities (2, 8, 4.76) would be another."""
    nll = np.log(2) * np.array([2.0, 3.0, 7.0])
    mean, perplexity = text_estimates(["a", "b", "c"], nll, np.array([2, 1, 3]), ItemStore())
    assert mean.value == pytest.approx(2 * math.log(2)) and perplexity.value == pytest.approx(4.0)
    assert (perplexity.n, perplexity.clusters) == (6, 3) and perplexity.low < 4 < perplexity.high


def test_its_interval_is_that_of_the_mean_over_passages():
    """Passages of two tokens with 1, 2 and 3 ln 2 a token: standard error ln 2 / √3."""
    store = ItemStore()
    _, perplexity = text_estimates(["a", "b", "c"], np.log(2) * np.array([2.0, 4.0, 6.0]), np.array([2, 2, 2]), store)
    half = T2 * math.log(2) / math.sqrt(3)
    assert (perplexity.low, perplexity.high) == pytest.approx((4 * math.exp(-half), 4 * math.exp(half)), rel=1e-5)
    [items] = store.saved()
    assert items.ids == ["a", "b", "c"] and items.clusters == [["a", "b", "c"]] and items.weights == {"language||||nll": "2 2 2"}


def records(answers, nll=2.0):
    texts = {"nll": np.full(20, 10 * nll), "tokens": np.full(20, 10)}
    return [texts, {"answers": answers[:25], "cut_off": [False] * 25}, {"answers": answers[25:], "cut_off": [True, *[False] * 14]}]


def test_the_share_right_and_every_answer():
    answers = [q.accepted[-1] for q in QUESTIONS[:30]] + ["I do not know"] * 10
    found = language_rows(records(answers), ItemStore())
    assert (found.right.value, found.right.n, found.right.clusters) == (0.75, 40, 40)
    assert [a.answer for a in found.answers] == answers and [a.right for a in found.answers] == [True] * 30 + [False] * 10
    assert (found.cut_off.value, found.cut_off.n) == (1 / 40, 40) and [k for k, a in enumerate(found.answers) if a.cut_off] == [25]
    assert found.answers[0] == PlainAnswer("What is the capital of France?", ["Paris"], "Paris", True)


@pytest.mark.parametrize("batch", [7, 20])
def test_batches_change_nothing(model, batch):
    whole, parts = ([measured(model, job, 24) for job in text_jobs(size)] for size in (60, batch))
    assert len(whole) == 2 and len(parts) == {7: 9, 20: 3}[batch]
    one, other = language_rows(whole, ItemStore()), language_rows(parts, ItemStore())
    assert one.answers == other.answers and one.right == other.right
    assert dataclasses.astuple(one.perplexity) == pytest.approx(dataclasses.astuple(other.perplexity), rel=1e-6)


def test_an_adapter_counts_while_it_is_on(folder):
    model, job = load_model(folder), TextJob("passages", 0, 2)
    before = measured(model, job, 24)["nll"]
    model.add_lora(model.lora_targets([0, 1], ["q_proj", "v_proj", "down_proj"]), 4, 8)
    model.thinker.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    assert np.abs(measured(model, job, 24)["nll"] - before).min() > 1.0
    with model.adapter_off():
        assert measured(model, job, 24)["nll"] == pytest.approx(before, rel=1e-6)


# ---------------------------------------------------------------- in a diagnosis


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory):
    """A model and clips that need no files, and the findings of a diagnosis that nobody disturbed."""
    model = build(tmp_path_factory.mktemp("by_hand"), Gains())
    clips = clips_for([model], Gains(), [(0, 0), (1, 1), (0, 1), (1, 0)])
    return model, clips, diagnose(model, clips, QUICK, progress=False)


def test_a_diagnosis_states_it_and_survives_the_disk(diagnosed, tmp_path):
    _, _, found = diagnosed
    assert found.language.perplexity.value == pytest.approx(math.exp(found.language.nll.value)) and len(found.language.answers) == 40
    assert found.language.nll.n == sum(measured_tokens(diagnosed[0])) and found.language.nll.clusters == 20
    stated = found.settings["plain_text"]
    assert (stated["passages"], stated["questions"], found.settings["language"]) == (20, 40, True)
    found.save(tmp_path / "f.json")
    assert Findings.load(tmp_path / "f.json") == found and found.format == 5


def test_answers_run_to_the_limit_of_all_others_and_those_that_end_there_are_counted(diagnosed):
    """The fixture's model does not stop by itself, and no answer may have more than two tokens: all are cut off, and the findings say so."""
    model, clips, found = diagnosed
    assert (found.language.cut_off.value, found.language.cut_off.n) == (1.0, 40) and all(a.cut_off for a in found.language.answers)
    assert any(s.startswith("100 % of the answers to the simple questions of plain text ended at the limit of 2 tokens") for s in found.left_out)
    longer = diagnose(model, clips, dataclasses.replace(QUICK, max_new_tokens=4), progress=False).language
    assert any(len(a.answer) > len(b.answer) for a, b in zip(longer.answers, found.language.answers, strict=True))
    assert re.search(r"their answers cut off +100\.0 % .* 40 questions", shown(findings_tables(found)))
    comparison = compare(found, found)
    assert comparison.find("language", "cut_off").after.value == 1.0
    assert "their answers cut off 100.0 % 100.0 % +0.0" in " ".join(shown(comparison_tables(comparison)).split())
    assert headline(found)["language/cut_off"].value == 1.0 and panel("language/cut_off").title == panel("language/right").title


def measured_tokens(model):
    return [len(model.tokenizer(p.text, add_special_tokens=False)["input_ids"]) - 1 for p in PASSAGES]


def test_it_is_off_unless_told(diagnosed, monkeypatch):
    model, clips, found = diagnosed
    assert not DiagnoseSettings().language and not DiagnoseSettings.quick(4).language
    assert DiagnoseSettings(language=True).answers_only().language
    monkeypatch.setattr(analysis.diagnose, "measured", lambda model, job, limit: pytest.fail("measured all the same"))
    off = diagnose(model, clips, dataclasses.replace(QUICK, language=False), progress=False)
    assert off.language is None and "plain_text" not in off.settings and off.left_out == [said for said in found.left_out if "plain text" not in said]
    assert not any(key.startswith("language") for items in off.items for key in items.values)


def test_a_killed_diagnosis_goes_on_where_it_was(diagnosed, tmp_path, monkeypatch):
    model, clips, found = diagnosed
    done, jobs = [], text_jobs(QUICK.batch)

    def dies(model, job, limit):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job)
        return measured(model, job, limit)

    monkeypatch.setattr(analysis.diagnose, "measured", dies)
    with pytest.raises(KeyboardInterrupt):
        diagnose(model, clips, QUICK, progress=False, work=tmp_path / "work")
    monkeypatch.setattr(analysis.diagnose, "measured", lambda model, job, limit: done.append(job) or measured(model, job, limit))
    again = diagnose(model, clips, QUICK, progress=False, work=tmp_path / "work")
    assert done == jobs and len(jobs) == 5
    assert dataclasses.asdict(again) == dataclasses.asdict(found)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # perhaps the other last digits, but no reason to begin anew
    try:
        diagnose(model, clips, QUICK, progress=False, work=tmp_path / "work")
    finally:
        torch.set_num_threads(threads)
    assert done == jobs


# ---------------------------------------------------------------- before and after


def findings(nll, right="1100", answer="Paris", **settings):
    """Three passages of ten tokens with these nats a token, and four questions."""
    store = ItemStore()
    mean, perplexity = text_estimates(["a", "b", "c"], 10 * np.array(nll), np.array([10, 10, 10]), store)
    names = ["q0", "q1", "q2", "q3"]
    share = store.of(names, names).rates([Key("language", None, None, "", "right")], [[int(r)] for r in right])[0]
    made = Findings("m", None, None, "test", "clips", 2, {"plain_text": {"sha256": "x"}, **settings})
    made.language = Language(mean, perplexity, share, [PlainAnswer("Capital of <b>France</b>?", ["Paris"], answer, answer == "Paris")])
    made.items = store.saved()
    return made


BEFORE, AFTER = findings([1.0, 2.0, 3.0]), findings([1.1, 2.2, 3.3], "1001", "I hear a <i>dog</i>")


def test_the_paired_change_by_hand():
    """0.1, 0.2, 0.3 nats a token more: mean 0.2, standard error 0.1 / √3. Unpaired, passages differ far too much to see it."""
    comparison = compare(BEFORE, AFTER)
    nll, perplexity, right = (comparison.find("language", measure) for measure in ("nll", "perplexity", "right"))
    half = T2 * 0.1 / math.sqrt(3)
    assert nll.difference.value == pytest.approx(0.2) and nll.difference.high == pytest.approx(0.2 + half, rel=1e-5)
    assert perplexity.before.value == pytest.approx(math.exp(2)) and perplexity.after.value == pytest.approx(math.exp(2.2))
    change = perplexity.difference
    assert change.value == pytest.approx(math.exp(2.2) / math.exp(2) - 1)
    assert (change.low, change.high) == pytest.approx((math.exp(0.2 - half) - 1, math.exp(0.2 + half) - 1), rel=1e-4)
    assert change.p == pytest.approx(nll.difference.p) and change.n == 3
    assert right.difference.value == 0.0 and right.difference.n == 4 and right.difference.high > 0.3  # one gained, one lost
    assert comparison.left_out == []


def test_other_texts_are_not_compared():
    with pytest.raises(ValueError, match=r"setting plain_text\.sha256 is 'x' before and 'y' after"):
        compare(BEFORE, findings([1.0, 2.0, 3.0], plain_text={"sha256": "y"}))


def test_a_comparison_survives_the_disk(tmp_path):
    comparison = compare(BEFORE, AFTER)
    comparison.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == comparison


def shown(tables):
    console = Console(width=140, file=io.StringIO())
    console.print(*tables)
    return console.file.getvalue()


def test_terminal_tables():
    before = shown(findings_tables(BEFORE))
    assert re.search(r"perplexity +7\.39 \(0\.62, 88\.6\d\) +30 tokens in 3 passages", before)
    assert re.search(r"simple questions answered right +50\.0 % \(.*\) +4 questions", before)
    changed = shown(comparison_tables(compare(BEFORE, AFTER)))
    assert re.search(r"perplexity 7\.39 \(.*\) 9\.03 \(.*\) \+22\.1 % \(−4\.7 to \+56\.6\) 30 tokens", " ".join(changed.split()))
    assert re.search(r"questions answered right 50\.0 % 50\.0 % \+0\.0 \(.*\) points", " ".join(changed.split()))


def test_the_page_shows_both_and_every_answer(tmp_path):
    write_report(tmp_path / "page.html", [("before", BEFORE), ("after", AFTER)], tmp_path, comparison=compare(BEFORE, AFTER))
    section = (tmp_path / "page.html").read_text().split('<section id="language">')[1].split("</section>")[0]
    text = " ".join(re.sub(r"<[^>]*>", " ", section).split())
    assert "7.39" in text and "9.03" in text and "+22.1 %" in text and "30 tokens in 3 passages" in text
    assert "✓ Paris" in text and "I hear a &lt;i&gt;dog&lt;/i&gt;" in text and "<b>France" not in section
    write_report(tmp_path / "without.html", [("before", dataclasses.replace(BEFORE, language=None))], tmp_path)
    assert 'id="language"' not in (tmp_path / "without.html").read_text()


def test_over_training():
    values = {name: estimate.value for name, estimate in headline(AFTER).items()}
    assert values == {"language/perplexity": pytest.approx(math.exp(2.2)), "language/right": 0.5}
    assert panel("language/right").rate and not panel("language/perplexity").rate
    assert len({panel(name).title for name in values}) == 2
    assert headline(dataclasses.replace(AFTER, language=None)) == {}


def test_ablations_show_what_training_cost():
    """Two seeds of +0.1 and +0.3 nats a token in every passage: +0.2 on average, sure to the last digit; the reference's is +0.1. Of four questions
    two are answered before and by the reference, two and none by the other's seeds.
    """
    arms = {"plan": ("", {}), "other": ("", {})}
    runs = {
        "plan": [Run(0, "", BEFORE, findings([1.1, 2.1, 3.1]), 1.0, 1, "")],
        "other": [Run(s, "", BEFORE, findings([1 + d, 2 + d, 3 + d], right), 1.0, 1, "") for s, d, right in ((0, 0.1, "1100"), (1, 0.3, "0000"))],
    }
    result = compare_arms("t", "", "plan", arms, runs)
    untrained, other = result.before.measures["perplexity"], result.arms[1].measures["perplexity"]
    assert untrained.estimate.value == pytest.approx(math.exp(2)) and untrained.gain is None
    half = T2 / math.sqrt(3)
    assert (untrained.estimate.low, untrained.estimate.high) == pytest.approx((math.exp(2 - half), math.exp(2 + half)), rel=1e-5)
    assert other.estimate.value == pytest.approx(math.exp(2.2)) and other.seeds == pytest.approx([math.exp(2.1), math.exp(2.3)])
    assert other.spread == pytest.approx(np.std(other.seeds, ddof=1))
    assert other.gain.value == pytest.approx(math.expm1(0.2)) and other.gain.low == pytest.approx(other.gain.high, abs=1e-4)
    assert other.difference.value == pytest.approx(math.expm1(0.1))
    [row] = [line for line in markdown(Ablation([result])).splitlines() if line.startswith("| other ")]
    assert "| 9.03 ± 1.28 | +22.1 % (+22.1 to +22.1) |" in row
    asked = result.arms[1].measures["plain_questions"]
    assert (asked.seeds, asked.gain.value, asked.difference.value) == ([0.5, 0.0], -0.25, -0.25) and "| 25.0 % ± 35.4 |" in row
    table = shown(ablation_tables(Ablation([result])))
    assert "+22.1 %" in table and "7.39" in table


def test_ablations_without_plain_text_have_no_such_column():
    bare = dataclasses.replace(BEFORE, language=None, items=[])
    result = compare_arms("t", "", "plan", {"plan": ("", {})}, {"plan": [Run(0, "", bare, bare, 1.0, 1, "")]})
    assert result.before.measures == {} and "perplexity" not in shown(ablation_tables(Ablation([result])))
