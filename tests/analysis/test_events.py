"""What answers name, and verdicts, on hand-written cases and on the embedded label set."""

import json
from pathlib import Path

import pytest

from analysis.events import VERDICTS, abstains, event_words, follows, is_correct, named, phrases_of, stem, verdict
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
        ("I hear nothing of a dog barking", HEAR, set()),
        ("nothing like a dog barking", HEAR, set()),
        ("nothing but a dog barking", HEAR, {"dog"}),
        ("I hear nothing except a dog barking", HEAR, {"dog"}),
        ("nothing other than a dog barking", HEAR, {"dog"}),
        ("no sound apart from a dog barking", HEAR, {"dog"}),
        ("never a dog barking", HEAR, set()),
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
        ("I hear nothing.", "nothing"),
        ("I see nothing.", "unparsed"),
    ],
)
def test_verdict_on_a_conflict(answer, expected):
    clip = make("dog", "cat")
    assert verdict(answer, clip, "hear", HEAR) == expected
    assert is_correct(expected, "hear", "dog", "cat") == (expected == "audio")


def test_see_questions_are_right_when_they_follow_vision():
    clip = make("dog", "cat")
    assert verdict("I see a dog.", clip, "see", SEE) == "vision" and is_correct("vision", "see", "dog", "cat")
    assert verdict("I see a cat.", clip, "see", SEE) == "audio" and not is_correct("audio", "see", "dog", "cat")


def test_factual_clips_count_a_right_answer_as_audio():
    clip = make("dog", "dog")
    assert verdict("I hear a dog barking.", clip, "hear", HEAR) == "audio" and is_correct("audio", "hear", "dog", "dog")
    assert verdict("I see a dog.", clip, "see", SEE) == "audio" and is_correct("audio", "see", "dog", "dog")
    assert verdict("I see a cat.", clip, "see", SEE) == "neither" and not is_correct("neither", "see", "dog", "dog")


def test_a_stream_that_was_not_given_is_not_followed():
    clip = make("dog", "dog")
    assert verdict("I hear a dog barking.", clip, "hear", HEAR, video=False) == "audio"
    assert verdict("I hear a dog barking.", clip, "hear", HEAR, audio=False) == "vision"
    assert verdict("I see a cat.", make("dog", "cat"), "see", SEE, audio=False) == "neither"


def test_event_words():
    assert event_words("waves breaking on a shore") == ["waves", "breaking", "shore"]
    assert event_words("a rider on a galloping horse") == ["rider", "galloping", "horse"]


@pytest.mark.parametrize(
    "answer", ["I cannot hear a dog barking.", "The dog is not barking.", "I cant hear a dog barking", "A dog that never barks."]
)
def test_what_is_denied_anywhere_before_its_last_word_is_not_named(answer):
    assert named(answer, HEAR) == set()


NOTHING_HEARD = [
    "I hear nothing.", "Nothing.", "nothing", "None", "I don't hear anything.", "I can't hear anything in this video", "I cannot hear any sound.",
    "I can not hear anything.", "I can’t hear anything.", "There is no sound.", "There is no sound in the video, I see a dog.", "No audio.",
    "There is no audible sound at all.", "No sound from the video.", "There isn't any noise.", "It is silent.", "The clip is completely silent.",
    "Silence.", "I hear only silence.", "I hear nothing but silence.", "The video is muted.", "It is quiet.", "Not a sound.",
    "I am unable to hear anything.", "I do not hear a sound.", "The audio track is empty.", "The sound is inaudible.", "Nothing can be heard.",
    "Nothing is audible here.", "I see a horse, but I hear nothing.", "I see a horse. There is no sound.", "I hear nothing but I see a horse.",
    "I can neither see nor hear anything.", "I can't see or hear anything.", "I see nothing and hear nothing.", "What I hear: nothing.",
    "There is no sound of any kind.", "I cannot hear.", "There doesn't seem to be any sound.", "The video shows a horse without any sound.",
]  # fmt: skip
NOT_NOTHING_HEARD = [
    "", "...", "I hear music.", "I see nothing.", "I see nothing, I hear music.", "There is nothing in the picture.", "I hear nothing but music.",
    "I hear nothing except the wind.", "I hear nothing else.", "I hear music and nothing else.", "There is no other sound.",
    "I hear nothing unusual.", "I don't hear a horse.", "I do not hear any music.", "There is no sound of a horse.", "It is not silent.",
    "Silence, then music.", "It is silent until music plays.", "The dog is silent. I hear music.", "I hear a quiet hum.", "The picture is black.",
    "I don't know.", "A muted trumpet.", "It sounds like rain on a roof, no picture.", "I hear nothing like a horse.",
]  # fmt: skip
NOTHING_SEEN = [
    "I see nothing.", "Nothing.", "I can't see anything.", "I don't see anything, but I hear music.", "There is no picture.", "A black screen.",
    "The video is black.", "The screen is completely dark.", "The frame is all black", "I see a blank image.", "I see only darkness.",
    "Nothing is visible.", "There is nothing to see.", "It is dark.", "There is no visible image.", "I cannot see or hear anything.",
    "The picture is missing.", "I am not able to see any objects.", "I hear music and see nothing.",
]  # fmt: skip
NOT_NOTHING_SEEN = [
    "", "I see a house.", "I hear nothing.", "There is no sound.", "It is silent.", "A black screen with white text.", "I see a black box.",
    "I see nothing but sand.", "I see nothing else.", "I do not see a house.", "The screen is not black.", "I see a dark image of a house.",
    "It is black at first.", "Silence.", "I see a house. I hear nothing.", "I see a man in a dark coat.", "The picture shows a house, no sound.",
    "The car is black.", "A man in black.", "Someone is walking in the dark.",
]  # fmt: skip


@pytest.mark.parametrize(
    ("modality", "answer", "expected"),
    [("hear", answer, True) for answer in NOTHING_HEARD]
    + [("hear", answer, False) for answer in NOT_NOTHING_HEARD]
    + [("see", answer, True) for answer in NOTHING_SEEN]
    + [("see", answer, False) for answer in NOT_NOTHING_SEEN],
)
def test_that_there_is_nothing(modality, answer, expected):
    assert abstains(answer, modality) is expected


def test_an_answer_that_names_a_known_event_is_not_nothing():
    assert follows("I hear nothing, or a dog barking.", "dog", "", "hear", HEAR) == "vision"
    assert follows("I hear nothing.", "dog", "", "hear", HEAR) == "nothing"
    assert follows("I hear nothing, I see a dog.", "dog", "", "hear", HEAR) == "nothing"  # "a dog" is no sound
    assert follows("I see nothing, I hear a dog barking.", "", "dog", "see", SEE) == "audio"  # but what barks is seen
    assert follows("I hear nothing.", "dog", "", "see", SEE) == "unparsed"


def test_no_label_is_nothing_and_nothing_is_no_label():
    for name, (seen, heard) in LABELS.items():
        assert follows(f"I hear {heard}.", name, name, "hear", HEAR) == follows(f"I see {seen}.", name, name, "see", SEE) == "audio"
        assert not abstains(f"I hear {heard}.", "hear") and not abstains(f"I see {seen}.", "see")


@pytest.mark.parametrize(
    ("modality", "video", "audio", "right"),
    [
        ("hear", "dog", "", "nothing"),  # muted, or only the picture given
        ("see", "dog", "", "vision"),
        ("see", "", "dog", "nothing"),  # blanked, or only the sound given
        ("hear", "", "dog", "audio"),
        ("hear", "dog", "cat", "audio"),
        ("see", "dog", "cat", "vision"),
        ("hear", "dog", "dog", "audio"),
        ("see", "dog", "dog", "audio"),
    ],
)
def test_the_right_verdict(modality, video, audio, right):
    assert [v for v in VERDICTS if is_correct(v, modality, video, audio)] == [right]
