"""What an answer names: known label phrases found in free text, and the verdict of an answer about a clip.

    phrases = phrases_of(clips.labels(), "hear")            # {"dog": "a dog barking", …}
    named("I hear dogs that bark.", phrases)                # {"dog"}
    verdict("I hear a dog barking.", clip, phrases)         # "audio" | "vision" | "both" | "neither" | "unparsed"

Text and phrases are brought to the same form: lower case, no punctuation, no articles and function words, word stems ("barks", "barking"
and "barked" are one). Then phrases are looked for inside clauses, longest first, and what one phrase has used no shorter one can use: "a
rider on a galloping horse" is not also "a horse", "a fire truck" not also "a truck". Word order as in the phrase goes first; after that,
any order with at most two other words in between ("the barking of a dog", "a dog is loudly barking"). A clause that says no / not / never /
without before the phrase names nothing. No model and no network is involved; the judges that read free captions build on this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal

from data.clips import Clip
from data.questions import Modality

Verdict = Literal["audio", "vision", "both", "neither", "unparsed"]
VERDICTS: tuple[Verdict, ...] = ("audio", "vision", "both", "neither", "unparsed")

GAP = 2  # words that may stand between the words of a phrase in the second, looser pass
FUNCTION_WORDS = frozenset({
    "a", "an", "the", "this", "that", "these", "those", "some", "i", "it", "its", "there", "here", "he", "she", "they", "we", "you", "my",
    "your", "his", "her", "their", "is", "are", "am", "was", "were", "be", "been", "being", "has", "have", "had", "do", "does", "did", "can",
    "could", "may", "might", "must", "seems", "seem", "of", "on", "in", "at", "to", "from", "with", "by", "as", "into", "onto", "upon", "which",
    "who", "what", "while",
})  # fmt: skip
NEGATIONS = frozenset({"no", "not", "never", "without", "nothing", "neither", "nor", "cannot", "cant"})
IRREGULAR = {
    "hooves": "hoof", "people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "geese": "goose",
    "mice": "mouse", "wolves": "wolf", "leaves": "leaf", "rang": "ring", "rung": "ring", "sang": "sing", "sung": "sing", "blew": "blow",
    "blown": "blow", "broke": "break", "broken": "break", "fell": "fall", "fallen": "fall", "ran": "run", "took": "take", "taken": "take",
    "flew": "fly", "flown": "fly", "crew": "crow", "spoke": "speak", "spoken": "speak", "wept": "weep",
}  # fmt: skip
CLAUSE = re.compile(r"[.,;:!?()\[\]\"“”\n—–]|\s-\s|\b(?:and|but|or|then|plus)\b")


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


def clauses(text: str) -> list[list[str]]:
    """Content words of each clause, as stems, negations kept."""
    text = re.sub(r"n['’]t\b", " not", text.lower())
    text = re.sub(r"['’]s\b", "", text)
    parts = (re.findall(r"[^\W_]+", part) for part in CLAUSE.split(text))
    return [[stem(w) for w in words if w not in FUNCTION_WORDS] for words in parts if words]


@lru_cache(maxsize=10_000)
def content_stems(phrase: str) -> tuple[str, ...]:
    """The stems a phrase is looked for by, in order."""
    return tuple(word for part in clauses(phrase) for word in part)


def event_words(phrase: str) -> list[str]:
    """The words of a phrase that carry its meaning, as written: "waves breaking on a shore" -> waves, breaking, shore."""
    return [w for w in re.findall(r"[^\W_]+", phrase) if w.lower() not in FUNCTION_WORDS]


def phrases_of(labels: Mapping[str, tuple[str, str]], modality: Modality) -> dict[str, str]:
    """Class -> the phrase that answers a question of this modality: the heard one on hear-questions, the seen one on see-questions."""
    return {name: heard if modality == "hear" else seen for name, (seen, heard) in labels.items()}


def named(answer: str, phrases: Mapping[str, str]) -> set[str]:
    """The classes whose phrase the answer contains (see the module docstring for what counts). Empty where it names none."""
    wanted: dict[tuple[str, ...], set[str]] = {}
    for name, phrase in phrases.items():
        wanted.setdefault(content_stems(phrase), set()).add(name)
    order = sorted((p for p in wanted if p), key=lambda p: (-len(p), p))
    found: set[str] = set()
    for words in clauses(answer):
        free: list[str | None] = list(words)
        for strict in (True, False):
            for wording in order:
                for at in _places(free, wording, strict):
                    if not any(w in NEGATIONS for w in words[: at[-1]]):
                        found |= wanted[wording]
                    for i in at:
                        free[i] = None
    return found


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


def verdict(answer: str, clip: Clip, phrases: Mapping[str, str], video: bool = True, audio: bool = True) -> Verdict:
    """What an answer about a clip follows; `phrases` are those of the question's modality (`phrases_of`).

    audio: it names the sound's class and not the picture's; vision: the reverse; both; neither: other known classes only; unparsed: no known class.
    `video`, `audio`: which streams the model was given. Where the labels agree a right answer counts as `audio`, as `vision` if there was no sound.
    """
    return follows(answer, clip.video_label if video else "", clip.audio_label if audio else "", phrases)


def follows(answer: str, video_label: str, audio_label: str, phrases: Mapping[str, str]) -> Verdict:
    """`verdict` from the two classes alone; "" is a stream that was not given."""
    names = named(answer, phrases)
    if not names:
        return "unparsed"
    heard, seen = audio_label in names, video_label in names
    if heard and seen:
        return "both" if audio_label != video_label else "audio"
    return "audio" if heard else "vision" if seen else "neither"


def is_correct(said: Verdict, modality: Modality, agree: bool) -> bool:
    """Whether a verdict is the one that the question designates. `agree`: both streams were given and their labels are the same."""
    return said == ("audio" if agree or modality == "hear" else "vision")
