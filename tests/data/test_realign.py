"""A document for two tokenizers: what is grouped with what, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ptl.data.realign import Realigned, Realigner, flatten, realign
from ptl.data.render import Renderer
from ptl.functional.cross_tokenizer import Side, fused_cross_tokenizer_loss, matched
from ptl.models.heads import lm_head
from tests import tiny
from tests.data.chat_cases import CASES
from tests.data.test_spans import ZEPHYR, metaspace

TEXTS = [
    "hello world",
    "é",
    "Où est Shanghai ? 🙂",
    "答えは4です。",
    "a👩‍👩‍👧b\n\n  e\u0301 x",
    "  [[1,2],[3,4]] ",
]
LLAMA = (
    "{{ '<s>' }}{% for m in messages %}{{ '<h>' + m['role'] + '</h>\n\n' + m['content'] + '<eot>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<h>assistant</h>\n\n' }}{% endif %}"
)


def small(letters_only: bool = False, template=LLAMA) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with other merges, other marks and another template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=261 if letters_only else 330,
        special_tokens=["<s>", "</s>", "<h>", "</h>", "<eot>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["答え est 🙂 lo wor ld the fox é és"] * 30 + tiny.CORPUS[1:2], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def plain(tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    mask = np.ones(len(ids), np.float32)
    mask[:1] = 0
    return ids, mask


def words(realigner: Realigner, ids, out: Realigned) -> list[tuple[bytes, bytes]]:
    """The bytes of each group on both sides."""
    student, teacher = realigner._student, realigner._teacher
    return [
        (student.join(list(ids[a:b])), teacher.join(out.teacher_ids[c:d].tolist()))
        for a, b, c, d in out.groups.tolist()
    ]


def test_identical_tokenizers_give_pairs(tokenizer):
    realigner = Realigner(tokenizer, tiny.make_tokenizer())
    renderer = Renderer(tokenizer)
    for name in ("single", "multi", "system"):
        (tokens,) = renderer.render(CASES[name])
        out = realigner(tokens.ids, tokens.loss_mask)
        assert out.teacher_ids.tolist() == tokens.ids.tolist()
        trained = np.flatnonzero(tokens.loss_mask)
        assert out.groups.tolist() == [[i, i + 1, i, i + 1] for i in trained]
        assert out.weights.tolist() == tokens.loss_mask[trained].tolist() and out.unaligned == 0
    ours, theirs = realigner.matched
    assert ours.tolist() == theirs.tolist() == list(range(len(tokenizer)))


def test_a_hand_made_table():
    student, teacher = tiny.make_tokenizer(), small(letters_only=True)
    ids, mask = plain(student, ". world é")
    assert student.convert_ids_to_tokens(ids.tolist()) == [".", "Ġworld", "Ġ", "Ã", "©"]
    out = realign(ids, mask, student, teacher)
    assert teacher.convert_ids_to_tokens(out.teacher_ids.tolist()) == [*".Ġworld", "Ġ", "Ã", "©"]
    assert out.groups.tolist() == [[1, 2, 1, 7], [2, 3, 7, 8], [3, 4, 8, 9], [4, 5, 9, 10]]
    assert out.weights.tolist() == [1, 1, 1, 1] and out.unaligned == 0


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("pair", ["bytes", "letters", "reversed", "to sentencepiece", "from sentencepiece"])
def test_every_trained_byte_is_in_one_group(text, pair):
    ours, sentence = tiny.make_tokenizer(), metaspace("always", ZEPHYR)
    student, teacher = {
        "bytes": (ours, small()),
        "letters": (ours, small(letters_only=True)),
        "reversed": (small(), ours),
        "to sentencepiece": (ours, sentence),
        "from sentencepiece": (sentence, ours),
    }[pair]
    realigner = Realigner(student, teacher)
    text = ". " + text  # the first group holds the token that nothing predicts
    ids, mask = plain(student, text)
    out = realigner(ids, mask)
    sides = words(realigner, ids, out)
    assert all(a == b and a for a, b in sides)
    first = out.groups[0, 0]
    assert b"".join(a for a, _ in sides) == realigner._student.join(ids[first:].tolist())
    assert out.unaligned == first - 1 and first <= 3
    # Consecutive on both sides: nothing twice, nothing left out; and the shortest possible groups.
    assert (out.groups[1:, 0] == out.groups[:-1, 1]).all() and (out.groups[1:, 2] == out.groups[:-1, 3]).all()
    for a, b, c, d in out.groups.tolist():
        inner = {len(realigner._student.join(ids[a:i].tolist())) for i in range(a + 1, b)}
        assert not inner & {len(realigner._teacher.join(out.teacher_ids[c:i].tolist())) for i in range(c + 1, d)}


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_the_space_that_sentencepiece_puts_before_a_text_is_no_byte_of_it(scheme):
    student, teacher = tiny.make_tokenizer(), metaspace(scheme, ZEPHYR)
    realigner = Realigner(student, teacher)
    ids, mask = plain(student, "hello world")
    out = realigner(ids, mask)
    assert teacher.decode(out.teacher_ids) == "hello world"
    assert out.teacher_ids.tolist() == teacher("hello world", add_special_tokens=False)["input_ids"]
    # In the middle of a text, at the border of an answer, no space is put in.
    ids, mask = plain(student, "a fox hello")
    ids = np.concatenate([ids, plain(student, "lazy")[0]])
    mask = (np.arange(len(ids)) >= len(mask)).astype(np.float32)
    out = realigner(ids, mask)
    pieces = realigner._teacher.bytes
    assert b"".join(pieces[i] for i in out.teacher_ids) == b" a fox hellolazy"
    assert b"".join(pieces[i] for i in out.teacher_ids[out.groups[0, 2] :]) == b"lazy" and out.unaligned == 0


def test_law_2_special_tokens_go_by_role_or_name_and_never_by_their_spelling(tokenizer):
    teacher = small()
    (tokens,) = Renderer(tokenizer).render(CASES["multi"])
    realigner = Realigner(tokenizer, teacher)
    out = realigner(tokens.ids, tokens.loss_mask)
    messages = [{"role": m.role, "content": m.content} for m in CASES["multi"].messages]
    # The teacher reads its own form, but for the student's new line after the last turn.
    expected = teacher.apply_chat_template(messages, tokenize=False)
    assert teacher.decode(out.teacher_ids) == expected + "\n"
    specials = {i for i in out.teacher_ids.tolist() if i in realigner._teacher.special}
    assert specials == set(teacher.convert_tokens_to_ids(["<s>", "<h>", "</h>", "<eot>"]))
    assert out.unaligned == 0
    ends = [
        (a, c)
        for a, b, c, d in out.groups.tolist()
        if tokens.ids[a] == tokenizer.eos_token_id and (b - a, d - c) == (1, 1)
    ]
    assert len(ends) == 2 and all(out.teacher_ids[c] == teacher.convert_tokens_to_ids("<eot>") for _, c in ends)
    table = dict(zip(*(column.tolist() for column in realigner.matched)))
    assert table[tokenizer.eos_token_id] == teacher.convert_tokens_to_ids("<eot>")


def test_the_system_turn_has_its_own_header(tokenizer):
    teacher = small()
    (tokens,) = Renderer(tokenizer).render(CASES["system"])
    out = realign(tokens.ids, tokens.loss_mask, tokenizer, teacher)
    messages = [{"role": m.role, "content": m.content} for m in CASES["system"].messages]
    assert teacher.decode(out.teacher_ids) == teacher.apply_chat_template(messages, tokenize=False) + "\n"


def test_text_that_looks_like_a_mark_of_the_teacher_stays_text(tokenizer):
    teacher = small()
    ids, mask = plain(tokenizer, "a <eot></s> b")
    out = realign(ids, mask, tokenizer, teacher)
    assert not {4, 1} & set(out.teacher_ids.tolist()) and teacher.decode(out.teacher_ids) == "a <eot></s> b"


def test_what_has_no_partner_is_counted_and_weighs_nothing():
    student, teacher = tiny.make_tokenizer(), small(template=None)
    student.chat_template = None
    student.add_tokens(["<tool>"], special_tokens=True)
    ids, _ = plain(student, "hello<tool> world<|im_start|>")
    mask = np.full(len(ids), 0.5, np.float32)
    mask[0] = 0
    out = realign(ids, mask, student, teacher)
    assert teacher.decode(out.teacher_ids) == "hello world"
    lost = [student.convert_tokens_to_ids(name) for name in ("<tool>", "<|im_start|>")]
    kept = {i for a, b, _, _ in out.groups.tolist() for i in ids[a:b].tolist()}
    assert not kept & set(lost) and out.unaligned >= 2
    assert out.weights.sum() + out.unaligned_weight == pytest.approx(mask.sum())
    assert (out.groups[:, 1] - out.groups[:, 0]).sum() + out.unaligned == (mask != 0).sum()


def test_half_a_character_at_a_cut_is_counted(tokenizer):
    ids, mask = plain(tokenizer, ". fox🙂")
    ids, mask = ids[:-1], mask[:-1]
    broken = tokenizer.decode(ids).count("\ufffd")
    out = realign(ids, mask, tokenizer, small(letters_only=True))
    assert broken == 1 and out.unaligned == 3
    assert out.groups[-1, 1] == len(ids) - 3
    # In the middle of a text it is the same, and what follows is aligned again.
    tail, _ = plain(tokenizer, " fox")
    out = realign(np.concatenate([ids, tail]), np.ones(len(ids) + len(tail)), tokenizer, small(letters_only=True))
    assert out.unaligned == 3 and out.groups[-1, 1] == len(ids) + len(tail)


def test_no_token_of_the_teacher_crosses_from_prompt_to_answer(tokenizer):
    ids = np.array(tokenizer("a b the quick brown")["input_ids"])
    for border in range(1, len(ids)):
        mask = np.zeros(len(ids), np.float32)
        mask[border:] = 1
        out = realign(ids, mask, tokenizer, small())
        assert out.unaligned == 0 and out.weights.sum() == len(ids) - border
        assert out.groups[0, 0] == border


def test_documents_without_anything_to_align(tokenizer):
    for ids in ([], [5], [tokenizer.eos_token_id]):
        out = realign(np.array(ids, np.int32), np.ones(len(ids), np.float32), tokenizer, small())
        assert out.groups.shape == (0, 4) and out.unaligned == 0


def test_trap_rm_kd_8_rows_are_the_positions_before_the_tokens(tokenizer):
    """In a batch of several documents, the row of a token is the position before it, on both sides."""
    teacher = small()
    realigner, renderer = Realigner(tokenizer, teacher), Renderer(tokenizer)
    tokens = [renderer.render(CASES[name])[0] for name in ("single", "multi")]
    out = [realigner(t.ids, t.loss_mask) for t in tokens]
    width = max(len(o.teacher_ids) for o in out) + 3  # the teacher's batch is padded, the student's packed
    theirs = np.zeros((2, width), np.int64)
    for row, o in zip(theirs, out):
        row[: len(o.teacher_ids)] = o.teacher_ids
    ours = np.concatenate([t.ids for t in tokens])
    rows = flatten(out, [0, len(tokens[0].ids)], [0, width])
    trained = np.concatenate([t.loss_mask for t in tokens]).nonzero()[0]
    assert rows.student_positions.tolist() == (trained - 1).tolist()
    student_targets, teacher_targets = ours[rows.student_positions + 1], theirs.flatten()[rows.teacher_positions + 1]
    for a, b, c, d in rows.groups.tolist():
        mine = realigner._student.join(student_targets[a:b].tolist())
        assert mine == realigner._teacher.join(teacher_targets[c:d].tolist())
    assert rows.weights.sum() == len(trained)
    nothing = flatten([], [], [])
    assert nothing.groups.shape == (0, 4) and nothing.student_positions.shape == (0,)


@pytest.mark.parametrize("kind", ["uld", "hybrid"])
def test_a_model_through_the_whole_path_is_at_no_distance_from_itself(tokenizer, kind):
    """One student token late on either side, the distance is not 0."""
    model = tiny.make_model(len(tokenizer)).eval()
    (tokens,) = Renderer(tokenizer).render(CASES["multi"])
    realigner = Realigner(tokenizer, tiny.make_tokenizer())
    out = realigner(tokens.ids, tokens.loss_mask)
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    hidden = model.get_decoder()(input_ids=ids[None])[0][0]
    table = matched(*(torch.from_numpy(column) for column in realigner.matched), len(tokenizer), len(tokenizer))

    def loss(late: int):
        rows = flatten([out], [0], [0])
        sides = []
        for positions, shift in ((rows.student_positions, late), (rows.teacher_positions, 0)):
            at = torch.from_numpy(positions)
            sides.append(Side(hidden[at + shift], lm_head(model).weight, ids[at + 1]))
        groups, weights = torch.from_numpy(rows.groups), torch.from_numpy(rows.weights)
        return fused_cross_tokenizer_loss(*sides, groups, weights, table, kind=kind).total

    assert loss(0) == 0
    assert loss(1) > 0.01
