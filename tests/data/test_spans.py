"""From characters to tokens: byte lengths against offsets, straddling tokens, tokenizers of other kinds."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ptl.data.chat_template import RenderError
from ptl.data.documents import Document
from ptl.data.render import Renderer
from ptl.data.spans import Encoder
from ptl.types import Tokens
from tests import tiny
from tests.data.chat_cases import chat, make, rendered, trained

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def metaspace(prepend: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of Llama 2's kind: spaces are letters of words, and one is put before a text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme=prepend), decoders.ByteFallback()])
    letters = sorted({letter for text in tiny.CORPUS for letter in text} | set("\n|<>é▁"))
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=letters,
        show_progress=False,
    )
    backend.train_from_iterator(tiny.CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def by_offsets(encoder: Encoder, document: Document) -> Tokens | RenderError:
    return encoder._by_offsets(document, encoder._backend.encode(document.text, add_special_tokens=False))


def test_byte_lengths_and_offsets_agree(tokenizer):
    """On any text and any spans, at token boundaries or inside tokens."""
    encoder, rng = Encoder(tokenizer, [tokenizer.eos_token_id]), random.Random(0)
    pieces = ["hello", " world", "é", "🙂", "\n", "  ", "<|im_end|>", "<|im_start|>", "答え", "assistant", "e\u0301"]
    split = 0
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        cuts = sorted(rng.sample(range(len(text) + 1), k=min(4, len(text) + 1)))
        document = Document(
            text, [(a, b, float(i + 1)) for i, (a, b) in enumerate(zip(cuts[::2], cuts[1::2])) if a < b]
        )
        (ours,) = encoder.encode([document])
        theirs = by_offsets(encoder, document)
        assert isinstance(ours, Tokens) and isinstance(theirs, Tokens)
        assert ours.ids.tolist() == theirs.ids.tolist() and ours.loss_mask.tolist() == theirs.loss_mask.tolist()
        assert tokenizer.decode(ours.ids, skip_special_tokens=False) == text
        one_go = tokenizer(text, add_special_tokens=False)["input_ids"]
        split += ours.ids.tolist() != one_go
        at = 0
        for start, end, weight in document.spans:
            chosen = ours.ids[ours.loss_mask == weight]
            at = max(at, start)
            if start > 0:  # the first token is never a target
                assert tokenizer.decode(chosen, skip_special_tokens=False) == text[start:end]
    assert 0 < split < 300


def test_a_token_that_straddles_header_and_answer_is_parted():
    tokenizer = make(
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    conversation = chat("the quick brown hel", "lo world")
    assert len(tokenizer("hello", add_special_tokens=False)["input_ids"]) < 3
    renderer = Renderer(tokenizer)
    (document,) = renderer.render(conversation)
    assert trained(document, tokenizer) == ["lo world<|im_end|>"]
    prompt = renderer.prompt(conversation.messages[:1])
    assert document.ids[: len(prompt)].tolist() == prompt


def test_white_space_trimmed_off_offsets_hides_no_straddling_token():
    """The post-processor of Llama 3 and GPT-2 trims offsets; the renderer's copy has none."""
    tokenizer = make(
        tiny.CHATML.replace("assistant\n' }}{% endif", "assistant: ' }}{% endif").replace(
            "m['role'] + '\n' +", "m['role'] + ': ' +"
        )
    )
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    renderer = Renderer(tokenizer)
    conversation = chat("hello", "world", "hello", " world")
    (document,) = renderer.render(conversation)
    assert trained(document, tokenizer) == ["world<|im_end|>", " world<|im_end|>"]
    prompt = renderer.prompt(conversation.messages[:1])
    assert document.ids[: len(prompt)].tolist() == prompt


def test_a_normaliser_that_changes_the_text(tokenizer):
    """Qwen's tokenizers compose characters: positions then come from offsets, and the words lose nothing."""
    changed = make(tiny.CHATML)
    changed.backend_tokenizer.normalizer = normalizers.NFC()
    assert rendered(changed, chat("e\u0301te\u0301 e\u0301", "e\u0301 fox e\u0301")) == [
        ["\u00e9 fox \u00e9<|im_end|>"]
    ]
    assert rendered(changed, chat("hello", "\u00e9 \u0958")) == [["\u00e9 \u0915\u093c<|im_end|>"]]
    changed.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert rendered(changed, chat("HELLO", "World É")) == [["world é<|im_end|>"]]


@pytest.mark.parametrize("prepend", ["never", "first", "always"])
@pytest.mark.parametrize("answer", ["world", "fox\njumps", "é 🙂 the", "over the  lazy"])
def test_tokenizers_of_sentencepiece_kind(prepend, answer):
    tokenizer = metaspace(prepend, ZEPHYR)
    renderer = Renderer(tokenizer)
    (document,) = renderer.render(chat("hello", answer, "hello", answer))
    assert renderer.terminators == (tokenizer.eos_token_id,)
    assert trained(document, tokenizer) == [answer + "</s>"] * 2
    messages = [message.as_dict() for message in chat("hello", answer, "hello", answer).messages]
    assert document.ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)


def test_a_straddling_token_that_cannot_be_parted_is_refused():
    """Here a text tokenised by itself gains a space, so the pieces would not give the same text."""
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    for prepend in ("always", "never"):
        tokenizer = metaspace(prepend, template)
        offsets = tokenizer("hello", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        cut = next(start + 1 for start, end in offsets if end - start > 1)
        (result,) = Renderer(tokenizer).render_batch([chat("hello"[:cut], "hello"[cut:])])
        if prepend == "always":
            assert isinstance(result, RenderError) and result.reason == "straddling_token"
        else:
            assert isinstance(result, list) and trained(result[0], tokenizer) == ["hello"[cut:] + "</s>"]


def test_an_end_token_that_swallows_the_line_feed_after_it():
    """Phi-3's special tokens take white space on their right into themselves."""
    tokenizer = make(ZEPHYR, special=("<|user|>",), eos="</s>")
    for name in ("</s>", "<|assistant|>", "<|user|>"):
        tokenizer.add_tokens([AddedToken(name, rstrip=True, special=True)], special_tokens=True)
    renderer = Renderer(tokenizer)
    conversation = chat("hello", "world", "fox", "dog")
    (document,) = renderer.render(conversation)
    assert [text.strip() for text in trained(document, tokenizer)] == ["world</s>", "dog</s>"]
    assert document.ids.tolist()[-1] == tokenizer.eos_token_id and document.loss_mask[-1] == 1
    prompt = renderer.prompt(conversation.messages[:1])
    assert document.ids[: len(prompt)].tolist() == prompt


def test_padding_and_truncation_left_on_a_tokenizer_do_not_act():
    tokenizer = make(tiny.CHATML)
    (before,) = Renderer(tokenizer).render(chat("hello", "world"))
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.truncation is not None
    (after,) = Renderer(tokenizer).render(chat("hello", "world"))
    assert np.array_equal(before.ids, after.ids)
