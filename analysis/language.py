"""Plain text, without picture and sound: how well a model still predicts English, and how many simple questions it still answers.

    record = measured(model, job)             # some passages or some questions of analysis/plain_text.py
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

ANSWER_TOKENS = 24  # longest answer
TextKind = Literal["passages", "questions"]


class TextJob(NamedTuple):
    """Passages or questions [start, stop)."""

    kind: TextKind
    start: int
    stop: int


def text_stated() -> dict[str, Any]:
    """What settings say of it: findings made with other texts are not compared."""
    return {"passages": len(PASSAGES), "questions": len(QUESTIONS), "longest_answer": ANSWER_TOKENS, "sha256": text_hash()}


def text_jobs(batch: int) -> list[TextJob]:
    """All passages and all questions, at most `batch` to a job."""
    counts: Mapping[TextKind, int] = {"passages": len(PASSAGES), "questions": len(QUESTIONS)}
    return [TextJob(kind, start, min(start + batch, n)) for kind, n in counts.items() for start in range(0, n, batch)]


def measured(model: AVLLM, job: TextJob) -> Record:
    """Passages: {"nll": their sums in nats, "tokens": how many}. Questions: {"answers": greedy answers}."""
    prefix = model.prefill([Media(None, None)])
    if job.kind == "passages":
        suffixes = [model.passage(passage.text) for passage in PASSAGES[job.start : job.stop]]
        logprobs = model.logprobs(prefix, [0] * len(suffixes), suffixes).double().sum(1)
        return {"nll": -logprobs.cpu().numpy(), "tokens": np.array([len(suffix.targets) for suffix in suffixes])}
    asked = [question.text for question in QUESTIONS[job.start : job.stop]]
    return {"answers": model.generate(prefix, [0] * len(asked), asked, max_new_tokens=ANSWER_TOKENS)}


def language_rows(records: Sequence[Record], items: ItemStore) -> Language:
    """What the records of `text_jobs`, in order, come to."""
    nll, tokens = (np.concatenate([record[name] for record in records if "nll" in record]) for name in ("nll", "tokens"))
    answers = [answer for record in records for answer in record.get("answers", ())]
    mean, perplexity = text_estimates([passage.name for passage in PASSAGES], nll, tokens, items)
    asked = [PlainAnswer(q.text, list(q.accepted), said, is_right(said, q)) for q, said in zip(QUESTIONS, answers, strict=True)]
    names = [question.text for question in QUESTIONS]
    right = items.of(names, names).rates([Key("language", None, None, "", "right")], [[answer.right] for answer in asked])[0]
    return Language(mean, perplexity, right, asked)


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
