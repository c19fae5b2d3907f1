"""Which answers are one of those accepted, and by which rule; near misses are not."""

from __future__ import annotations

from fractions import Fraction

import pytest

from ptl.rewards.matching import LONGEST, match, normalised, number_in


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  The Eiffel   Tower! ", "eiffel tower"),
        ("L’Oréal", "oreal"),
        ("la tour Eiffel", "tour eiffel"),
        ("Jean-Paul d'Artagnan", "jean paul d artagnan"),
        ("Newton's law", "newtons law"),
        ("don’t", "dont"),
        ("Vitamin A", "vitamin a"),  # an article goes only where a word follows it
        ("The", "the"),
        ("U.S.A.", "usa"),
        ("J.R.R. Tolkien", "jrr tolkien"),
        ("œuvre Ærø Łódź straße", "oeuvre aero lodz strasse"),
        ("ÉCOLE", "ecole"),
        ("E\u0301cole ﬁn", "ecole fin"),  # combining accent, ligature
        ("Ελλάδα", "ελλαδα"),
        ("йод", "йод"),  # not и: another letter
        ("हिन्दी", "हिन्दी"),  # its marks are vowels
        ("東京（日本）", "東京 日本"),
        ("10,000 people", "10000 people"),
        ("10 000", "10000"),
        ("10\u202f000 €", "10000"),
        ("1e4", "10000"),
        ("1.5e-3", "0.0015"),
        ("3.14.", "3.14"),
        ("3,5 km", "3.5 km"),
        ("7 %", "7 %"),
        ("7 percent", "7 %"),
        ("7 pour cent", "7 %"),
        ("-4 degrees", "-4 degrees"),
        ("1914-1918", "1914 1918"),
        ("H2O and B12", "h2o and b12"),
        ("10:30", "10 30"),
        ("x_b/c", "x b c"),
        ("?!", ""),
    ],
)
def test_normalised(text, words):
    assert normalised(text) == words


def test_normalised_twice_is_the_same():
    for text in ("The U.S.A.'s 1,234.50 €", "L'été à 7 %", "-3,5 and 1e4", "Vitamin A", "il n'y a qu'un"):
        assert normalised(normalised(text)) == normalised(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10,000", (10_000, False)),
        ("1e4", (10_000, False)),
        ("10 000.", (10_000, False)),
        ("3,5", (Fraction(7, 2), False)),
        ("7 %", (7, True)),
        ("7 percent", (7, True)),
        ("seven", (7, False)),
        ("Vingt.", (20, False)),
        ("$1,000.50", (Fraction(2001, 2), False)),
        ("3/4", (Fraction(3, 4), False)),
        ("1 2", None),
        ("about 7", None),
        ("", None),
        ("e4", None),
        ("un", None),  # an article as often as a number
        ("9" * 200, None),
    ],
)
def test_number_in(text, number):
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("said", "accepted", "rule"),
    [
        ("paris!", ["Paris"], "exact"),
        ("the Beatles", ["Beatles"], "exact"),
        ("Francois Mitterrand", ["François Mitterrand"], "exact"),
        ("10,000", ["1e4"], "exact"),
        ("Seven.", ["7"], "number"),
        ("7 %", ["7"], "number"),
        ("7 %", ["0.07"], "number"),
        ("3/4", ["0.75"], "number"),
        ("The capital is Paris.", ["Lyon", "Paris"], "contained"),
        ("C'est l'Amérique du Sud", ["Amerique du sud"], "contained"),
        ("There are 10,000 people", ["10000"], "contained"),
        ("There are seven of them", ["7"], "contained"),
        ("There are 7 of them", ["seven"], "contained"),
        ("Not Lyon: Paris", ["Paris"], "contained"),
        ("Yes, it does", ["true"], "contained"),
        ("Non, jamais", ["no"], "contained"),
        ("Vitamin A is good", ["Vitamin A"], "contained"),
        ("東京", ["東京"], "exact"),
        # near misses
        ("Parisian", ["Paris"], None),
        ("It is not Paris", ["Paris"], None),
        ("Ce n'est pas Paris", ["Paris"], None),
        ("It is never the Seine", ["Seine"], None),
        ("in 1984", ["4"], None),
        ("4.5 km", ["4"], None),
        ("-4", ["4"], None),
        ("1,234", ["1.234"], None),
        ("No one is the best", ["one"], "contained"),  # only as a whole accepted answer that is that word
        ("no one", ["1"], None),
        ("Yes, there is no doubt", ["no"], None),
        ("I say yes", ["yes"], None),
        ("A dog", ["A"], None),
        ("Vitamin B", ["Vitamin A"], None),
        ("York New", ["New York"], None),
        ("", ["x"], None),
        ("anything", ["", "?!"], None),
        ("anything", [], None),
    ],
)
def test_match(said, accepted, rule):
    assert match(said, accepted) == rule


def test_what_the_question_says_itself_is_no_answer_inside_a_sentence():
    asked = "What is the capital of Djibouti?"
    assert match("Djibouti is a country in Africa.", ["Djibouti"], asked) is None
    assert match("Djibouti.", ["Djibouti"], asked) == "exact"
    assert match("It is Djibouti City.", ["Djibouti", "Djibouti City"], asked) == "contained"
    assert match("There are 4.", ["4"], "How many of the 4 are there?") is None
    assert match("4", ["four"], "How many of the 4 are there?") == "number"
    assert match("Yes, it is.", ["yes"], "Is it, yes or no?") == "contained"
    assert match("It is the bissau.", ["Bissau"], "What is the capital of Guineabissau?") == "contained"


def test_a_very_long_answer_is_read_up_to_a_length():
    assert match("word " * 3000 + "Paris", ["Paris"]) == "contained"
    assert match("word " * LONGEST + "Paris", ["Paris"]) is None
