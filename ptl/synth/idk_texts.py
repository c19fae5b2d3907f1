"""What a model says of a question that it cannot answer, or half can, in the question's language."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Literal

from ptl.rewards.matching import normalised

Language = Literal["en", "fr"]

REFUSALS: dict[Language, tuple[str, ...]] = {
    "en": (
        "I don't know.",
        "I do not know the answer to that.",
        "I'm sorry, but I don't know.",
        "I don't know the answer to that question.",
        "I'm afraid I don't know that.",
        "Sorry, I do not know.",
        "I don't have the answer to that question.",
        "I am not sure about that, so I would rather not guess.",
        "I don't know, and I would rather say so than guess.",
        "That is something I don't know.",
    ),
    "fr": (
        "Je ne sais pas.",
        "Je ne connais pas la réponse.",
        "Désolé, je ne sais pas.",
        "Je ne connais pas la réponse à cette question.",
        "Je l'ignore.",
        "Je suis désolé, mais je ne connais pas la réponse.",
        "Je n'ai pas la réponse à cette question.",
        "Je ne suis pas sûr de le savoir, et je préfère ne pas deviner.",
        "Je ne sais pas, et je préfère le dire plutôt que de deviner.",
        "C'est une chose que je ne sais pas.",
    ),
}
"""``ptl.rewards.refusals.refuses`` knows them all."""

HEDGES: dict[Language, tuple[str, ...]] = {
    "en": (
        "I am not sure, but I think this is right: {}",
        "I'm not certain. My best guess: {}",
        "I may be wrong, but as far as I know: {}",
    ),
    "fr": (
        "Je ne suis pas sûr, mais je pense que c'est juste : {}",
        "Sans certitude, je dirais : {}",
        "Je peux me tromper, mais autant que je sache : {}",
    ),
}

_FRENCH_WORDS = """
le la les un une des du de d l est sont était qui que qu quel quelle quels quelles où quand comment pourquoi combien
dans en pour sur avec par et ou au aux ce cette ces il elle nous vous je tu se ne pas été
"""
_ENGLISH_WORDS = """
the an of is are was were who what which where when how why many much in for to and or by with from do does did has
have had it its he she they you i that this these at as be been can will there name tell
"""
_FRENCH, _ENGLISH = frozenset(_FRENCH_WORDS.split()), frozenset(_ENGLISH_WORDS.split())
_ACCENTED = re.compile(r"[àâçéèêëîïôùûœ]")


def language_of(text: str) -> Language:
    """English or French, whichever has more of its small words in the text.

    A guess: other languages count as one of the two, and names in the other one may win in a short text. A word with a
    French accent counts half; where both are equal it is English.
    """
    words = re.findall(r"[^\W\d_]+", text.casefold())
    french = sum(word in _FRENCH for word in words) + 0.5 * sum(bool(_ACCENTED.search(word)) for word in words)
    return "fr" if french > sum(word in _ENGLISH for word in words) else "en"


def question_key(texts: Sequence[str]) -> str:
    """What two questions share when they are the same: the normalised words of all turns."""
    return "\n".join(normalised(text) or text for text in texts)


def place_of(key: str, purpose: str) -> float:
    """A number in [0, 1) that depends on a question and a purpose alone, spread evenly over the questions."""
    digest = hashlib.blake2b(f"{purpose}\n{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def refusal(key: str, language: Language) -> str:
    """The refusal that belongs to a question, see ``question_key``."""
    return _pick(REFUSALS[language], key)


def hedge(key: str, language: Language, answer: str) -> str:
    """An answer in words that say that it may be wrong."""
    return _pick(HEDGES[language], key).format(answer)


def _pick(texts: Sequence[str], key: str) -> str:
    return texts[int(place_of(key, "words") * len(texts))]
