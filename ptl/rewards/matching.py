"""Whether a free answer says one of the accepted answers: the same words, the same number, or the words inside it.

Words are compared as SQuAD does it, for English and French: case, punctuation, white space, accents of Latin and Greek
letters and articles do not matter. Unlike there an article goes only where a word follows it ("Vitamin A" is not
"vitamin"), apostrophes and hyphens part words as each language does, and numbers keep their points and signs.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from ptl.rewards.maths import equal, number_of

Rule = Literal["exact", "number", "contained"]

LONGEST = 20_000
"""Characters of an answer that are looked at."""
ARTICLES = frozenset({"a", "an", "the", "le", "la", "les", "l", "un", "une", "des", "du"})
_ELISIONS = frozenset({"l", "d", "j", "m", "t", "s", "c", "n", "qu", "jusqu", "lorsqu", "puisqu", "quoiqu"})
_NEGATIONS = frozenset({"not", "never", "isnt", "wasnt", "arent", "werent", "neither", "nor", "than", "unlike"})
_NEGATIONS |= {"except", "pas", "ni", "jamais", "sauf"}
"""Words that turn the answer after them into what is not meant."""
_YES, _NO = frozenset({"yes", "true", "oui", "vrai"}), frozenset({"no", "false", "non", "faux"})
_WORDS = (
    ("zero", "zéro"), ("one",), ("two", "deux"), ("three", "trois"), ("four", "quatre"), ("five", "cinq"), ("six",),
    ("seven", "sept"), ("eight", "huit"), ("nine", "neuf"), ("ten", "dix"), ("eleven", "onze"), ("twelve", "douze"),
    ("thirteen", "treize"), ("fourteen", "quatorze"), ("fifteen", "quinze"), ("sixteen", "seize"), ("seventeen",),
    ("eighteen",), ("nineteen",), ("twenty", "vingt"),
)  # fmt: skip
_SPELLED = {word: number for number, words in enumerate(_WORDS) for word in words}
_SAME_NUMBER = {
    word: {str(number), *words} for number, words in enumerate(_WORDS) if number != 1 for word in (str(number), *words)
}
"""Ways to write a small number; one is left out, for "one of" and "no one" are no numbers."""
_INITIALS = re.compile(r"\b(?:[^\W\d_]\.){2,}")
_LETTERS = str.maketrans({"œ": "oe", "æ": "ae", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"})
_SPACES = "[ \u00a0\u2009\u202f]"
_NUMBER = re.compile(
    rf"(?<![\w.,])[-+]?(?:\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|\d{{1,3}}(?:{_SPACES}\d{{3}})+(?:[.,]\d+)?|\d+(?:[.,]\d+)?|\.\d+)"
    r"(?:e[-+]?\d{1,3})?(?![\w]|[.,]\d)",
    re.ASCII,
)
_PERCENT = re.compile(r"(?<=\d)\s*(?:%|per ?cent\b|pour ?cent\b)")


def match(said: str, accepted: Sequence[str], question: str = "") -> Rule | None:
    """The first rule by which an answer is one of those accepted, or None.

    ``exact``: the same words. ``number``: the same number written otherwise (10,000 and 1e4; "seven" and 7; 7 % and 7,
    as ``ptl.rewards.maths.equal`` has it). ``contained``: all words of an accepted answer stand in the answer side by
    side, and no negation directly before them; a yes or a no only as its first word, a single letter never, and nothing
    that the question says itself: who answers "Djibouti is a country" was asked for its capital of the same name.

    Args:
        said: what was answered.
        accepted: answers that are right; blank ones match nothing.
        question: what was asked.
    """
    said = said[:LONGEST]
    told = normalised(said)
    wanted = [(answer, text) for answer in accepted if (text := normalised(answer))]
    if any(told == text for _, text in wanted):
        return "exact"
    number = number_in(said)
    if number is not None and any(
        (other := number_in(answer)) is not None and equal(number, other) for answer, _ in wanted
    ):
        return "number"
    plain, asked = normalised(said, articles=True), normalised(question)
    for answer, text in wanted:
        if text not in _YES | _NO and f" {text} " in f" {asked} ":
            continue
        if _contains(told, text) or _contains(plain, normalised(answer, articles=True)):
            return "contained"
    return None


def normalised(text: str, *, articles: bool = False) -> str:
    """The words of a text, folded, with one space between them.

    Args:
        text: any.
        articles: keep English and French articles.
    """
    text = _numbers_written_out(_INITIALS.sub(lambda found: found[0].replace(".", "") + " ", _folded(text)))
    words = text.split()
    if not articles:
        words = [word for i, word in enumerate(words) if word not in ARTICLES or i + 1 == len(words)]
    return " ".join(words)


def number_in(text: str) -> tuple[Fraction, bool] | None:
    """The number that all of a text is, and whether it is a percentage; None for all else.

    Beside what ``ptl.rewards.maths.number_of`` reads: exponents, thousands parted by spaces, a decimal comma with other
    than three digits behind it, and the words zero to twenty in English and French.
    """
    bare = text.strip().strip(".!").strip().casefold()
    if bare in _SPELLED:
        return Fraction(_SPELLED[bare]), False
    if len(bare) > 100:
        return None
    bare = _PERCENT.sub("%", _signs(bare))
    return number_of(_NUMBER.sub(lambda found: _plain_number(found[0]), bare))


def _contains(text: str, part: str) -> bool:
    """Whether words stand in a text side by side, not negated; both are normalised."""
    words = text.split()
    for meant in (_YES, _NO):
        if part in meant:
            return words[:1] != [] and words[0] in meant
    if len(part) == 1 and not part.isdigit() and part.isascii():
        return False
    ways = [[way] for way in _SAME_NUMBER.get(part, ())] or [part.split()]
    size = len(ways[0])
    for at in range(len(words) - size + 1):
        if words[at : at + size] in ways:
            before = next((word for word in reversed(words[:at]) if word not in ARTICLES), "")
            if before not in _NEGATIONS:
                return True
    return False


def _folded(text: str) -> str:
    """Small letters without accents, and spaces for what is no part of a word or a number."""
    text = _signs(unicodedata.normalize("NFKC", text).casefold()).translate(_LETTERS)
    letters: list[str] = []
    base = ""
    for char in unicodedata.normalize("NFD", text):
        if not unicodedata.combining(char):
            base = unicodedata.name(char, "")
        elif base.startswith(("LATIN", "GREEK")):
            continue  # marks of other scripts are letters or vowels, without which words are others
        letters.append(char)
    return unicodedata.normalize("NFC", "".join(letters))


def _signs(text: str) -> str:
    for sign in "’ʼ‘`´":
        text = text.replace(sign, "'")
    return text.replace("−", "-")


def _numbers_written_out(text: str) -> str:
    """Numbers in one form, an apostrophe after an elided French word as a space and others gone, no other signs."""
    out: list[str] = []
    at = 0
    for found in _NUMBER.finditer(text):
        number = found[0]
        if number[0] in "+-" and (number[0] == "+" or not _stands_alone(text, found.start())):
            number = number[1:]
        out += [_without_signs(text[at : found.start()]), f" {_plain_number(number)} "]
        at = found.end()
        if percent := _PERCENT.match(text, at):
            out.append(" % ")
            at = percent.end()
    return "".join([*out, _without_signs(text[at:])])


def _stands_alone(text: str, at: int) -> bool:
    return at == 0 or text[at - 1].isspace() or text[at - 1] in "(=$€£"


def _without_signs(text: str) -> str:
    parted = re.sub(r"(\w+)'", lambda found: found[1] + (" " if found[1] in _ELISIONS else ""), text.replace("_", " "))
    return "".join(
        char if char.isalnum() or unicodedata.category(char)[0] == "M" else "" if char == "'" else " "
        for char in parted
    )


def _plain_number(text: str) -> str:
    """A number that ``_NUMBER`` found, as digits with a point where it is no integer."""
    digits, _, power = text.partition("e")
    digits = re.sub(_SPACES, "", digits)
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits):
        digits = digits.replace(",", "")
    value = Fraction(digits.replace(",", ".")) * Fraction(10) ** int(power or 0)
    if value.denominator == 1:
        return str(value.numerator)
    whole = f"{float(value):.12f}".rstrip("0").rstrip(".")
    return whole if float(value) and whole not in ("0", "-0") else str(value)
