"""Plain text, without picture and sound: how well a model still predicts English, and how many simple questions it still answers.

    record = measured(model, job, 128)        # some passages or some questions of analysis/plain_text.py
    language = language_rows(records, items)  # perplexity, share right, every answer

Fine-tuning an audio-visual LLM must not cost it its language; whoever compares two findings sees what it did cost. A passage stands where text
stands in a prompt (models.AVLLM.passage), after the system prompt, and every token of it but the first counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from analysis.findings import Estimate, Language, PlainAnswer
from analysis.items import ItemStore, Key
from analysis.plain_text import PASSAGES, QUESTIONS, Question, text_hash
from analysis.statistics import mapped
from analysis.tally import Record
from models import AVLLM, Media

TextKind = Literal["passages", "questions"]


class TextJob(NamedTuple):
    """Passages or questions [start, stop)."""

    kind: TextKind
    start: int
    stop: int


def text_stated() -> dict[str, Any]:
    """What settings say of it: findings made with other texts are not compared."""
    return {"passages": len(PASSAGES), "questions": len(QUESTIONS), "sha256": text_hash()}


def text_jobs(batch: int) -> list[TextJob]:
    """All passages and all questions, at most `batch` to a job."""
    counts: Mapping[TextKind, int] = {"passages": len(PASSAGES), "questions": len(QUESTIONS)}
    return [TextJob(kind, start, min(start + batch, n)) for kind, n in counts.items() for start in range(0, n, batch)]


def measured(model: AVLLM, job: TextJob, max_new_tokens: int) -> Record:
    """Passages: {"nll": their sums in nats, "tokens": how many}. Questions: {"answers": greedy answers of at most `max_new_tokens`, "cut_off":
    whether each ended at this limit}.
    """
    prefix = model.prefill([Media(None, None)])
    if job.kind == "passages":
        suffixes = [model.passage(passage.text) for passage in PASSAGES[job.start : job.stop]]
        logprobs = model.logprobs(prefix, [0] * len(suffixes), suffixes).double().sum(1)
        return {"nll": -logprobs.cpu().numpy(), "tokens": np.array([len(suffix.targets) for suffix in suffixes])}
    asked = [question.text for question in QUESTIONS[job.start : job.stop]]
    said = model.generate_ids(prefix, [0] * len(asked), asked, max_new_tokens=max_new_tokens)
    answers = [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
    return {"answers": answers, "cut_off": [len(ids) >= max_new_tokens for ids in said]}


def language_rows(records: Sequence[Record], items: ItemStore) -> Language:
    """What the records of `text_jobs`, in order, come to."""
    nll, tokens = (np.concatenate([record[name] for record in records if "nll" in record]) for name in ("nll", "tokens"))
    answers, cut_off = ([value for record in records for value in record.get(name, ())] for name in ("answers", "cut_off"))
    mean, perplexity = text_estimates([passage.name for passage in PASSAGES], nll, tokens, items)
    asked = [
        PlainAnswer(q.text, list(q.accepted), said, is_right(said, q), ended) for q, said, ended in zip(QUESTIONS, answers, cut_off, strict=True)
    ]
    names = [question.text for question in QUESTIONS]
    keys = [Key("language", None, None, "", measure) for measure in ("right", "cut_off")]
    right, ended = items.of(names, names).rates(keys, [[answer.right, answer.cut_off] for answer in asked])
    return Language(mean, perplexity, right, asked, ended)


def text_estimates(names: Sequence[str], nll: ArrayLike, tokens: ArrayLike, items: ItemStore) -> tuple[Estimate, Estimate]:
    """Mean negative log-likelihood a token over all passages, clustered by passage, and the perplexity, exp of it and its bounds."""
    [mean] = items.of(names, names).means([Key("language", None, None, "", "nll")], np.asarray(nll)[:, None], tokens)
    return mean, mapped(mean, math.exp)


def is_right(answer: str, question: Question) -> bool:
    """Whether an accepted answer is in it, as whole words in this order, in any case."""
    said = _words(answer)
    return any(said[at : at + len(wanted)] == wanted for wanted in map(_words, question.accepted) for at in range(len(said)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
