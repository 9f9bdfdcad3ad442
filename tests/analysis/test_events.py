"""What answers name, and verdicts, on hand-written cases and on the embedded label set."""

import json
from pathlib import Path

import pytest

from analysis.events import event_words, is_correct, named, phrases_of, stem, verdict
from data.clips import Clip

REAL = json.loads((Path(__file__).parents[2] / "data" / "real_av" / "manifest.json").read_text())
LABELS = {c["name"]: (c["seen"], c["heard"]) for c in REAL["classes"]}
HEAR, SEE = phrases_of(LABELS, "hear"), phrases_of(LABELS, "see")


def make(video: str, audio: str) -> Clip:
    return Clip(
        "c",
        "c.mp4",
        "test",
        "factual" if video == audio else "counterfactual",
        video,
        audio,
        LABELS[video][0],
        LABELS[audio][1],
        "p",
        "s",
        "v",
        "a",
        "1",
        "2",
        2.0,
    )


@pytest.mark.parametrize("name", LABELS)
def test_every_label_names_itself_and_nothing_else(name):
    seen, heard = LABELS[name]
    for template in ("{}", "I hear {}.", "There is {} in the clip", "It sounds like {}!", "Probably {}, as far as I can tell."):
        assert named(template.format(heard), HEAR) == {name}
        assert named(template.format(seen), SEE) == {name}
        assert named(template.format(seen).upper(), SEE) == {name}


FORMS = [
    "bark barks barking barked", "pop pops popping popped", "take takes taking", "wave waves", "horse horses", "bus buses", "cry cries crying cried",
    "puff puffs puffing puffed", "break breaks breaking broke", "hoof hooves", "screech screeches screeching",
]  # fmt: skip


@pytest.mark.parametrize("words", FORMS)
def test_stems_agree(words):
    assert len({stem(w) for w in words.split()}) == 1


def test_stems_keep_short_words_apart():
    assert len({stem(w) for w in ("ring", "bring", "bee", "bed", "red", "bus", "sheep", "sing", "spring")}) == 9


@pytest.mark.parametrize(
    ("answer", "phrases", "expected"),
    [
        ("a rider on a galloping horse", SEE, {"galloping horse"}),
        ("a fire truck", SEE, {"fire truck"}),
        ("a fire truck and a truck", SEE, {"fire truck", "truck"}),
        ("a wind chime", SEE, {"wind chime"}),
        ("I hear dogs barking and a jet that takes off.", HEAR, {"dog", "jet plane"}),
        ("the barking of a dog", HEAR, {"dog"}),
        ("A dog is loudly barking", HEAR, {"dog"}),
        ("a dog, a cat meowing", HEAR, {"cat"}),
        ("not a dog barking but a cat meowing", HEAR, {"cat"}),
        ("There isn't a dog barking here", HEAR, set()),
        ("a bell ringing, a telephone ringing", HEAR, {"bell", "telephone"}),
        ("a bell ringing a telephone ringing", HEAR, {"bell", "telephone"}),
        ("a dog meowing", HEAR, set()),
        ("nothing", HEAR, set()),
        ("", HEAR, set()),
        ("footstep", HEAR, {"footsteps"}),
    ],
)
def test_named(answer, phrases, expected):
    assert named(answer, phrases) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I hear a cat meowing.", "audio"),
        ("I hear a dog barking.", "vision"),
        ("I hear a cat meowing and a dog barking.", "both"),
        ("I hear a train passing.", "neither"),
        ("I hear a cat meowing and a train passing.", "audio"),
        ("I hear music.", "unparsed"),
    ],
)
def test_verdict_on_a_conflict(answer, expected):
    clip = make("dog", "cat")
    assert verdict(answer, clip, HEAR) == expected
    assert is_correct(expected, "hear", agree=False) == (expected == "audio")


def test_see_questions_are_right_when_they_follow_vision():
    clip = make("dog", "cat")
    assert verdict("I see a dog.", clip, SEE) == "vision" and is_correct("vision", "see", agree=False)
    assert verdict("I see a cat.", clip, SEE) == "audio" and not is_correct("audio", "see", agree=False)


def test_factual_clips_count_a_right_answer_as_audio():
    clip = make("dog", "dog")
    assert verdict("I hear a dog barking.", clip, HEAR) == "audio" and is_correct("audio", "hear", agree=True)
    assert verdict("I see a dog.", clip, SEE) == "audio" and is_correct("audio", "see", agree=True)
    assert verdict("I see a cat.", clip, SEE) == "neither" and not is_correct("neither", "see", agree=True)


def test_a_stream_that_was_not_given_is_not_followed():
    clip = make("dog", "dog")
    assert verdict("I hear a dog barking.", clip, HEAR, video=False) == "audio"
    assert verdict("I hear a dog barking.", clip, HEAR, audio=False) == "vision"
    assert verdict("I see a cat.", make("dog", "cat"), SEE, audio=False) == "neither"


def test_event_words():
    assert event_words("waves breaking on a shore") == ["waves", "breaking", "shore"]
    assert event_words("a rider on a galloping horse") == ["rider", "galloping", "horse"]


@pytest.mark.parametrize(
    "answer", ["I cannot hear a dog barking.", "The dog is not barking.", "I cant hear a dog barking", "A dog that never barks."]
)
def test_what_is_denied_anywhere_before_its_last_word_is_not_named(answer):
    assert named(answer, HEAR) == set()
