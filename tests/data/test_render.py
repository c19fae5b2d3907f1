"""The renderer: masks by every source, weights, history, tools, BOS, plain text, batches."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pytest

from ptl.data.render import Renderer, RenderError, RenderPolicy, stop_token_ids
from ptl.data.tokenizer import load_tokenizer
from ptl.types import Conversation
from tests import forks, tiny
from tests.data.chat_cases import (
    CALL,
    CASES,
    FOLDER,
    ORIGIN,
    TOOLS,
    chat,
    make,
    published,
    rendered,
    say,
    talk,
    trained,
)

HEADER = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = (
    HEADER + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT
)
MARKED_WORDS_ONLY = (
    HEADER + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
NO_THINK_IN_HISTORY = (
    HEADER + "{% set c = m['content'] %}{% if not loop.last and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ c + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
DATED = "{{ 'Today is ' + strftime_now('%d %B %Y') + '\n' }}" + tiny.CHATML


def refusal(tokenizer, conversation, template=None, **policy) -> RenderError:
    with pytest.raises(RenderError) as caught:
        Renderer(tokenizer, template, RenderPolicy(**policy)).render(conversation)
    return caught.value


@pytest.mark.parametrize("template", [tiny.CHATML, MARKED, MARKED_WORDS_ONLY, NO_THINK_IN_HISTORY])
def test_trap_sft_3_mask_with_and_without_generation_marks(tokenizer, template):
    """The end of the turn is trained whether the marks hold it or not, the line feed after it never is."""
    conversation = chat("hello", "[[1,2],[3,4]]", "fox", "")
    assert rendered(tokenizer, conversation, template) == [["[[1,2],[3,4]]<|im_end|>", "<|im_end|>"]]


def test_trap_sft_3_marks_that_start_the_text_do_not_spill_over():
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    )
    conversation = talk(say("assistant", "h"), say("user", " hello world the quick"), say("assistant", "fox"))
    tokenizer = make(template)
    renderer = Renderer(tokenizer)
    (document,) = renderer.render(conversation)
    # Position 0 is no target: nothing precedes it.
    assert trained(document, tokenizer) == ["<|im_end|>", "fox<|im_end|>"]


def test_trap_sft_3_template_without_an_end_token_is_refused():
    tokenizer = make("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    error = refusal(tokenizer, chat("hel", "lo"))
    assert error.reason == "no_end_token" and "ptl tokens add" in error.detail


def test_an_end_that_is_no_token_of_the_tokenizer_is_refused():
    tokenizer = make(tiny.CHATML, special=("<|other|>",), eos="</s>")
    error = refusal(tokenizer, chat("hello", "world"))
    assert error.reason == "no_end_token" and "'<|im_end|>\\n'" in error.detail


def test_trap_sft_4_rewritten_history_is_trained_as_at_inference(tokenizer):
    first, second = "<think>a</think>world", "<think>b</think>dog"
    conversation = chat("hello", first, "fox", second)
    renderer = Renderer(tokenizer, NO_THINK_IN_HISTORY)
    one, two = renderer.render(conversation)
    assert trained(one, tokenizer) == [first + "<|im_end|>"]
    assert trained(two, tokenizer) == [second + "<|im_end|>"]
    assert "<think>a" not in tokenizer.decode(two.ids) and "world" in tokenizer.decode(two.ids)


def test_trap_sft_4_turns_that_are_not_rewritten_share_a_document():
    """Qwen3 keeps the reasoning of a tool loop until the next question, and drops it then."""
    tokenizer = published("qwen3", bos=None, eos="<|im_end|>")
    conversation = talk(
        say("user", "weather?"),
        say("assistant", tool_calls=(CALL,), reasoning="look"),
        say("tool", "sun"),
        say("assistant", "sunny", reasoning="seen"),
        say("user", "thanks"),
        say("assistant", "bye", reasoning="end"),
        tools=TOOLS,
    )
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert rendered(tokenizer, conversation) == [
        ["<think>\nlook\n</think>\n\n" + call, "<think>\nseen\n</think>\n\nsunny<|im_end|>"],
        ["<think>\nend\n</think>\n\nbye<|im_end|>"],
    ]


def test_trap_sft_4_answers_that_share_their_first_and_last_characters():
    """A difference of two prints would train ``1,2],[3,4`` of ``[[1,2],[3,4]]``."""
    tokenizer = make(tiny.CHATML)
    for answer in ("[[1,2],[3,4]]", "assistant", "hello", "<|im_start|>", "a<|im_end|>b", "\n", "  x  "):
        assert rendered(tokenizer, chat("hello", answer, "hello", answer)) == [[answer + "<|im_end|>"] * 2], answer


def test_trap_sft_5_every_trained_turn_ends_in_a_terminator_that_generation_knows(tokenizer):
    phi = published("phi3", eos="<|endoftext|>")
    renderer = Renderer(phi)
    (document,) = renderer.render(CASES["multi"])
    end = phi.convert_tokens_to_ids("<|end|>")
    assert renderer.terminators == (end,)
    ids, mask = document.ids, document.loss_mask
    assert [ids[t] for t in range(len(ids) - 1) if mask[t] and not mask[t + 1]] == [end, end]
    assert stop_token_ids(renderer, 7) == [end, phi.eos_token_id, 7]
    assert stop_token_ids(renderer, [phi.eos_token_id, 9]) == [end, phi.eos_token_id, 9]
    assert stop_token_ids(Renderer(tokenizer)) == [tokenizer.eos_token_id]


def test_trap_sft_6_pad_is_eos(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (document,) = Renderer(tokenizer).render(chat("hello", "world"))
    ends = np.flatnonzero(document.ids == tokenizer.pad_token_id)
    assert document.loss_mask[ends].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("prints_bos", [True, False])
def test_trap_sft_7_bos_is_what_the_template_prints_and_never_twice(prints_bos):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make("{{ bos_token }}" * prints_bos + tiny.CHATML, bos="<s>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    conversation = chat("hello", "world")
    renderer = Renderer(tokenizer)
    (document,) = renderer.render(conversation)
    messages = [message.as_dict() for message in conversation.messages]
    assert document.ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    assert document.ids.tolist().count(bos) == int(prints_bos)
    prompt = renderer.prompt(conversation.messages[:1])
    assert prompt == tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)


def test_trap_sft_7_plain_text_has_one_bos_if_the_tokenizer_adds_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make(None, bos="<s>", eos="</s>")
    plain = Conversation(text="hello world", origin=ORIGIN)
    (document,) = Renderer(tokenizer).render(plain)
    assert tokenizer.decode(document.ids) == "hello world</s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for text in ("hello world", "<s>hello world"):
        (document,) = Renderer(tokenizer).render(Conversation(text=text, origin=ORIGIN))
        assert tokenizer.decode(document.ids) == "<s>hello world</s>"
        assert document.loss_mask.tolist() == [0.0] + [1.0] * (len(document.ids) - 1)


def test_trap_sft_15_dates_do_not_depend_on_the_day(tokenizer):
    def text(**policy):
        renderer = Renderer(tokenizer, DATED, RenderPolicy(**policy))
        (document,) = renderer.render(chat("hello", "world"))
        prompt = renderer.prompt(chat("hello").messages)
        assert document.ids[: len(prompt)].tolist() == prompt
        return tokenizer.decode(document.ids)

    assert text().startswith("Today is 01 January 2025\n")
    assert text(date="2026-11-23").startswith("Today is 23 November 2026\n")
    with pytest.raises(ValueError, match="month"):
        text(date="2026-13-01")


def test_trap_sft_15_disjoint_tool_arguments_gain_no_nulls(tokenizer):
    renderer = Renderer(tokenizer, "chatml")
    for arguments in ({"a": 1}, {"b": [True, {"c": "é"}]}, json.dumps({"d": "2"})):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        (document,) = renderer.render(talk(say("user", "hello"), say("assistant", tool_calls=(call,))))
        (text,) = trained(document, tokenizer)
        body = text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call><|im_end|>")
        expected = json.loads(arguments) if isinstance(arguments, str) else arguments
        assert json.loads(body) == {"name": "f", "arguments": expected}
        assert "null" not in text


def test_trap_sft_15_fingerprint_covers_template_policy_and_tokenizer(tokenizer):
    base = Renderer(tokenizer).fingerprint()
    assert base == Renderer(tokenizer).fingerprint()
    others = [
        Renderer(tokenizer, MARKED),
        Renderer(tokenizer, policy=RenderPolicy(last_turn_only=True)),
        Renderer(tokenizer, policy=RenderPolicy(date="2026-01-01")),
        Renderer(tokenizer, policy=RenderPolicy(template_kwargs={"enable_thinking": False})),
        Renderer(make(tiny.CHATML, special=("<|im_start|>", "<|x|>", "<|im_end|>"))),
    ]
    prints = {base, *(renderer.fingerprint() for renderer in others)}
    assert len(prints) == 1 + len(others)


def test_trap_sft_15_fingerprint_is_the_same_in_another_process(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    code = (
        "import sys; from ptl.data.render import Renderer; from ptl.data.tokenizer import load_tokenizer\n"
        "t = load_tokenizer(sys.argv[1]); t(['a', 'b c'], padding=True, truncation=True, max_length=8)\n"
        "print(Renderer(t).fingerprint())"
    )
    run = forks.run(["-c", code, tmp_path], check=True)
    assert run.stdout.split()[-1] == Renderer(load_tokenizer(tmp_path)).fingerprint()


def test_weights_and_roles(tokenizer):
    conversation = talk(
        say("system", "kind"),
        say("user", "hello", train=0.5),
        say("assistant", "world", train=0),
        say("user", "fox"),
        say("assistant", "dog", train=0.25),
        say("user", "the"),
        say("assistant", "quick"),
    )
    (document,) = Renderer(tokenizer).render(conversation)
    assert trained(document, tokenizer) == ["hello<|im_end|>", "dog<|im_end|>", "quick<|im_end|>"]
    assert sorted(set(document.loss_mask.tolist())) == [0.0, 0.25, 0.5, 1.0]
    last = rendered(tokenizer, conversation, last_turn_only=True)
    assert last == [["hello<|im_end|>", "dog<|im_end|>", "quick<|im_end|>"]]
    plain = chat("hello", "world", "fox", "dog")
    assert rendered(tokenizer, plain, last_turn_only=True) == [["dog<|im_end|>"]]
    everyone = [["hello<|im_end|>", "world<|im_end|>", "fox<|im_end|>", "dog<|im_end|>"]]
    for history in ("inference", "single_pass"):
        assert rendered(tokenizer, plain, train_roles=("user", "assistant"), history=history) == everyone
    assert rendered(tokenizer, plain, train_roles=("user",)) == [["hello<|im_end|>", "fox<|im_end|>"]]


@pytest.mark.parametrize(
    ("reason", "conversation", "policy"),
    [
        ("empty_conversation", Conversation(origin=ORIGIN), {}),
        ("empty_text", Conversation(text="", origin=ORIGIN), {}),
        ("nothing_trained", talk(say("user", "hello")), {}),
        ("nothing_trained", talk(say("user", "a"), say("assistant", "b", train=0)), {}),
        ("bad_weight", talk(say("user", "a"), say("assistant", "b", train=-1)), {}),
        ("tools_unsupported", talk(say("user", "a"), say("assistant", "b"), tools=TOOLS), {}),
        ("tool_calls_unsupported", talk(say("user", "a"), say("assistant", "", tool_calls=(CALL,))), {}),
        ("reasoning_dropped", CASES["reasoning"], {}),
        ("reasoning_dropped", CASES["reasoning"], {"history": "single_pass"}),
    ],
)
def test_refusals_carry_a_stable_reason(tokenizer, reason, conversation, policy):
    error = refusal(tokenizer, conversation, **policy)
    assert error.reason == reason and error.detail and str(error) == f"{reason}: {error.detail}"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.reason, again.detail) == (RenderError, reason, error.detail)


def test_messages_that_a_template_drops_are_refused():
    """Phi-3 prints no tool results; Llama 3.1 prints either text or a call; R1 drops calls beside text."""
    phi = published("phi3")
    turns = (say("user", "a"), say("assistant", "b"), say("tool", "sun"), say("assistant", "c"))
    for history in ("inference", "single_pass"):
        assert refusal(phi, talk(*turns), history=history).reason == "message_dropped"
    llama = published("llama3_1")
    both = talk(say("user", "a"), say("assistant", "let me see", tool_calls=(CALL,)))
    assert refusal(llama, both).reason == "answer_altered"
    bad = {"type": "function", "function": {"name": "f", "arguments": "{not json"}}
    assert refusal(llama, talk(say("user", "a"), say("assistant", tool_calls=(bad,)))).reason == "bad_tool_call"
    r1 = published("deepseek_r1_distill")
    both = talk(say("user", "a"), say("assistant", "<think>\nx\n</think>\n\ny", tool_calls=(CALL,)))
    assert refusal(r1, both).reason == "prompt_not_continued"


def test_no_template_and_bad_templates(tokenizer):
    bare = make(None)
    renderer = Renderer(bare)
    assert renderer.template == "" and renderer.terminators == ()
    error = refusal(bare, chat("hello", "world"))
    assert error.reason == "no_chat_template" and "chatml" in error.detail
    assert refusal(make(None), Conversation(origin=ORIGIN)).reason == "empty_conversation"
    for broken in ("{% for m in messages %}", "{{ raise_exception('no') }}", "{{ messages[9]['content'] + 1 }}"):
        with pytest.raises(ValueError, match="template: it does not print one user question"):
            Renderer(tokenizer, broken)


def test_a_tokenizer_with_a_second_template_for_tools():
    tokenizer = make(None)
    tokenizer.chat_template = {
        "default": tiny.CHATML,
        "tool_use": (FOLDER / "qwen2_5.jinja").read_text(encoding="utf-8"),
    }
    renderer = Renderer(tokenizer)
    (plain,) = renderer.render(CASES["single"])
    (tools,) = renderer.render(CASES["tools"])
    assert "# Tools" not in tokenizer.decode(plain.ids) and "# Tools" in tokenizer.decode(tools.ids)
    prompt = renderer.prompt(CASES["tools"].messages[:1], TOOLS)
    assert tools.ids[: len(prompt)].tolist() == prompt


def test_template_kwargs_move_the_prompt():
    """Without thinking, Qwen3's empty block is part of the prompt and not trained."""
    tokenizer = published("qwen3", bos=None, eos="<|im_end|>")
    kwargs = {"enable_thinking": False}
    assert rendered(tokenizer, CASES["single"], template_kwargs=kwargs) == [["The answer is 4.<|im_end|>"]]


def _random_conversation(rng: random.Random) -> Conversation:
    pieces = [
        "hello", " ", "\n", "\n\n", "été", "🙂🙃", "答え", "[[1,2]]", "<think>", "</think>", "assistant\n", "a  b\t",
        "<|im_end|>", "<|im_start|>user\n", "</s>", "{'a': 1}", "e\u0301", "\u00a0x", "#### 72", "'",
    ]  # fmt: skip
    messages = [say("system", "be kind")] if rng.random() < 0.3 else []
    for turn in range(rng.randint(1, 4)):
        messages.append(say("user", "".join(rng.choices(pieces, k=rng.randint(1, 6)))))
        weight = rng.choice([None, None, 0, 0.5]) if turn else None
        messages.append(say("assistant", "".join(rng.choices(pieces, k=rng.randint(1, 6))), train=weight))
    return talk(*messages)


@pytest.mark.parametrize("template", [tiny.CHATML, MARKED, "im_sep", "smollm2"])
def test_law_2_random_words_of_every_kind(template):
    """Control tokens, tags, white space and wide characters in the words change nothing for the mask."""
    tokenizer = make(None, special=("<|im_start|>", "<|im_sep|>", "<|im_end|>"))
    source = (FOLDER / "smollm2.jinja").read_text(encoding="utf-8") if template == "smollm2" else template
    renderer = Renderer(tokenizer, source)
    rng = random.Random(0)
    conversations = [_random_conversation(rng) for _ in range(150)]
    batch = renderer.render_batch(conversations)
    for conversation, result in zip(conversations, batch):
        assert not isinstance(result, RenderError)
        (document,) = result
        turns = [m for m in conversation.messages if m.role == "assistant" and m.train != 0]
        assert trained(document, tokenizer) == [m.content + "<|im_end|>" for m in turns]
        weights = [1.0 if m.train is None else m.train for m in turns]
        starts = np.flatnonzero(np.diff(document.loss_mask, prepend=0.0) > 0)
        assert document.loss_mask[starts].tolist() == weights
        for index, message in enumerate(conversation.messages):
            if message.role == "assistant" and message.train != 0:
                # An answer that starts with a line feed is parted from its header; a prompt's history is not.
                parted = any(m.role == "assistant" and m.content[0].isspace() for m in conversation.messages[:index])
                prompt = renderer.prompt(conversation.messages[:index])
                assert parted or document.ids[: len(prompt)].tolist() == prompt


def test_batch_equals_one_by_one_and_keeps_refusals_in_place(tokenizer):
    renderer = Renderer(tokenizer, NO_THINK_IN_HISTORY)
    conversations = [
        CASES["multi"],
        talk(say("user", "hello")),
        CASES["think"],
        Conversation(text="hello world", origin=ORIGIN),
        CASES["tools"],
        CASES["single"],
    ]
    batch = renderer.render_batch(conversations)
    assert [isinstance(result, RenderError) for result in batch] == [False, True, False, False, True, False]
    for conversation, result in zip(conversations, batch):
        if isinstance(result, RenderError):
            with pytest.raises(RenderError, match=result.reason):
                renderer.render(conversation)
            continue
        single = renderer.render(conversation)
        assert len(single) == len(result)
        for ours, theirs in zip(single, result):
            assert ours.ids.tolist() == theirs.ids.tolist() and ours.loss_mask.tolist() == theirs.loss_mask.tolist()
    assert renderer.render_batch([]) == []


def test_a_renderer_survives_pickling_and_leaves_the_tokenizer_alone(tokenizer):
    before = (tokenizer.chat_template, tokenizer.backend_tokenizer.to_str())
    renderer = Renderer(tokenizer, "chatml", RenderPolicy(date="2026-11-23"))
    (first,) = renderer.render(CASES["multi"])
    (second,) = pickle.loads(pickle.dumps(renderer)).render(CASES["multi"])
    assert first.ids.tolist() == second.ids.tolist() and first.loss_mask.tolist() == second.loss_mask.tolist()
    assert before == (tokenizer.chat_template, tokenizer.backend_tokenizer.to_str())
