"""Questions and answers."""

import pytest

from data.questions import MODALITIES, QUESTIONS, answer, question


def test_answers() -> None:
    assert answer("see", "a dog", "a cat meowing") == ("I see a dog.", "a dog")
    assert answer("hear", "a dog", "a cat meowing") == ("I hear a cat meowing.", "a cat meowing")
    assert answer("both", "a dog", "a cat meowing") == ("I see a dog and I hear a cat meowing.", "a dog and I hear a cat meowing")


def test_answers_about_a_stream_with_nothing() -> None:
    assert answer("hear", "a dog", "") == ("I hear nothing.", "nothing")
    assert answer("see", "", "a dog barking") == ("I see nothing.", "nothing")
    assert answer("both", "a dog", "") == ("I see a dog and I hear nothing.", "a dog and I hear nothing")
    assert answer("both", "", "a dog barking") == ("I see nothing and I hear a dog barking.", "nothing and I hear a dog barking")
    assert answer("see", "a dog", "") == ("I see a dog.", "a dog")


@pytest.mark.parametrize("modality", MODALITIES)
def test_wordings(modality: str) -> None:
    wordings = QUESTIONS[modality]  # type: ignore[index]
    assert question(modality) == wordings[0]  # type: ignore[arg-type]
    assert {question(modality, seed) for seed in range(200)} == set(wordings)  # type: ignore[arg-type]
    assert question(modality, 5) == question(modality, 5)  # type: ignore[arg-type]


def test_no_wording_designates_two_modalities() -> None:
    every = [w for wordings in QUESTIONS.values() for w in wordings]
    assert len(set(every)) == len(every) and all(len(wordings) >= 4 for wordings in QUESTIONS.values())
