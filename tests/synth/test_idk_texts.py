"""The words of refusals: in the question's language, varied, and the same for the same question."""

from __future__ import annotations

from collections import Counter

import pytest

from ptl.synth.idk_texts import HEDGES, REFUSALS, hedge, language_of, place_of, question_key, refusal

QUESTIONS = [f"Who wrote the book number {i}?" for i in range(2000)]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Who wrote The Stranger?", "en"),
        ("who sings it's all about the bass lyrics", "en"),
        ("What is the capital of Côte d'Ivoire?", "en"),
        ("2 + 2 = ?", "en"),
        ("Qui a écrit L'Étranger ?", "fr"),
        ("Quelle est la capitale de la France ?", "fr"),
        ("Combien font 2 et 2 ?", "fr"),
        ("C’est où, Paris ?", "fr"),
        ("", "en"),
    ],
)
def test_language_of(text, language):
    assert language_of(text) == language


def test_a_question_gets_the_same_words_however_it_is_written():
    one, other = question_key(["Who wrote the Iliad?"]), question_key(["who wrote Iliad"])
    assert one == other and refusal(one, "en") == refusal(other, "en")
    assert question_key(["a b", "c"]) != question_key(["a", "b c"])
    assert question_key(["?!"]) != question_key(["..."])


@pytest.mark.parametrize("language", ["en", "fr"])
def test_refusals_are_varied_and_evenly_so(language):
    counts = Counter(refusal(question_key([text]), language) for text in QUESTIONS)
    assert set(counts) == set(REFUSALS[language]) and len(counts) >= 8
    assert min(counts.values()) > 0.6 * len(QUESTIONS) / len(counts)


def test_a_hedge_holds_the_answer():
    for language, texts in HEDGES.items():
        said = {hedge(question_key([text]), language, "It is {Paris}.") for text in QUESTIONS[:50]}
        assert len(said) == len(texts) and all(text.endswith("It is {Paris}.") for text in said)


def test_places_are_spread_evenly_and_apart_by_purpose():
    places = [place_of(text, "held out") for text in QUESTIONS]
    assert all(0 <= place < 1 for place in places)
    assert all(abs(sum(place < bound for place in places) / len(places) - bound) < 0.04 for bound in (0.1, 0.5, 0.8))
    both = sum(place < 0.5 and place_of(text, "words") < 0.5 for place, text in zip(places, QUESTIONS))
    assert abs(both / len(places) - 0.25) < 0.04
