"""A padding token that a reward model's score is never read from.

transformers pools a sequence classifier at the rightmost token that differs from ``config.pad_token_id``. Where that id
is also what a rendered conversation ends with (SmolLM2 pads with ``<|im_end|>``), the score is read one token too
early. Inside a conversation the padding token does no harm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ptl.models.vocabulary import print_chat, special_ids, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_ANSWERS = ("wq1answer", "Yes.", "1", "```\nx\n```", "»")
"""Whose ends are unlike, so that a template that prints nothing after an answer shows it."""


def last_tokens(tokenizer: PreTrainedTokenizerFast, ends: Sequence[int] = ()) -> set[int]:
    """Ids that a conversation of this chat template was seen to end with, and those that end an answer.

    Args:
        tokenizer: with its chat template; without one, ``ends`` and its EOS are all that is known.
        ends: ids that end an answer, as the renderer knows them.
    """
    found = set(ends)
    for answer in _ANSWERS:
        turns = [{"role": "user", "content": "wq2question"}, {"role": "assistant", "content": answer}]
        text = print_chat(tokenizer, turns)
        found.update(tokenizer(text, add_special_tokens=False)["input_ids"][-1:] if text else ())  # pyright: ignore
    if not tokenizer.chat_template and isinstance(tokenizer.eos_token_id, int):
        found.add(tokenizer.eos_token_id)
    return found


def safe_pad_id(tokenizer: PreTrainedTokenizerFast, ends: Sequence[int] = ()) -> int:
    """An id that no conversation ends with: the tokenizer's own padding token, unknown token, BOS, or any other.

    A special token is taken before a token of text, since text of a template without a closing token may end with
    anything.

    Args:
        tokenizer: with the chat template that the model was trained on; not changed.
        ends: as in ``last_tokens``.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    last = last_tokens(tokenizer, ends)
    for candidate in _candidates(tokenizer):
        if candidate not in last:
            return candidate
    raise ValueError(f"every token of the vocabulary ends some conversation, so none can be padding: {sorted(last)}")


def _candidates(tokenizer: PreTrainedTokenizerFast) -> Iterator[int]:
    for own in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        if isinstance(own, int):
            yield own
    yield from sorted(special_ids(tokenizer))
    ordinary: list[int] = []
    for number in reversed(range(vocabulary_size(tokenizer))):
        token = tokenizer.convert_ids_to_tokens(number)
        if token is None:
            continue
        # A padding token becomes a mark, cut out of any text that spells it: better one that no text spells (a space
        # is written as another letter in vocabularies).
        if tokenizer(token, add_special_tokens=False)["input_ids"] == [number]:
            ordinary.append(number)
        else:
            yield number
    yield from ordinary


def with_pad(tokenizer: PreTrainedTokenizerBase, number: int) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that pads with the id ``number``."""
    changed = copy.deepcopy(tokenizer)
    changed.pad_token = changed.convert_ids_to_tokens(number)
    return changed
