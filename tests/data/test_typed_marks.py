"""Marks that users and tools type are text; those of the template and of the assistant are single tokens."""

import pickle

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ptl.data.render import Renderer, RenderError
from ptl.data.typed_marks import GUARD, guarded, mark_pattern
from tests import tiny
from tests.data.chat_cases import chat, say, talk, trained

SPECIAL = ("<|im_start|>", "<|im_sep|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<SEARCH-TOOL>", "</SEARCH-TOOL>")


def byte_level(normalized: bool = False):
    """With ``normalized`` the tags are looked for in the text as the normaliser leaves it."""
    tokenizer = tiny.make_tokenizer(special=SPECIAL, template=None)
    if normalized:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(tag, normalized=normalized, special=False) for tag in TAGS])
    return tokenizer


def sentencepiece():
    """BPE with byte fallback and a space put before each text, as Llama 2 has it."""
    letters = [f"<0x{byte:02X}>" for byte in range(256)] + list("▁abcdefghijklmnopqrstuvwxyz|_<>/")
    backend = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(letters)}, merges=[], byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


MAKERS = {"byte level": byte_level, "sentencepiece": sentencepiece, "normalised": lambda: byte_level(True)}


@pytest.fixture(params=MAKERS)
def renderer(request):
    return Renderer(MAKERS[request.param](), "im_sep")


def count(renderer, ids, mark) -> int:
    return list(ids).count(renderer.tokenizer.convert_tokens_to_ids(mark))


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("mark", [*SPECIAL, *TAGS])
def test_a_typed_mark_is_text_in_training_and_in_chat(renderer, mark, role):
    typed = f"say {mark}now {mark}"
    conversation = talk(say("user", "go"), say(role, typed), say("assistant", "no"))
    (document,) = renderer.render(conversation)
    (plain,) = renderer.render(talk(say("user", "go"), say(role, "say now"), say("assistant", "no")))
    assert count(renderer, document.ids, mark) == count(renderer, plain.ids, mark)
    assert typed.replace(" ", "") in renderer.tokenizer.decode(document.ids).replace(" ", "")
    assert GUARD not in renderer.tokenizer.decode(document.ids)
    assert trained(document, renderer.tokenizer) == trained(plain, renderer.tokenizer)
    prompt = renderer.prompt(conversation.messages[:-1])
    assert document.ids[: len(prompt)].tolist() == prompt


def test_the_assistants_own_tags_are_single_tokens_that_stay_in_decoded_text(renderer):
    answer = "<think>hm</think><SEARCH-TOOL>rome</SEARCH-TOOL>"
    (document,) = renderer.render(chat("where ? <SEARCH-TOOL>x</SEARCH-TOOL>", answer))
    said = [i for i, weight in zip(document.ids, document.loss_mask) if weight]
    assert [count(renderer, said, tag) for tag in TAGS] == [1, 1, 1, 1]
    assert renderer.tokenizer.decode(said, skip_special_tokens=True).replace(" ", "") == answer


def test_what_is_typed_is_tokenised_as_it_would_be_without_marks():
    """Token for token what the tokenizer makes of the text when it has no such marks."""
    renderer = Renderer(byte_level(), "im_sep")
    text = "hello world <|im_end|> the quick <think> fox"
    plain = tiny.make_tokenizer(special=SPECIAL, template=None).backend_tokenizer
    plain.encode_special_tokens = True
    expected = plain.encode(text).ids
    ids = renderer.prompt([say("user", text)])
    assert any(ids[at : at + len(expected)] == expected for at in range(len(ids)))


@pytest.mark.parametrize("text", ["<<|im_end|>>", "<|im_end|><|im_end|>", f"<{GUARD}|im_end|>", "<|im_<|im_end|>end|>"])
def test_nested_and_guarded_marks_do_not_get_through(text):
    renderer = Renderer(pickle.loads(pickle.dumps(byte_level())), "im_sep")
    ids = renderer.prompt([say("user", text)])
    assert count(renderer, ids, "<|im_end|>") == 1
    assert text.replace(GUARD, "") in renderer.tokenizer.decode(ids)


def test_overlapping_marks_are_all_guarded():
    tokenizer = tiny.make_tokenizer(special=("<a>b", "b<c>", "<|im_end|>"), template=None)
    assert guarded("<a>b<c>", mark_pattern(tokenizer)) == f"<{GUARD}a>b{GUARD}<c>"
    assert guarded("b <a> c", mark_pattern(tokenizer)) == "b <a> c"


def test_runs_of_spaces_are_no_marks():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    renderer = Renderer(tokenizer, "im_sep")
    ids = renderer.prompt([say("user", "a    b")])
    assert count(renderer, ids, "    ") == 1


def test_a_tokenizer_whose_text_pieces_are_marks_refuses():
    pieces = [("<unk>", 0.0), *((letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz|_<>/"), ("<|im_end|>", 0.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    renderer = Renderer(tokenizer, "im_sep")
    with pytest.raises(RenderError) as refusal:
        renderer.prompt([say("user", "<|im_end|>")])
    assert refusal.value.reason == "typed_mark"
    fine, refused = renderer.render_batch([chat("a", "b"), chat("a <|im_end|>", "b")])
    assert isinstance(refused, RenderError) and not isinstance(fine, RenderError)
