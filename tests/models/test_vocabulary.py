"""Tokenizers compared by the strings of their ids."""

from __future__ import annotations

import json
import time

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ptl.functional.cross_entropy import fused_linear_cross_entropy
from ptl.models.heads import lm_head
from ptl.models.vocabulary import (
    check_targets,
    compare_vocabularies,
    end_of_turn,
    shared_vocabulary,
    token_bytes,
    vocabulary_fingerprint,
    vocabulary_size,
)
from tests import tiny


def rewrap(tokenizer, change) -> PreTrainedTokenizerFast:
    """The tokenizer with its vocabulary changed."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = change(state["model"]["vocab"])
    backend = Tokenizer.from_str(json.dumps(state))
    out = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    out.chat_template = tokenizer.chat_template
    return out


def swapped(tokenizer, first: int, second: int) -> PreTrainedTokenizerFast:
    names = tokenizer.convert_ids_to_tokens([first, second])
    return rewrap(tokenizer, lambda vocab: {**vocab, names[0]: second, names[1]: first})


def test_equal_tokenizers_share_everything(tokenizer):
    shared = compare_vocabularies(tokenizer, tiny.make_tokenizer())
    assert shared == (len(tokenizer), ())
    assert vocabulary_fingerprint(tokenizer) == vocabulary_fingerprint(tiny.make_tokenizer())


def test_trap_rm_kd_11_padded_tables_do_not_matter(tokenizer):
    """The embedding's rows play no part in the comparison, and cut to the shared size two padded heads agree."""
    size = shared_vocabulary(tokenizer, tiny.make_tokenizer())
    student, teacher = tiny.make_model(size, tie=False), tiny.make_model(size + 37, tie=False)
    teacher.lm_head.weight.data[:size] = student.lm_head.weight.data
    teacher.lm_head.weight.data[size:] = 9.0  # junk rows
    hidden, targets = torch.randn(5, 32), torch.arange(5)

    def nll(model, rows):
        return fused_linear_cross_entropy(hidden, lm_head(model).weight[:rows], targets, torch.ones(5)).nll

    assert torch.equal(nll(student, size), nll(teacher, size))
    assert not torch.equal(nll(student, size), nll(teacher, size + 37))


def test_trap_rm_kd_11_a_permuted_tokenizer_is_refused_with_its_ids(tokenizer):
    other = swapped(tokenizer, 300, 301)
    assert vocabulary_size(other) == vocabulary_size(tokenizer)
    assert vocabulary_fingerprint(other) != vocabulary_fingerprint(tokenizer)
    ours, theirs = tokenizer.convert_ids_to_tokens([300, 301])
    with pytest.raises(ValueError) as caught:
        shared_vocabulary(tokenizer, other)
    message = str(caught.value)
    assert f"id 300 is {ours!r} for the student and {theirs!r} for the teacher" in message
    assert f"2 of {len(tokenizer)} ids differ" in message
    assert "model.init_args.cross_tokenizer: uld" in message


def test_a_different_tokenizer_is_refused(tokenizer):
    other = tiny.make_tokenizer(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    with pytest.raises(ValueError, match=r"id 0 is '<\|im_start\|>' for the student and '<\|endoftext\|>'"):
        shared_vocabulary(tokenizer, other)


def test_added_tokens_at_the_end_are_cut_and_named_and_their_targets_refused(tokenizer):
    student = tiny.make_tokenizer()
    student.add_tokens(["<tool>", "</tool>"], special_tokens=True)
    size, notes = compare_vocabularies(student, tokenizer)
    assert size == len(tokenizer)
    assert notes == (
        f"the student has 2 more tokens than the teacher ('<tool>', '</tool>'): both are cut to {size} ids",
    )
    assert compare_vocabularies(tokenizer, student).size == size
    check_targets(torch.tensor([[0, size - 1]]), size, student)
    check_targets(torch.zeros(0, dtype=torch.int64), size, student)
    with pytest.raises(ValueError, match=rf"2 trained tokens .* ends at id {size - 1}: '<tool>' \(id {size}\)"):
        check_targets(torch.tensor([[0, size], [size, 3]]), size, student)


def test_an_added_token_in_another_place_is_refused(tokenizer):
    student, teacher = tiny.make_tokenizer(), tiny.make_tokenizer()
    student.add_tokens(["<a>", "<b>"])
    teacher.add_tokens(["<b>", "<a>"])
    with pytest.raises(ValueError, match=r"'<a>' for the student and '<b>' for the teacher"):
        shared_vocabulary(student, teacher)


def test_templates_that_end_turns_differently_are_refused_and_others_are_noted(tokenizer):
    teacher = tiny.make_tokenizer(template=tiny.CHATML.replace("'\n'", "' '"))
    assert end_of_turn(tokenizer) == end_of_turn(teacher) == tokenizer.eos_token_id
    (note,) = compare_vocabularies(tokenizer, teacher).notes
    assert "the teacher prints" in note
    assert "no chat template" in compare_vocabularies(tokenizer, tiny.make_tokenizer(template=None)).notes[0]
    teacher = tiny.make_tokenizer(template=tiny.CHATML.replace("<|im_end|>", "<|im_start|>"))
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' and the teacher's with '<\|im_start\|>'.*init_args.template"):
        shared_vocabulary(tokenizer, teacher)


def test_bytes_of_a_byte_level_vocabulary(tokenizer):
    table = token_bytes(tokenizer)
    for text in ("hello world", "é 🙂\n答え", "\x00\x7f\xa0\xad\xff"):
        assert b"".join(table[i] for i in tokenizer(text)["input_ids"]) == text.encode()
    assert table[tokenizer.eos_token_id] is None
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<tool é>"])
    assert token_bytes(tokenizer)[-1] == "<tool é>".encode()


def test_a_large_vocabulary_is_compared_in_linear_time(tokenizer):
    def seconds(size):
        def large(vocab):
            return {**vocab, **{f"word{i}": len(vocab) + i for i in range(size)}}

        student, teacher = rewrap(tokenizer, large), rewrap(tokenizer, large)
        start = time.process_time()
        assert shared_vocabulary(student, teacher) == len(tokenizer) + size
        vocabulary_fingerprint(student)
        return time.process_time() - start

    assert seconds(160_000) < 40 * min(seconds(16_000) for _ in range(3))  # by pairs it would be 100 times
