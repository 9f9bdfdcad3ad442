"""What an answer names: known label phrases found in free text, and the verdict of an answer about a clip.

    phrases = phrases_of(clips.labels(), "hear")            # {"dog": "a dog barking", …}
    named("I hear dogs that bark.", phrases)                # {"dog"}
    verdict("I hear a dog barking.", clip, "hear", phrases) # "audio" | "vision" | "both" | "neither" | "nothing" | "unparsed"
    abstains("There is no sound, I see a dog.", "hear")     # True

Text and phrases are brought to the same form: lower case, no punctuation, no articles and function words, word stems ("barks", "barking"
and "barked" are one). Then phrases are looked for inside clauses, longest first, and what one phrase has used no shorter one can use: "a
rider on a galloping horse" is not also "a horse", "a fire truck" not also "a truck". Word order as in the phrase goes first; after that,
any order with at most two other words in between ("the barking of a dog", "a dog is loudly barking"). A clause that says no / not / never /
without before the phrase names nothing. No model and no network is involved; the judges that read free captions build on this.

An answer that names no known event may say that there is nothing to hear (to see): "nothing", "no sound", "I can't hear anything", "it is silent",
"a black screen". Of the clauses only those about the stream asked about count: a clause is about what its own words say ("I see", "audible"), else
about the same as the clause before it in the sentence, else about what the question asks for. What is said to be heard (seen) after all ("I hear
music"), what leaves something over ("nothing but wind", "no other sound", "nothing unusual", "silence, then music") and the denial of a single
event ("no dog barking") is not nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal

from data.clips import Clip
from data.questions import Modality

Verdict = Literal["audio", "vision", "both", "neither", "nothing", "unparsed"]
VERDICTS: tuple[Verdict, ...] = ("audio", "vision", "both", "neither", "nothing", "unparsed")

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


# ---------------------------------------------------------------- that there is nothing

_SIDE: dict[Modality, re.Pattern[str]] = {
    "hear": re.compile(
        r"\b(?:hear(?:s|d|ing)?|sounds?|audio|audible|inaudible|noises?|listen\w*|soundtrack|soundless|silen\w+|quiet|muted?|track)\b"
    ),
    "see": re.compile(
        r"\b(?:see(?:s|n|ing)?|visible|invisible|visuals?|pictures?|images?|watch\w*|looks?|shows?|shown|screen|frames?|footage|black|blank|dark"
        r"|darkness|blackness)\b"
    ),
}
_BOTH = re.compile(
    r"\b(see|seen|visible|hear|heard|audible)\s+(?:and|or|nor)\s+(?:be\s+)?(see|seen|visible|hear|heard|audible)\b"
)  # "I can't see or hear anything" is one clause
_NO = r"\b(?:not|never|without|neither|nor|cannot|cant|unable|nothing)\b"
_ANY = r"(?:audible|discernible|detectable|perceptible|noticeable|actual|apparent|visible|visual)"
_IS = r"(?:is|are|was|seems|appears)\s+(?:to be\s+)?(?:completely\s+)?"
_THING: dict[Modality, str] = {
    "hear": r"(?:sounds?(?:\s?track)?|audio(?:\s+track)?|noises?)",
    "see": r"(?:pictures?|images?|visuals?|video|objects?|visual content)",
}
_LEFT_OVER = re.compile(  # what these say is that there is something
    rf"\b(?:nothing|anything|no\s+(?:{_ANY}\s+)?{_THING['hear']}|no\s+(?:{_ANY}\s+)?{_THING['see']})\s+"
    r"(?:else|except|other|besides|apart|save|like|much|unusual|special|notable|remarkable|specific|clear|in particular"
    r"|of\s+(?!any)|from\s+(?!(?:the|this)\s+(?:video|clip|recording|picture))"
    r"|but\s+(?!i\b|we\b|there\b|it\b|see\b|hear\b|the\s+(?:video|picture|clip|image|sound|audio)\b))"
)
_ONLY_AT_FIRST = re.compile(r"\b(?:then|until|at first|initially)\b")
_DENIES: dict[Modality, re.Pattern[str]] = {
    "hear": re.compile(
        rf"(?<!not )\b(?:silence(?!\s+(?:is|was)\s+broken)|silent|soundless|inaudible)\b|\b(?:muted?|quiet)\W*$"
        rf"|{_NO}\s+hear(?:ing)?\W*$|\bnot audible\b|\b(?:sounds?|audio|track|soundtrack)\s+{_IS}(?:empty|missing|absent|off)\b"
    ),
    "see": re.compile(
        r"(?<!not )(?<!not a )\b(?:black|blank|dark|empty)\s+"
        r"(?:screen|frames?|pictures?|images?|video|clip|scene|view|background)\b(?!\s+(?:with|of|show))"
        r"|(?:^|\b(?:it|everything|all|see|seeing|only|just|screen|picture|image|video)\b)\W*(?:is |was )?"
        r"(?:all |completely |entirely |only )?(?:black|blank|dark|invisible)\W*$"
        rf"|\b(?:darkness|blackness)\b|{_NO}\s+see(?:ing)?\W*$|\bnot visible\b"
        rf"|\b(?:pictures?|images?|video|screen)\s+{_IS}(?:empty|missing|absent|off|black|blank)\b"
    ),
}
_NOTHING: dict[Modality, re.Pattern[str]] = {
    modality: re.compile(
        rf"\b(?:nothing|none)\b|\bno\s+(?:{_ANY}\s+)?{_THING[modality]}\b|\bnot a (?:sound|thing)\b"
        rf"|{_NO}(?:\W+\w+){{0,5}}?\W+(?:anything|(?:any|an?)\s+(?:{_ANY}\s+)?{_THING[modality]})\b(?!\s+(?:of|other))"
    )
    for modality in _THING
}
_CLAIMS: dict[Modality, re.Pattern[str]] = {
    "hear": re.compile(r"\b(?:hear|heard|hears|hearing|audible|sounds?\s+(?:of|like))\b"),
    "see": re.compile(r"\b(?:see|seen|sees|seeing|visible|shows|picture of|image of|looks like)\b"),
}
_PERCEIVING = frozenset({"hear", "see", "heard", "seen", "visibl", "audibl", "sound", "like", "something", "shown", "show", "what", "you"})


def abstains(answer: str, modality: Modality) -> bool:
    """Whether an answer says that nothing can be heard ("hear") or seen ("see"). Whether it also names an event is not asked here."""
    text = re.sub(r"n['’]t\b", " not", answer.lower()).replace("can not", "cannot")
    text = _LEFT_OVER.sub("something ", _BOTH.sub(r"\1 \2", text))
    denied = False
    for sentence in re.split(r"[.!?\n]", text):
        about = {modality}
        for clause in filter(re.compile(r"\w").search, CLAUSE.split(sentence)):
            about = {side for side, own in _SIDE.items() if own.search(clause)} or about
            if modality not in about:
                continue
            if _NOTHING[modality].search(clause) or _DENIES[modality].search(clause):
                denied = True
            elif _CLAIMS[modality].search(clause) and not re.search(_NO, clause) and set(content_stems(clause)) - _PERCEIVING:
                return False
    return denied and not _ONLY_AT_FIRST.search(text)


# ---------------------------------------------------------------- verdicts


def verdict(answer: str, clip: Clip, modality: Modality, phrases: Mapping[str, str], video: bool = True, audio: bool = True) -> Verdict:
    """What an answer about a clip follows; `phrases` are those of the question's modality (`phrases_of`).

    audio: it names the sound's class and not the picture's; vision: the reverse; both; neither: other known classes only; nothing: it names no known
    class and says that there is nothing to hear (on see-questions: to see); unparsed: neither of these.
    `video`, `audio`: which streams the model was given. Where the labels agree a right answer counts as `audio`, as `vision` if there was no sound.
    """
    return follows(answer, clip.video_label if video else "", clip.audio_label if audio else "", modality, phrases)


def follows(answer: str, video_label: str, audio_label: str, modality: Modality, phrases: Mapping[str, str]) -> Verdict:
    """`verdict` from the two classes alone; "" is a stream that was not given or has nothing in it."""
    names = named(answer, phrases)
    if not names:
        return "nothing" if abstains(answer, modality) else "unparsed"
    heard, seen = audio_label in names, video_label in names
    if heard and seen:
        return "both" if audio_label != video_label else "audio"
    return "audio" if heard else "vision" if seen else "neither"


def is_correct(said: Verdict, modality: Modality, video_label: str, audio_label: str) -> bool:
    """Whether a verdict is the right one: what the question designates, and "nothing" where that stream was not given or has nothing in it ("")."""
    if not (audio_label if modality == "hear" else video_label):
        return said == "nothing"
    return said == ("audio" if modality == "hear" or video_label == audio_label else "vision")
