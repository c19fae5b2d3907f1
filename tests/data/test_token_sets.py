"""Where new tokens go: ids given and free, gaps, tokens that are there, and tokenizers whose vocabulary has holes."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptl.data.token_sets import SETS, NewToken, place_tokens, with_tokens
from tests import tiny

NOTES = [NewToken("<|im_start|>", id=200264), NewToken("<|im_sep|>", id=200266), NewToken("<|im_end|>", id=200265)]


@pytest.fixture(scope="module")
def base():
    return tiny.make_tokenizer(special=("<|endoftext|>",), eos="<|endoftext|>", template=None)


@pytest.fixture(scope="module")
def o200k():
    """Ids like those of o200k: 199,998 pieces, two special tokens, and holes before and between those."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    pieces = {piece: i for i, piece in enumerate([*sorted(letters), *(f"#{i}" for i in range(199_998 - 256))])}
    vocabulary = {**pieces, "<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|endoftext|>", "<|endofprompt|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def ids(placed, state="new"):
    return {each.token.text: each.id for each in placed if each.state == state}


def test_tokens_without_an_id_follow_the_last_one(base):
    placed = place_tokens(base, [*SETS["chat"], *SETS["think"]])
    end = len(base)
    assert list(ids(placed).values()) == list(range(end, end + 5))
    grown = with_tokens(base, placed)
    assert {text: grown.convert_tokens_to_ids(text) for text in ids(placed)} == ids(placed)
    assert len(base) == end


def test_the_ids_of_the_notes_on_a_vocabulary_with_holes(o200k, tmp_path):
    placed = place_tokens(o200k, [*NOTES, *SETS["tools"]])
    assert ids(placed) == {
        **{token.text: token.id for token in NOTES},
        **{token.text: 200_267 + i for i, token in enumerate(SETS["tools"])},
    }
    reserved = ids(placed, "reserved")
    assert list(reserved.values()) == list(range(200_019, 200_264)) and reserved["<|reserved_200100|>"] == 200_100
    with_tokens(o200k, placed).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    # The library itself would number the tokens anew here, from the first hole on.
    for token, number in {**o200k.get_vocab(), **ids(placed), **reserved}.items():
        assert again.convert_tokens_to_ids(token) == number
    text = "<|im_start|>user<|im_sep|>hi<SEARCH-TOOL>x</SEARCH-TOOL><|im_end|>"
    found = again(text, add_special_tokens=False)["input_ids"]
    assert [found[0], found[5], found[8], found[10], found[-1]] == [200_264, 200_266, 200_267, 200_268, 200_265]
    assert again.decode(found) == text
    assert again.decode(found, skip_special_tokens=True) == "userhi<SEARCH-TOOL>x</SEARCH-TOOL>"


def test_a_token_that_is_there_keeps_its_id_and_its_kind(base):
    grown = with_tokens(base, place_tokens(base, SETS["think"]))
    placed = place_tokens(grown, [NewToken("<think>", special=True), NewToken("<new>")])
    assert ids(placed, "kept") == {"<think>": len(base)} and ids(placed) == {"<new>": len(base) + 2}
    assert not placed[0].token.special
    assert with_tokens(grown, placed).decode([len(base)], skip_special_tokens=True) == "<think>"


def test_a_piece_of_the_vocabulary_becomes_a_token(base):
    piece = next(token for token in base.get_vocab() if token == "The")
    placed = place_tokens(base, [NewToken(piece)])
    grown = with_tokens(base, placed)
    assert placed[0].state == "kept" and grown.get_vocab() == base.get_vocab()
    assert grown.added_tokens_decoder[placed[0].id].content == piece


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ([NewToken("<a>", id=5)], "--token <a>=5: id 5 is taken by"),
        ([NewToken("<a>", id=900), NewToken("<b>", id=900)], "--token <b>=900: id 900 is taken by '<a>'"),
        ([NewToken("<|endoftext|>", id=900)], "the tokenizer has this token at id 0"),
        ([NewToken("<a>"), NewToken("<a>")], "'<a>' is given twice"),
        ([NewToken(" <a>")], "no white space at its ends"),
        ([NewToken("")], "a token is not empty"),
    ],
)
def test_what_cannot_be_placed_is_refused(wanted, words, base):
    with pytest.raises(ValueError, match=words):
        place_tokens(base, wanted)


def test_a_free_id_in_a_hole_can_be_given(o200k):
    grown = with_tokens(o200k, place_tokens(o200k, [NewToken("<a>", id=200_001)]))
    assert grown.convert_tokens_to_ids("<a>") == 200_001 and len(grown) == len(o200k) + 1


@pytest.mark.parametrize("given", [None, 700])
def test_marks_behind_the_vocabulary_keep_their_ids(base, given):
    """Qwen's and Llama 3's own special tokens are not in the table of their pieces."""
    tokenizer = with_tokens(base, [])
    tokenizer.add_tokens([AddedToken("<|behind|>", special=True, normalized=False)])
    before = tokenizer.get_vocab()
    text = "hello <|behind|> world<|endoftext|> brown"
    grown = with_tokens(tokenizer, place_tokens(tokenizer, [NewToken("<|new|>", id=given)]))
    assert before["<|behind|>"] == len(before) - 1
    assert {token: grown.get_vocab()[token] for token in before} == before
    assert grown.get_vocab()["<|new|>"] == (given or len(before))
    assert grown.encode(text) == tokenizer.encode(text)
    assert grown.decode(grown.encode(text + "<|new|>")) == tokenizer.decode(tokenizer.encode(text)) + "<|new|>"


def test_a_unigram_vocabulary_takes_tokens_at_its_end_alone(tmp_path):
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    grown = with_tokens(tokenizer, place_tokens(tokenizer, [NewToken("<a>"), NewToken("<b>")]))
    assert grown("a<a>b")["input_ids"] == [1, 3, 2]
    assert json.loads(grown.backend_tokenizer.to_str())["model"]["vocab"][-1][0] == "b"
