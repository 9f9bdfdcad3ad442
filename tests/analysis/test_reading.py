"""Answers in other words than the labels', labels as data sets have them, and phrases of clips of their own."""

import json

import pytest

from analysis.events import Reader, follows, named, require_readable, synonyms_of
from analysis.findings import Caption, Findings
from analysis.judges import LabelsJudge
from data.clips import Clip, Clips, DataError, load_clips, save_clips
from data.questions import answer

# As AudioSet and VGGSound have them.
CLASSES = [
    "Male speech, man speaking", "Female speech, woman speaking", "Child speech, kid speaking", "Speech synthesizer", "Whispering", "Laughter",
    "Baby laughter", "Belly laugh", "Chuckle, chortle", "Crying, sobbing", "Baby cry, infant cry", "Whimper (dog)", "Wail, moan", "Choir", "Rapping",
    "Breathing", "Snoring", "Throat clearing", "Walk, footsteps", "Chewing, mastication", "Burping, eructation", "Hands", "Clapping",
    "Heart sounds, heartbeat", "Heart murmur", "Hubbub, speech noise, speech babble", "Children playing", "Domestic animals, pets", "Dog", "Bow-wow",
    "Growling", "Caterwaul", "Livestock, farm animals, working animals", "Clip-clop", "Neigh, whinny", "Cattle, bovinae", "Chicken, rooster",
    "Cluck", "Crowing, cock-a-doodle-doo", "Pigeon, dove", "Coo", "Bee, wasp, etc.", "Fly, housefly", "Whale vocalization", "Music",
    "Plucked string instrument", "Rock and roll", "Rhythm and blues", "Drum and bass", "Singing bowl", "Vehicle horn, car horn, honking", "Toot",
    "Air horn, truck horn", "Reversing beeps", "Emergency vehicle", "Police car (siren)", "Ambulance (siren)", "Fire engine, fire truck (siren)",
    "Light engine (high frequency)", "Dental drill, dentist's drill", "Doorbell", "Ding-dong", "Tick-tock", "Cutlery, silverware", "Toilet flush",
    "Cap gun", "Fusillade", "Boom", "Splash, splatter", "Slosh", "Sine wave", "Inside, small room", "Outside, urban or manmade", "Static",
    "Sound effect", "Noise", "White noise", "No sound of engines", "people watching a film", "What is this", "Off", "mice/rats squeaking", "R&B",
    "don't walk signal beeping", "skidding & tyre screech", "sailing, no engine", "never-ending alarm", "tap-dancing (indoors) - hard shoes",
]  # fmt: skip


def test_every_class_name_is_read_back_from_the_answer_that_training_teaches():
    phrases = {name: name for name in CLASSES}
    judge = LabelsJudge({name: (name, name) for name in CLASSES})
    for name in CLASSES:
        assert named(answer("hear", name, name)[0], phrases) == {name}
    for name in CLASSES:
        for modality in ("see", "hear", "both"):
            for style in range(3):
                said = answer(modality, name, name, style)[0]
                caption = Caption("c", "", "", modality, "", None, said, name, name, "", "", [])
                got = judge.read(caption)
                assert got is not None and (got.invented_audio, got.invented_video) == (0, 0), said
                assert (got.audio, got.video) == (float(modality != "see"), float(modality != "hear")), said
                if modality != "both":
                    assert follows(said, name, name, modality, judge.reader) == "audio", said


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("I hear thunder. And then rain.", {"both"}),
        ("I hear thunder and a dog.", {"thunder"}),
        ("There is no thunder and rain.", set()),
        ("I hear rain.", {"rain"}),
        ("THUNDER, and the rain!", {"both"}),
        ("I hear no sound of engines.", {"quiet"}),
        ("I don't hear no sound of engines.", set()),
    ],
)
def test_torn_phrases_are_found_whole_longest_first_and_denied_as_one(said, expected):
    assert named(said, {"both": "thunder and rain", "thunder": "thunder", "rain": "rain", "quiet": "no sound of engines"}) == expected


def test_scripts_without_spaces():
    phrases = {"dog": "狗叫声", "bell": "钟声", "rain": "下雨的声音", "thai": "เสียงสุนัขเห่า", "cat": "猫の鳴き声", "ring": "개 짖는 소리"}
    said = {
        "我听到狗叫声。": "dog",
        "这是下雨的声音": "rain",
        "ฉันได้ยินเสียงสุนัขเห่า": "thai",
        "猫の鳴き声が聞こえます。": "cat",
        "개 짖는 소리가 들린다.": "ring",
    }
    assert {text: named(text, phrases) for text in said} == {text: {name} for text, name in said.items()}
    assert named("我听到钟声，然后是狗叫声。", phrases) == {"bell", "dog"}


# ---------------------------------------------------------------- synonyms in verdicts

LABELS = {
    "dog": ("a dog", "a dog barking"), "bell": ("a bell", "a bell ringing"), "jet_plane": ("a jet plane", "a jet taking off"),
    "propeller_plane": ("a propeller plane", "a propeller plane engine"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "modality", "expected"),
    [
        ("I hear barking.", "hear", "audio"),
        ("Woof!", "hear", "audio"),
        ("I hear a dog.", "hear", "audio"),
        ("A church bell.", "hear", "vision"),
        ("The picture shows a bell on a table. I hear a puppy bark.", "hear", "audio"),
        ("A bell hangs from a wall. I can hear a dog.", "hear", "audio"),  # what nobody says is heard stands back
        ("A bell hangs from a wall. A dog is barking loudly.", "hear", "audio"),
        ("There is no sound. A bell hangs from a wall.", "hear", "nothing"),
        ("I see a bell, and I hear a dog barking.", "see", "vision"),
        ("A church bell.", "see", "vision"),
        ("A puppy.", "see", "audio"),
        ("I hear a tram.", "hear", "unparsed"),
    ],
)
def test_verdicts_know_synonyms_and_which_side_is_spoken_of(said, modality, expected):
    assert follows(said, "bell", "dog", modality, Reader(LABELS)) == expected  # picture of a bell, sound of a dog


def test_a_word_for_several_classes_is_right_for_each_and_names_no_other():
    reader = Reader(LABELS)
    assert (
        follows("I see an airplane.", "jet_plane", "dog", "see", reader)
        == "vision"
        == follows("I see a plane.", "propeller_plane", "dog", "see", reader)
    )
    assert follows("I see an airplane.", "bell", "dog", "see", reader) == "neither"
    assert follows("I see a jet plane, an airplane.", "propeller_plane", "dog", "see", reader) == "neither"  # it says which


def clip(i, label, seen, heard):
    return Clip(f"c{i}", f"media/{i}.mp4", "test", "factual", label, label, seen, heard, "p", "s", f"{i}", f"{i}", f"v{i}", f"a{i}", 1.0)


def folder_of(root, rows, manifest):
    (root / "media").mkdir(parents=True)
    for row in rows:
        (root / row.file).write_bytes(b"x")
    save_clips(root, rows, [], manifest)
    return load_clips(root)


MANIFEST = {"labels": [["dog", "a dog", "a dog barking"], ["tram", "a tram", "a tram passing"]]}


def test_synonyms_of_ones_own_come_from_the_manifest_and_replace_ours(tmp_path):
    rows = [clip(0, "dog", "a dog", "a dog barking"), clip(1, "tram", "a tram", "a tram passing")]
    clips = folder_of(tmp_path / "a", rows, {**MANIFEST, "synonyms": {"tram": [["a streetcar"], ["a streetcar bell"]], "dog": [[], ["yapping"]]}})
    reader = Reader(clips.labels(), synonyms_of(clips))
    assert clips.synonyms() == {"tram": (("a streetcar",), ("a streetcar bell",)), "dog": ((), ("yapping",))}
    assert follows("I see a streetcar.", "tram", "dog", "see", reader) == "vision"
    assert follows("I hear yapping.", "tram", "dog", "hear", reader) == "audio"
    assert follows("I hear a puppy.", "tram", "dog", "hear", reader) == "unparsed"  # its own list replaces ours


@pytest.mark.parametrize(
    ("synonyms", "says"),
    [
        ([], r'"synonyms" has to be an object'),
        ({"cat": [[], []]}, r'"cat", which is not among "labels"'),
        ({"dog": ["a puppy"]}, r'synonyms of "dog" have to be two lists'),
        ({"dog": [["a puppy"], "woof"]}, r'synonyms of "dog" have to be two lists'),
        ({"dog": [[""], []]}, r'synonyms of "dog" have to be two lists'),
        ({"dog": [[1], []]}, r'synonyms of "dog" have to be two lists'),
    ],
)
def test_synonyms_of_another_form_are_refused(tmp_path, synonyms, says):
    rows = [clip(0, "dog", "a dog", "a dog barking")]
    with pytest.raises(DataError, match=f"manifest.json.*{says}"):
        folder_of(tmp_path / "a", rows, {**MANIFEST, "synonyms": synonyms})
    root = folder_of(tmp_path / "b", rows, MANIFEST).root
    raw = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**raw, "synonyms": synonyms}))
    with pytest.raises(DataError, match=f"manifest.json.*{says}"):
        load_clips(root)


# ---------------------------------------------------------------- a clip's own phrase


def test_a_perfect_answer_in_the_clips_own_phrase_is_right_for_every_reader(tmp_path):
    """Dogs under three phrases: a hound that bays shares no word with the label's phrases."""
    rows = [
        clip(0, "dog", "a hound", "baying in the distance"),
        clip(1, "dog", "a dog", "a dog barking"),
        clip(2, "tram", "a tram", "a tram passing"),
    ]
    clips = folder_of(tmp_path / "a", rows, MANIFEST)
    require_readable(clips)
    reader = Reader(clips.labels(), synonyms_of(clips))
    assert follows("I hear baying in the distance.", "tram", "dog", "hear", reader) == "audio"
    said = "I see a hound and I hear baying in the distance."
    own = Caption("c0", "", "factual", "both", "", None, said, "a hound", "baying in the distance", "p", "s", [], False, "dog", "dog")
    other = Caption("c2", "", "factual", "both", "", None, said, "a tram", "a tram passing", "p", "s", [], False, "tram", "tram")
    got = [(s.audio, s.video, s.invented) for s in LabelsJudge(clips.labels(), synonyms_of(clips)).judge([own, other])]
    assert got == [(1.0, 1.0, 0), (0.0, 0.0, 2)]


# ---------------------------------------------------------------- what cannot be read back


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([["x", "a dog", "silence"]], r"""label "x".*'silence'.*says that there is nothing to hear.*muted"""),
        ([["x", "nothing", "a dog barking"]], r"""label "x".*'nothing'.*says that there is nothing to see.*blanked"""),
        ([["x", "a dog", "…"]], r"""label "x".*'…'.*does not name the class 'x'"""),
        ([["x", "a dog", "hear"], ["y", "a cat", "a hoot"]], r"""label "y".*'a hoot'.*also names the class 'x'"""),  # "I hear …" always says it
    ],
)
def test_phrases_that_cannot_be_read_back_are_refused(tmp_path, labels, says):
    clips = Clips(tmp_path, (), (), {"version": 1, "labels": labels})
    with pytest.raises(DataError, match=says):
        require_readable(clips)


def test_a_clips_phrase_that_cannot_be_read_back_is_refused_by_the_clips_name(tmp_path):
    clips = Clips(tmp_path, (clip(7, "dog", "a dog", "complete silence"),), (), {"version": 1, **MANIFEST})
    with pytest.raises(DataError, match=r"""clips.jsonl: clip "c7".*'complete silence'.*nothing to hear"""):
        require_readable(clips)


def test_the_class_names_of_data_sets_may_be_used(tmp_path):
    require_readable(Clips(tmp_path, (), (), {"version": 1, "labels": [[name, name, name] for name in CLASSES]}))


def test_findings_keep_the_words_that_answers_were_read_by(tmp_path):
    """`judge` needs neither clips nor manifest."""
    synonyms = {"tram": [["a streetcar"], []]}
    said = Caption("c", "", "factual", "see", "", None, "I see a streetcar.", "a tram", "", "p", "s", [], False, "tram", "")
    made = Findings("m", None, None, "test", "h", 2, {}, labels={"tram": ["a tram", "a tram passing"]}, synonyms=synonyms, captions=[said])
    made.save(tmp_path / "f.json")
    loaded = Findings.load(tmp_path / "f.json")
    (got,) = LabelsJudge(loaded.labels, loaded.synonyms).judge(loaded.captions)
    assert (got.video, got.parsed) == (1.0, True)
