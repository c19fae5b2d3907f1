"""Questions that a tool answers: sums, times, small programs, and what documents say.

Each task is a function of the seed and its number alone, in English or French.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Language = Literal["en", "fr"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question, the call that answers it, and how the answer is put.

    Attributes:
        question: what the user says.
        tool: name of the tool.
        argument: what the tool is given.
        answer: text with ``{}`` where the result belongs; None where the result itself is said.
        accepted: answers that are right, where they are known beforehand; empty where the tool's result is right.
        source: label.
        language: of the question.
    """

    question: str
    tool: str
    argument: str
    answer: str | None
    accepted: tuple[str, ...] = ()
    source: str = ""
    language: Language = "en"


class _Form(NamedTuple):
    """A question, the expression or program, and the answer, with the same fields."""

    question: str
    argument: str
    answer: str


_SUMS: dict[Language, tuple[_Form, ...]] = {
    "en": (
        _Form("What is {a} + {b}?", "{a} + {b}", "{a} + {b} = {{}}."),
        _Form("What is {a} times {b}?", "{a} * {b}", "{a} times {b} is {{}}."),
        _Form("Calculate {a} * {b}.", "{a} * {b}", "{a} * {b} = {{}}."),
        _Form("How much is {c} minus {b}?", "{c} - {b}", "{c} minus {b} is {{}}."),
        _Form("Please compute ({a} + {b}) * {s}.", "({a} + {b}) * {s}", "({a} + {b}) * {s} = {{}}."),
        _Form("What is {s} squared plus {a}?", "{s}**2 + {a}", "{s} squared plus {a} is {{}}."),
        _Form("What is {p}% of {c}?", "{c} * {p} / 100", "{p}% of {c} is {{}}."),
        _Form("Divide {c} by {s}.", "{c} / {s}", "{c} divided by {s} is {{}}."),
        _Form(
            "{n} has {b} boxes with {s} pens in each. How many pens does {n} have?",
            "{b} * {s}",
            "{n} has {{}} pens.",
        ),
        _Form(
            "{n} had {c} stamps and gave away {b}. How many stamps are left?",
            "{c} - {b}",
            "There are {{}} stamps left.",
        ),
        _Form("A ticket costs {s} euros. What do {b} tickets cost?", "{b} * {s}", "{b} tickets cost {{}} euros."),
        _Form(
            "{n} walks {a} metres in the morning and {b} metres in the evening. How far is that in all?",
            "{a} + {b}",
            "{n} walks {{}} metres in all.",
        ),
    ),
    "fr": (
        _Form("Combien font {a} + {b} ?", "{a} + {b}", "{a} + {b} = {{}}."),
        _Form("Combien font {a} fois {b} ?", "{a} * {b}", "{a} fois {b} font {{}}."),
        _Form("Calcule {a} * {b}.", "{a} * {b}", "{a} * {b} = {{}}."),
        _Form("Combien font {c} moins {b} ?", "{c} - {b}", "{c} moins {b} font {{}}."),
        _Form("Calcule ({a} + {b}) * {s}, s'il te plaît.", "({a} + {b}) * {s}", "({a} + {b}) * {s} = {{}}."),
        _Form("Combien font {p} % de {c} ?", "{c} * {p} / 100", "{p} % de {c} font {{}}."),
        _Form("{n} a {b} boîtes de {s} stylos. Combien de stylos {n} a-t-il ?", "{b} * {s}", "{n} a {{}} stylos."),
        _Form("{n} avait {c} timbres et en a donné {b}. Combien en reste-t-il ?", "{c} - {b}", "Il en reste {{}}."),
        _Form(
            "Un billet coûte {s} euros. Combien coûtent {b} billets ?", "{b} * {s}", "{b} billets coûtent {{}} euros."
        ),
    ),
}
_NAMES = ("Anna", "Ben", "Chloé", "David", "Emma", "Farid", "Gina", "Hugo", "Ines", "Jonas", "Lea", "Malik", "Nora")
_WORDS = ("banana", "strawberry", "mississippi", "parallel", "committee", "balloon", "assessment", "bibliothèque")
_WORDS += ("elephant", "mathematics", "programming", "restaurant", "television", "chocolate", "université", "papillon")
_PROGRAMS: dict[Language, tuple[_Form, ...]] = {
    "en": (
        _Form(
            "How many times does the letter {l} occur in the word {w}?",
            '"{w}".count("{l}")',
            'The letter {l} occurs {{}} times in "{w}".',
        ),
        _Form("Write the word {w} backwards.", 'print("{w}"[::-1])', 'Backwards, "{w}" is "{{}}".'),
        _Form("How many letters does the word {w} have?", 'len("{w}")', '"{w}" has {{}} letters.'),
        _Form("Sort the numbers {x}, {y}, {z} and {t}.", "sorted([{x}, {y}, {z}, {t}])", "In order they are {{}}."),
        _Form(
            "What is the sum of all whole numbers from {x} to {c}?",
            "sum(range({x}, {c} + 1))",
            "The sum of the numbers from {x} to {c} is {{}}.",
        ),
    ),
    "fr": (
        _Form(
            "Combien de fois la lettre {l} apparaît-elle dans le mot {w} ?",
            '"{w}".count("{l}")',
            "La lettre {l} apparaît {{}} fois dans « {w} ».",
        ),
        _Form("Écris le mot {w} à l'envers.", 'print("{w}"[::-1])', "À l'envers, « {w} » donne « {{}} »."),
        _Form("Combien de lettres le mot {w} a-t-il ?", 'len("{w}")', "Le mot « {w} » a {{}} lettres."),
        _Form("Trie les nombres {x}, {y}, {z} et {t}.", "sorted([{x}, {y}, {z}, {t}])", "Dans l'ordre : {{}}."),
    ),
}
_ZONES = {
    "Paris": "Europe/Paris",
    "Tokyo": "Asia/Tokyo",
    "New York": "America/New_York",
    "Sydney": "Australia/Sydney",
    "Montréal": "America/Montreal",
    "Dakar": "Africa/Dakar",
}
_TIMES: dict[Language, tuple[_Form, ...]] = {
    "en": (
        _Form("What time is it in {city}?", "{zone}", "In {city} it is {{}}."),
        _Form("What is today's date?", "", "It is {{}}."),
        _Form("What day is it?", "", "It is {{}}."),
        _Form("Can you tell me the time, please?", "", "It is {{}}."),
    ),
    "fr": (
        _Form("Quelle heure est-il à {city} ?", "{zone}", "À {city} : {{}}."),
        _Form("Quel jour sommes-nous ?", "", "Nous sommes {{}}."),
        _Form("Quelle heure est-il ?", "", "Il est {{}}."),
    ),
}


def sums(count: int, seed: int, languages: Sequence[Language]) -> Iterator[Task]:
    """Arithmetic, in figures and in words."""
    return _tasks("calculator", "sums", _SUMS, count, seed, languages, _numbers)


def programs(count: int, seed: int, languages: Sequence[Language]) -> Iterator[Task]:
    """What a line of Python answers."""
    return _tasks("python", "programs", _PROGRAMS, count, seed, languages, _numbers)


def times(count: int, seed: int, languages: Sequence[Language]) -> Iterator[Task]:
    """Dates and times of day."""
    return _tasks("clock", "times", _TIMES, count, seed, languages, _place)


def searches(rows: Iterable[tuple[str, Sequence[str], str]], language: Callable[[str], Language]) -> Iterator[Task]:
    """Questions with their accepted answers and their label, to be looked up."""
    for question, accepted, source in rows:
        known = {"accepted": tuple(accepted), "source": source, "language": language(question)}
        yield Task(question=question, tool="search", argument=query_of(question), answer=None, **known)


def query_of(question: str) -> str:
    """What is looked for: the question without its mark; a full text search weighs the words by itself."""
    return question.strip().rstrip("?！!.").strip()


def _tasks(
    tool: str,
    source: str,
    forms: dict[Language, tuple[_Form, ...]],
    count: int,
    seed: int,
    languages: Sequence[Language],
    draw: Callable[[random.Random], dict[str, object]],
) -> Iterator[Task]:
    for number in range(count):
        rng = random.Random(f"{source}-{seed}-{number}")
        language = languages[number % len(languages)]
        form = rng.choice(forms[language])
        fields = draw(rng)
        question, argument, answer = (part.format(**fields) for part in form)
        yield Task(question=question, tool=tool, argument=argument, answer=answer, source=source, language=language)


def _numbers(rng: random.Random) -> dict[str, object]:
    word = rng.choice(_WORDS)
    b = rng.randint(12, 980)
    few = dict(zip("xyzt", rng.sample(range(2, 99), 4)))
    fields: dict[str, object] = {"a": rng.randint(11, 999), "b": b, "c": b + rng.randint(100, 9000), **few}
    return fields | {
        "s": rng.randint(3, 40),
        "p": rng.choice((5, 10, 15, 20, 25, 40, 75)),
        "n": rng.choice(_NAMES),
        "w": word,
        "l": rng.choice(word),
    }


def _place(rng: random.Random) -> dict[str, object]:
    city = rng.choice(list(_ZONES))
    return {"city": city, "zone": _ZONES[city]}
