"""Words, stems and clauses of answers, and known phrases found in them. analysis/events.py says what is made of it.

    named("I hear dogs that bark.", {"dog": "a dog barking"})              # {"dog"}
    Wordings(["thunder and rain", "rain"]).found("thunder, and rain")      # {("thunder", "rain")}

Text and phrases are brought to the same form: lower case, no punctuation, no articles and function words, word stems ("barks", "barking"
and "barked" are one). Then phrases are looked for inside clauses, longest first, and what one phrase has used no shorter one can use: "a
rider on a galloping horse" is not also "a horse", "a fire truck" not also "a truck". Word order as in the phrase goes first; after that,
any order with at most two other words in between ("the barking of a dog", "a dog is loudly barking"). A clause that says no / not / never /
nothing / without before the phrase names nothing.

A phrase that would itself be torn apart or misread by this ("male speech, man speaking", "thunder and rain", "no sound of engines", "heart sounds",
"what is this") is looked for first, across clauses, word by word in its own order, and then counts as one word of the answer.

Scripts without spaces between words (Chinese, Japanese, Thai …) are read character by character, in the order of the phrase only; stems, function
words and negations are English ones.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypeVar

from data.questions import Modality

Stems = tuple[str, ...]
T = TypeVar("T")

GAP = 2  # words that may stand between the words of a phrase in the second, looser pass
FUNCTION_WORDS = frozenset({
    "a", "an", "the", "this", "that", "these", "those", "some", "i", "it", "its", "there", "here", "he", "she", "they", "we", "you", "my",
    "your", "his", "her", "their", "is", "are", "am", "was", "were", "be", "been", "being", "has", "have", "had", "do", "does", "did", "can",
    "could", "may", "might", "must", "seems", "seem", "of", "on", "in", "at", "to", "from", "with", "by", "as", "into", "onto", "upon", "which",
    "who", "what", "while",
})  # fmt: skip
NEGATIONS = frozenset({"no", "not", "never", "without", "nothing", "neither", "nor", "cannot", "cant"})
_BUT = re.compile(r"\b(?:except(?:ing)?(?:\s+for)?|besides|(?:apart|aside)\s+from|(?:other|else)\s+than)\b")  # "nothing except a dog" names the dog
IRREGULAR = {
    "hooves": "hoof", "people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "geese": "goose",
    "mice": "mouse", "wolves": "wolf", "leaves": "leaf", "rang": "ring", "rung": "ring", "sang": "sing", "sung": "sing", "blew": "blow",
    "blown": "blow", "broke": "break", "broken": "break", "fell": "fall", "fallen": "fall", "ran": "run", "took": "take", "taken": "take",
    "flew": "fly", "flown": "fly", "crew": "crow", "spoke": "speak", "spoken": "speak", "wept": "weep",
}  # fmt: skip
SEEING = frozenset({"see", "sees", "seen", "seeing", "visible", "visual", "visually", "picture", "image", "view", "watch", "watching", "looks",
    "shows", "shown", "depicts", "footage",
})  # fmt: skip
HEARING = frozenset({
    "hear", "hears", "heard", "hearing", "sound", "sounds", "audible", "audio", "audibly", "noise", "noises", "listen", "listening", "soundtrack",
})  # fmt: skip
JOINING = frozenset({"and", "but", "or", "then", "plus"})
CLAUSE = re.compile(rf"[.,;:!?()\[\]\"“”\n—–。、।]|\s-\s|\b(?:{'|'.join(sorted(JOINING))})\b")
# Thai, Lao, Burmese, Khmer, kana, Han, Hangul: no spaces between words, or endings written onto them.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_])+")
_MARK = "ꙮ"  # a letter that nobody writes: stands for a phrase that was found


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """A crude common form of a lower-case English word: plural and verb endings off. Not a dictionary form; only equal stems matter."""
    word = IRREGULAR.get(word, word)
    if len(word) > 4 and word.endswith(("ies", "ied")):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-2] if word.endswith(("ses", "xes", "zes", "ches", "shes")) else word[:-1]
    for ending in ("ing", "ed"):
        rest = word.removesuffix(ending)
        if rest != word and len(rest) >= 3 and re.search("[aeiouy]", rest) and not (ending == "ed" and rest.endswith("e")):
            word = rest
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiou":
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def plain(text: str) -> str:
    """Lower case, one form of each character, "n't" as a word of its own, no possessive s, "but" for all that leaves something over."""
    text = re.sub(r"n['’]t\b", " not", unicodedata.normalize("NFKC", text).lower())
    return _BUT.sub("but", re.sub(r"['’]s\b", "", text))


NEGATION_STEMS = frozenset(stem(word) for word in NEGATIONS)  # as `clauses` gives them: "nothing" is "noth" there


def clauses(text: str) -> list[list[str]]:
    """Content words of each clause, as stems, negations kept."""
    parts = (_WORD.findall(part) for part in CLAUSE.split(plain(text)))
    return [[stem(w) for w in words if w not in FUNCTION_WORDS] for words in parts if words]


@lru_cache(maxsize=100_000)
def content_stems(phrase: str) -> Stems:
    """The stems a phrase is looked for by, in order; all its words where none of them carries a meaning of its own ("what is this")."""
    return tuple(word for part in clauses(phrase) for word in part) or tuple(_WORD.findall(plain(phrase)))


@lru_cache(maxsize=100_000)
def _is_torn(phrase: str) -> bool:
    """Whether reading clause by clause would tear the phrase apart, or take a word of it for a denial or for what says who speaks of what."""
    parts, words = clauses(phrase), set(_WORD.findall(plain(phrase)))
    return len(parts) > 1 or not any(parts) or bool(words & (NEGATIONS | SEEING | HEARING | JOINING))


def event_words(phrase: str) -> list[str]:
    """The words of a phrase that carry its meaning, as written: "waves breaking on a shore" -> waves, breaking, shore."""
    return [w for w in re.findall(r"[^\W_]+", phrase) if w.lower() not in FUNCTION_WORDS]


def phrases_of(labels: Mapping[str, tuple[str, str]], modality: Modality) -> dict[str, str]:
    """Class -> the phrase that answers a question of this modality: the heard one on hear-questions, the seen one on see-questions."""
    return {name: heard if modality == "hear" else seen for name, (seen, heard) in labels.items()}


def named(answer: str, phrases: Mapping[str, str]) -> set[str]:
    """The classes whose phrase the answer contains (see the module docstring for what counts). Empty where it names none."""
    wordings = Wordings(phrases.values())
    found = wordings.found(wordings.marked(answer))
    return {name for name, phrase in phrases.items() if content_stems(phrase) in found}


class Wordings:
    """Phrases made ready to be looked for; what is found are their `content_stems`."""

    def __init__(self, phrases: Iterable[str]):
        torn: dict[Stems, bool] = {}
        for phrase in phrases:
            if stems := content_stems(phrase):
                torn[stems] = torn.get(stems, False) or _is_torn(phrase)
        marks = {stems: f"{_MARK}{n}{_MARK}" for n, stems in enumerate(stems for stems, is_torn in torn.items() if is_torn)}
        self._torn = _by_first((stems, mark) for stems, mark in marks.items())
        self._whole = _by_first([*(((mark,), stems) for stems, mark in marks.items()), *((s, s) for s in torn if not NEGATION_STEMS.intersection(s))])

    def marked(self, text: str) -> str:
        """The text with each phrase in it that clauses would tear apart as one word that no one writes."""
        if not self._torn:
            return text
        text, spans = plain(text), list[tuple[int, int, str]]()
        words = [(m.start(), m.end(), m[0]) for m in _WORD.finditer(text)]
        content = [(start, end, stem(w)) for start, end, w in words if w not in FUNCTION_WORDS and w not in JOINING]
        for tokens in (content, words):  # the second for phrases of function words alone
            said = [token for *_, token in tokens]
            wanted = {stems: mark for word in set(said) for stems, mark in self._torn.get(word, ())}
            for stems in sorted(wanted, key=lambda s: (-len(s), s)):
                for at in range(len(said) - len(stems) + 1):
                    if tuple(said[at : at + len(stems)]) == stems:
                        start, end = tokens[at][0], tokens[at + len(stems) - 1][1]
                        if all(end <= a or b <= start for a, b, _ in spans):
                            spans.append((start, end, wanted[stems]))
        for start, end, mark in sorted(spans, reverse=True):
            text = f"{text[:start]} {mark} {text[end:]}"
        return text

    def found(self, text: str) -> set[Stems]:
        """What the clauses of a marked text name."""
        found: set[Stems] = set()
        for words in clauses(text):
            there = set(words)
            wanted = {key: stems for word in there for key, stems in self._whole.get(word, ()) if there.issuperset(key)}
            order = sorted(wanted, key=lambda key: (-len(key), key))
            free: list[str | None] = list(words)
            for strict in (True, False):
                for key in order:
                    if not strict and re.match(f"[{_UNSPACED}]", key[0]):
                        continue
                    for at in _places(free, key, strict):
                        if not any(w in NEGATION_STEMS for w in words[: at[-1]]):
                            found.add(wanted[key])
                        for i in at:
                            free[i] = None
        return found


def _by_first(pairs: Iterable[tuple[Stems, T]]) -> dict[str, list[tuple[Stems, T]]]:
    """Keys and what they stand for, by the first word of the key: a text has to be asked only for the phrases that can be in it."""
    out: dict[str, list[tuple[Stems, T]]] = {}
    for key, value in pairs:
        out.setdefault(key[0], []).append((key, value))
    return out


def _places(words: list[str | None], phrase: tuple[str, ...], strict: bool) -> Iterable[list[int]]:
    """Index lists where the phrase stands among words not yet used, left to right and not overlapping."""
    start = 0
    while start < len(words):
        at = _match(words, phrase, start, strict)
        if at is None:
            start += 1
        else:
            yield at
            start = max(at) + 1


def _match(words: list[str | None], phrase: tuple[str, ...], start: int, strict: bool) -> list[int] | None:
    """Whether the phrase starts at `start`: word for word, or (loose) in any order within GAP extra words and no used word in between."""
    if strict:
        return list(range(start, start + len(phrase))) if tuple(words[start : start + len(phrase)]) == phrase else None
    left, at = list(phrase), []
    for i in range(start, min(len(words), start + len(phrase) + GAP)):
        word = words[i]
        if word is None or (i == start and word not in left):
            return None
        if word in left:
            left.remove(word)
            at.append(i)
        if not left:
            return at
    return None
