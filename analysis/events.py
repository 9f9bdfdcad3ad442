"""What an answer names, and the verdict of an answer about a clip.

    reader = Reader(clips.labels())                                # phrases of all classes and their synonyms
    reader.names("I hear a puppy bark.", "hear")                   # {frozenset({"dog"})}
    verdict("I hear a dog barking.", clip, "hear", reader)         # "audio" | "vision" | "both" | "neither" | "nothing" | "unparsed"
    abstains("There is no sound, I see a dog.", "hear")            # True

Words, stems, negation and how phrases are found in them: analysis/wording.py. No model and no network is involved. The `labels` judge of free
captions (analysis/judges.py) reads by the same `Reader`.

Which side a clause of the answer speaks about: an explicit word says so ("I see", "visible", "I hear", "the sound of", "Audio:"), else the clause
before it in the same sentence, else the question. What is unsaid after a both-question is read by its words: sound phrases ("a dog barking") claim
a sound, and are also credited as seen if that is true; other phrases ("a dog") claim a sight. Asked what it hears, "I hear a dog" names the dog's
sound.

A wording may stand at several classes ("a plane" for both kinds of plane): then it is right for each and names none of the others.

An answer that names no known event may say that there is nothing to hear (to see): "nothing", "no sound", "I can't hear anything", "it is silent",
"a black screen". Of the clauses only those about the stream asked about count: a clause is about what its own words say ("I see", "audible"), else
about the same as the clause before it in the sentence, else about what the question asks for. What is said to be heard (seen) after all ("I hear
music"), what leaves something over ("nothing but wind", "no other sound", "nothing unusual", "silence, then music") and the denial of a single
event ("no dog barking") is not nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from analysis.synonyms import SYNONYMS, Synonyms
from analysis.wording import CLAUSE, HEARING, NEGATIONS, SEEING, Stems, Wordings, content_stems, event_words, named, phrases_of, stem
from data.clips import Clip, Clips, DataError
from data.questions import Modality
from data.questions import answer as taught

__all__ = [  # also what is found in text, so that whoever reads answers needs one module
    "VERDICTS", "Claims", "Reader", "Verdict", "abstains", "content_stems", "event_words", "follows", "is_correct", "named", "phrases_of",
    "require_readable", "stem", "synonyms_of", "verdict",
]  # fmt: skip

Verdict = Literal["audio", "vision", "both", "neither", "nothing", "unparsed"]
VERDICTS: tuple[Verdict, ...] = ("audio", "vision", "both", "neither", "nothing", "unparsed")
Side = Literal["audio", "video"]
SIDES: tuple[Side, ...] = get_args(Side)
Labels = Mapping[str, Sequence[str]]  # class -> (seen, heard)


def asked(modality: str) -> tuple[Side, ...]:
    """The sides that a question asks for."""
    return {"see": ("video",), "hear": ("audio",), "both": SIDES}[modality]  # type: ignore[return-value]


# ---------------------------------------------------------------- clauses and their sides

PASSIVE = frozenset({"seen", "visible", "heard", "audible"})  # "a dog can be seen, a cat meows": these do not speak for the next clause
NOTHING = re.compile(r"\b(nothing|silence|silent|no sounds?|no audio|soundless|inaudible)\b")
_JOINED = re.compile(
    r"\b(see|sees|seen|visible)\s+(?:and|or)\s+(hear|hears|heard|audible)\b|\b(hear|hears|heard|audible)\s+(?:and|or)\s+(see|sees|seen|visible)\b"
)
LEAD = re.compile(
    r"^\W*(?:(?:in|on) the (?:video|clip|picture|background)\W+)?(?:(?:i|we|you) )?(?:(?:can|could) )?(?:(?:see|hear)s? )?(?:the sounds? of )?"
)
DENIED_VERB = re.compile(r"\b(?:is|are|was|were|do|does|did)(?:\s+not\b|n['’]t\b)|\bnever\b")
DENIAL = re.compile(rf"\b(?:{'|'.join(sorted(NEGATIONS))})\b|n['’]t\b")


class Clause(NamedTuple):
    """A clause of an answer in lower case and the sides it speaks about (none: nothing says which). `denied`: it says that something is not."""

    text: str
    sides: frozenset[Side]
    denied: bool
    inherited: bool  # the sides are those of a clause before it
    unsaid: bool = False  # the sides are those of the question


def clauses(answer: str, modality: str) -> list[Clause]:
    """An answer in clauses, each with its sides (see the module docstring)."""
    answer = re.sub(r"\b(i|we)\s+saw\b", r"\1 see", answer.lower())
    answer = re.sub(r"\b(video|vision)\s*:", "visual:", answer)
    answer = _JOINED.sub("seehear", answer)
    default: frozenset[Side] = frozenset(asked(modality)) if modality != "both" else frozenset()
    sides, denied, carried, out, start, before = default, False, False, list[Clause](), 0, ""
    for at in (*CLAUSE.finditer(answer), None):
        text = answer[start : at.start() if at else len(answer)]
        if words := re.findall(r"[^\W_]+", text):
            if re.search(r"[.!?\n。।]", before) and ":" not in before:
                sides, carried = default, False
            mark = next((w for w in words if w in SEEING or w in HEARING or w == "seehear"), None)
            own: frozenset[Side] = sides if mark is None else _sides_of(mark)
            if mark not in PASSIVE:
                sides = own
            denied = bool(DENIAL.search(text)) or (denied and before.split()[-1:] == ["or"])  # "no dog or cat" denies the cat too
            out.append(Clause(" ".join(text.replace("seehear", "").split()), own, denied, carried and mark is None, not carried and mark is None))
            carried = carried or (mark is not None and mark not in PASSIVE)
            before = ""
        if at:
            start, before = at.end(), f"{before} {at.group()}"
    return out


def _sides_of(mark: str) -> frozenset[Side]:
    return frozenset(SIDES) if mark == "seehear" else frozenset({"audio"}) if mark in HEARING else frozenset({"video"})


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


# ---------------------------------------------------------------- what is claimed


class Claims:
    """What an answer says is there, per side: sets of classes that a wording may mean.

    `truth`: the class of each side's event, as a set; empty where there is none, or where nobody knows.
    """

    def __init__(self, truth: Mapping[Side, frozenset[str]]):
        self.truth = truth
        self.said: dict[Side, set[frozenset[str]]] = {"audio": set(), "video": set()}
        self.surely_heard: set[frozenset[str]] = set()  # by a sound phrase, or because the answer says that it is heard
        self.sounds = False  # whether a sound phrase is among what is heard

    def add(self, sides: frozenset[Side], classes: frozenset[str], sound: bool, sounds: bool, unsaid: bool = False) -> None:
        """One wording in a clause about `sides`. `sound`: it is a sound phrase; `sounds`: some wording of the clause is; `unsaid`: only the question
        says that it is about these sides.
        """
        # "I hear a dog" claims the dog's sound; "I hear a dog barking at a car" does not claim the car's
        hears = (sound or not sounds) if "audio" in sides else (sound and not sides)
        sees = sides == {"video"} or (sides != {"audio"} and (not sound or bool(classes & self.truth["video"])))
        if hears:
            self.said["audio"].add(classes)
            self.sounds |= sound
            if sound or not unsaid:
                self.surely_heard.add(classes)
        if sees:
            self.said["video"].add(classes)

    def exact(self, side: Side) -> list[frozenset[str]]:
        """What is said on a side, each event once: "a jet plane, an airplane" is one."""
        return _exact(self.said[side])


def _exact(said: set[frozenset[str]]) -> list[frozenset[str]]:
    return [c for c in said if not any(other < c for other in said)]


class Reader:
    """Reads answers for the events of `labels` (class -> its seen and its heard phrase) and their synonyms; knows no other event.

    `synonyms`: class -> (words for what is seen, words for what is heard). None: those of analysis/synonyms.py, for classes that are named as there.
    """

    def __init__(self, labels: Labels, synonyms: Synonyms | None = None):
        synonyms = SYNONYMS if synonyms is None else synonyms
        self.labels = labels
        self.classes: dict[Stems, frozenset[str]] = {}
        self.sounds: set[Stems] = set()
        phrases = []
        for name, (seen, heard) in labels.items():
            things, noises = _shipped(name, synonyms)
            for phrase in (seen, heard, *things, *noises):
                stems = content_stems(phrase)
                self.classes[stems] = self.classes.get(stems, frozenset()) | {name}
                phrases.append(phrase)
            self.sounds |= {content_stems(phrase) for phrase in (heard, *noises)}
        self._wordings = Wordings(phrases)
        self._own: dict[str, dict[str, str]] = {m: phrases_of(labels, m) for m in ("hear", "see")}  # type: ignore[misc, arg-type]
        self._own_wordings = {modality: Wordings(own.values()) for modality, own in self._own.items()}
        self._found: dict[str, set[Stems]] = {}
        self._names: dict[tuple[str, Modality], set[frozenset[str]]] = {}

    def claims(self, answer: str, modality: str, truth: Mapping[Side, frozenset[str]] | None = None) -> tuple[Claims, bool]:
        """What the answer claims, and whether it could be read: it names or denies a known event, or says that there is nothing."""
        claims = Claims(truth or dict.fromkeys(SIDES, frozenset()))
        readable = bool(NOTHING.search(answer.lower()))
        for clause in clauses(self._wordings.marked(answer), modality):
            if clause.denied:
                readable |= bool(self._in(DENIAL.sub(" ", clause.text)))
            whole = clause.denied and (DENIED_VERB.search(clause.text) or not DENIAL.search(clause.text))  # "a dog is not barking" denies the dog
            found = self._in(f"no {clause.text}" if whole else clause.text)
            readable |= bool(found)
            sounds = bool(found & self.sounds)
            for stems in found:
                # "I see a dog and a cat is meowing": a sound phrase is not about the sight before it
                sides = frozenset[Side]() if clause.inherited and clause.sides == {"video"} and stems in self.sounds else clause.sides
                claims.add(sides, self.classes[stems], stems in self.sounds, sounds, clause.unsaid)
        return claims, readable

    def _in(self, clause: str) -> set[Stems]:
        if clause not in self._found:  # the same clause comes again and again, under every cut
            self._found[clause] = self._wordings.found(clause)
        return self._found[clause]

    def names(self, answer: str, modality: Modality) -> set[frozenset[str]]:
        """What an answer to a hear- or see-question names on the side asked about, each event as the set of classes that its wording may mean.

        An answer that says nothing about that side names what the phrase of this question names wherever it stands ("The video shows a dog barking",
        asked what is heard). Asked what is heard, things that nobody says are heard ("A dog sits there. I hear a bell.") count only where nothing
        else is said to be heard, and not where the answer says that there is nothing to hear ("No sound. A dog sits there.").
        """
        key = (answer, modality)
        if key not in self._names:
            claims, _ = self.claims(answer, modality)
            names = set(claims.exact("video"))
            if modality == "hear":
                nothing = not claims.sounds and abstains(answer, "hear")
                names = set() if nothing else set(_exact(claims.surely_heard or claims.said["audio"]))
            if not names:
                own = self._own_wordings[modality]
                found = own.found(own.marked(answer))
                names = {frozenset({name}) for name, phrase in self._own[modality].items() if content_stems(phrase) in found}
            self._names[key] = names
        return self._names[key]


def synonyms_of(clips: Clips) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Class -> (words for what is seen, words for what is heard) beside the label's two phrases: those of the manifest, else those of
    analysis/synonyms.py, and the phrases that clips have of their own.
    """
    own = {name: tuple(dict.fromkeys(side) for side in clips.synonyms().get(name) or _shipped(name, SYNONYMS)) for name in clips.labels()}
    for clip in clips.clips:
        for side, name, phrase in ((0, clip.video_label, clip.seen), (1, clip.audio_label, clip.heard)):
            if name and phrase:
                own[name][side][phrase] = None
    return {
        name: tuple(tuple(word for word in words if word != phrase) for words, phrase in zip(own[name], phrases, strict=True))  # type: ignore[misc]
        for name, phrases in clips.labels().items()
    }


def _shipped(name: str, synonyms: Synonyms) -> Sequence[Sequence[str]]:
    return synonyms.get(name) or synonyms.get(name.replace(" ", "_"), ((), ()))


def require_readable(clips: Clips) -> None:
    """Raises DataError for a phrase, of a label or of a clip, that cannot be read back from the very answer that training teaches about it."""
    reader, manifest = Reader(clips.labels(), synonyms_of(clips)), clips.root / "manifest.json"
    phrases: dict[tuple[str, Modality, str], str] = {}
    for name, (seen, heard) in clips.labels().items():
        phrases |= {(name, "see", seen): f'{manifest}: label "{name}"', (name, "hear", heard): f'{manifest}: label "{name}"'}
    for clip in clips.clips:
        where = f'{clips.root / "clips.jsonl"}: clip "{clip.id}"'
        for name, modality, phrase in ((clip.video_label, "see", clip.seen), (clip.audio_label, "hear", clip.heard)):
            if name:
                phrases.setdefault((name, modality, phrase), where)  # type: ignore[arg-type]
    for (name, modality, phrase), where in phrases.items():
        side, field = ("audio", "heard") if modality == "hear" else ("video", "seen")
        said = taught(modality, phrase, phrase)[0]
        what = f'{where}: the answer that is right about its "{field}" phrase {phrase!r}, {said!r},'
        if not phrase.strip() or abstains(said, modality):
            raise DataError(
                f"{what} says that there is nothing to {modality}. Name an event; clips without one have the condition "
                f'"{"muted" if modality == "hear" else "blanked"}" and no label there.'
            )
        claims, _ = reader.claims(said, modality)
        named_there = claims.exact(side)  # type: ignore[arg-type]
        if not any(name in classes for classes in named_there):
            raise DataError(f"{what} does not name the class {name!r} as answers are read here. Choose words that stand for the event.")
        if others := sorted({other for classes in named_there if name not in classes for other in classes}):
            raise DataError(f"{what} also names the class {others[0]!r} as answers are read here. Choose phrases that keep the two apart.")


# ---------------------------------------------------------------- verdicts


def verdict(answer: str, clip: Clip, modality: Modality, phrases: Reader | Mapping[str, str], video: bool = True, audio: bool = True) -> Verdict:
    """What an answer about a clip follows; `phrases`: a reader, or one phrase a class (`phrases_of`), without synonyms.

    audio: it names the sound's class and not the picture's; vision: the reverse; both; neither: other known classes only; nothing: it names no known
    class and says that there is nothing to hear (on see-questions: to see); unparsed: neither of these.
    `video`, `audio`: which streams the model was given. Where the labels agree a right answer counts as `audio`, as `vision` if there was no sound.
    """
    return follows(answer, clip.video_label if video else "", clip.audio_label if audio else "", modality, phrases)


def follows(answer: str, video_label: str, audio_label: str, modality: Modality, phrases: Reader | Mapping[str, str]) -> Verdict:
    """`verdict` from the two classes alone; "" is a stream that was not given or has nothing in it."""
    reader = phrases if isinstance(phrases, Reader) else Reader({name: (phrase, phrase) for name, phrase in phrases.items()}, {})
    names = reader.names(answer, modality)
    if not names:
        return "nothing" if abstains(answer, modality) else "unparsed"
    heard, seen = (any(label in classes for classes in names) for label in (audio_label, video_label))
    if heard and seen:
        return "both" if audio_label != video_label else "audio"
    return "audio" if heard else "vision" if seen else "neither"


def is_correct(said: Verdict, modality: Modality, video_label: str, audio_label: str) -> bool:
    """Whether a verdict is the right one: what the question designates, and "nothing" where that stream was not given or has nothing in it ("")."""
    if not (audio_label if modality == "hear" else video_label):
        return said == "nothing"
    return said == ("audio" if modality == "hear" or video_label == audio_label else "vision")
