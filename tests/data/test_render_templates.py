"""The loss mask on the templates of published models: trained text is the assistant's words and ends, exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import pytest

from ptl.data.render import Renderer, RenderError, RenderPolicy
from tests.data.chat_cases import CASES, make, published, rendered, trained

HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WORLD, DOG = "<think>\nsay world\n</think>\n\nworld", "<think>\nsay dog\n</think>\n\ndog"
EMPTY = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Row:
    """What a template trains: ``end`` closes each turn; ``cases`` overrides the plain expectation.

    A case's value is the list of documents, each the list of its trained texts, or the reason of the refusal.
    """

    end: str
    bos: str | None = "<s>"
    eos: str = "</s>"
    lead: str = ""
    cases: dict = field(default_factory=dict)

    def expected(self, case: str) -> list[list[str]] | str:
        if case in self.cases:
            return self.cases[case]
        words = {
            "single": ["The answer is 4."],
            "multi": ["[[1,2],[3,4]]", "hello"],
            "system": ["world"],
            "think": [WORLD, DOG],
        }
        if case in words:
            return [[self.lead + word + self.end for word in words[case]]]
        return {"tools": "tools_unsupported", "reasoning": "reasoning_dropped"}[case]


IM, EOT, DS = "<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>"
APART = [[WORLD + IM], [DOG + IM]]
DEEPSEEK = Row(
    DS,
    "<｜begin▁of▁sentence｜>",
    DS,
    cases={
        "single": "prompt_not_continued",
        "multi": "prompt_not_continued",
        "system": "prompt_not_continued",
        "think": [["say world\n</think>\n\nworld" + DS], ["say dog\n</think>\n\ndog" + DS]],
        "reasoning": [["say world\n</think>\n\nworld" + DS], ["say dog\n</think>\n\ndog" + DS]],
    },
)
FINAL = "<|channel|>final<|message|>"
TABLE = {
    "smollm2": Row(IM, "<|im_start|>", IM),
    "qwen2_5": Row(IM, None, IM, cases={"tools": [[HERMES + IM, "It is sunny." + IM]]}),
    "qwen2_5_training": Row(IM, None, IM, cases={"tools": [[HERMES + IM, "It is sunny." + IM]]}),
    "qwen3": Row(
        IM,
        None,
        IM,
        lead=EMPTY,
        cases={
            "multi": [[EMPTY + "[[1,2],[3,4]]" + IM], [EMPTY + "hello" + IM]],
            "tools": [[EMPTY + HERMES + IM], [EMPTY + "It is sunny." + IM]],
            "think": APART,
            "reasoning": APART,
        },
    ),
    "qwen3_5_think": Row(
        IM,
        None,
        IM,
        lead="\n</think>\n\n",
        cases={
            "multi": [["\n</think>\n\n[[1,2],[3,4]]" + IM], ["\n</think>\n\nhello" + IM]],
            "tools": [
                [
                    "\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
                    "</function>\n</tool_call>" + IM,
                    "\n</think>\n\nIt is sunny." + IM,
                ]
            ],
            "think": [["say world\n</think>\n\nworld" + IM], ["say dog\n</think>\n\ndog" + IM]],
            "reasoning": [["say world\n</think>\n\nworld" + IM], ["say dog\n</think>\n\ndog" + IM]],
        },
    ),
    "llama3": Row(EOT, "<|begin_of_text|>", "<|end_of_text|>"),
    "llama3_1": Row(
        EOT,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        cases={"tools": [['{"name": "weather", "parameters": {"city": "Paris"}}' + EOT, "It is sunny." + EOT]]},
    ),
    "mistral_v3": Row(
        "</s>",
        lead=" ",
        cases={
            "tools": [
                [
                    '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "call12345"}]</s>',
                    " It is sunny.</s>",
                ]
            ]
        },
    ),
    "mistral_tekken": Row("</s>"),
    "gemma": Row("<end_of_turn>", "<bos>", "<eos>", cases={"system": "template_error"}),
    "gemma3": Row("<end_of_turn>", "<bos>", "<eos>"),
    "phi3": Row("<|end|>", "<s>", "<|endoftext|>"),
    "phi4": Row(IM, None, IM),
    "deepseekv3": DEEPSEEK,
    "deepseek_r1_distill": DEEPSEEK,
    "cohere": Row("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": Row("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "zephyr": Row("</s>"),
    "olmo2": Row("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "lfm2_2_5_v2": Row(
        IM,
        "<|startoftext|>",
        IM,
        cases={
            "tools": [["<|tool_call_start|>[weather(city='Paris')]<|tool_call_end|>" + IM, "It is sunny." + IM]],
            "think": APART,
            "reasoning": [["<think>say world</think>world" + IM], ["<think>say dog</think>dog" + IM]],
        },
    ),
    "gptoss": Row(
        "<|return|>",
        "<|startoftext|>",
        "<|return|>",
        lead=FINAL,
        cases={
            "multi": [[FINAL + "[[1,2],[3,4]]<|return|>"], [FINAL + "hello<|return|>"]],
            "tools": [
                [
                    ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
                    FINAL + "It is sunny.<|return|>",
                ]
            ],
            "think": [[f"{FINAL}{WORLD}<|return|>"], [f"{FINAL}{DOG}<|return|>"]],
            "reasoning": [
                [f"<|channel|>analysis<|message|>say world<|end|><|start|>assistant{FINAL}world<|return|>"],
                [f"<|channel|>analysis<|message|>say dog<|end|><|start|>assistant{FINAL}dog<|return|>"],
            ],
        },
    ),
    "glm4moe": Row("", cases=dict.fromkeys(CASES, "no_end_token")),
    "chatml": Row(
        IM, None, IM, cases={"tools": [[HERMES + IM, "It is sunny." + IM]], "reasoning": [[WORLD + IM, DOG + IM]]}
    ),
    "im_sep": Row(IM, None, IM, cases={"reasoning": [[WORLD + IM, DOG + IM]]}),
}


def tokenizer_of(name: str):
    row = TABLE[name]
    if name in ("chatml", "im_sep"):
        return make(None, special=("<|im_start|>", "<|im_sep|>", "<|im_end|>"), bos=row.bos, eos=row.eos)
    return published(name, bos=row.bos, eos=row.eos)


def renderer_of(name: str, **policy) -> Renderer:
    template = name if name in ("chatml", "im_sep") else None
    return Renderer(tokenizer_of(name), template, RenderPolicy(**policy))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TABLE)
def test_law_2_trained_text_is_the_assistants_words_and_ends(name, case):
    renderer, conversation, expected = renderer_of(name), CASES[case], TABLE[name].expected(case)
    if isinstance(expected, str):
        with pytest.raises(RenderError) as refusal:
            renderer.render(conversation)
        assert refusal.value.reason == expected
        return
    documents = renderer.render(conversation)
    assert [trained(document, renderer.tokenizer) for document in documents] == expected
    for document in documents:
        ids, mask = document.ids.tolist(), document.loss_mask
        assert len(ids) == len(mask) and document.ids.dtype == "int32" and mask.dtype == "float32"
        assert mask[0] == 0
        ends = [t for t in range(len(ids)) if mask[t] and (t + 1 == len(ids) or not mask[t + 1])]
        assert all(ids[t] in renderer.terminators for t in ends)


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in TABLE for case in CASES if not isinstance(TABLE[name].expected(case), str)],
)
def test_law_2_training_starts_with_the_ids_of_the_prompt(name, case):
    """Each trained turn follows exactly what inference feeds before it."""
    renderer, conversation = renderer_of(name), CASES[case]
    turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    documents = renderer.render(conversation)
    starts = [
        document.ids[:t].tolist()
        for document in documents
        for t in range(1, len(document.ids))
        if document.loss_mask[t] and not document.loss_mask[t - 1]
    ]
    assert starts == [renderer.prompt(conversation.messages[:i], conversation.tools) for i in turns]


@pytest.mark.parametrize("case", ["single", "multi", "system"])
@pytest.mark.parametrize("name", [name for name in TABLE if name != "glm4moe"])
def test_one_document_is_what_apply_chat_template_gives(name, case):
    renderer = renderer_of(name, history="single_pass")
    messages = [message.as_dict() for message in CASES[case].messages]
    try:
        (document,) = renderer.render(CASES[case])
    except RenderError as refusal:
        refused = {("gemma", "system"), ("mistral_v3", "system"), ("gptoss", "multi")}
        assert (name, case) in refused, refusal
        return
    expected = renderer.tokenizer.apply_chat_template(
        messages,
        chat_template=renderer.template,
        return_dict=False,
        strftime_now=lambda form: datetime(2025, 1, 1).strftime(form),
    )
    assert document.ids.tolist() == expected


@pytest.mark.parametrize(
    "name", [name for name, row in TABLE.items() if row.cases.get("think", "") and name != "glm4moe"]
)
def test_single_pass_trains_the_conversation_as_printed(name):
    """Rewritten history stays in one document: reasoning of earlier turns is neither printed nor trained."""
    if name == "gptoss":
        with pytest.raises(RenderError, match="no_end_token: message 2: once other turns follow"):
            rendered(tokenizer_of(name), CASES["think"], history="single_pass")
        return
    (texts,) = rendered(tokenizer_of(name), CASES["think"], history="single_pass")
    end = TABLE[name].end
    last = {"qwen3_5_think": "say dog\n</think>\n\ndog", "deepseekv3": "dog", "deepseek_r1_distill": "dog"}.get(
        name, DOG
    )
    assert texts == ["world" + end, last + end]


def test_a_mistral_system_prompt_is_in_every_document():
    """The template prints it before the last user turn only, and not at all once an answer follows."""
    renderer = renderer_of("mistral_v3")
    (document,) = renderer.render(CASES["system"])
    assert renderer.tokenizer.decode(document.ids) == "<s>[INST] Be kind.\n\nhello[/INST] world</s>"


def test_deepseek_answers_without_reasoning_need_single_pass():
    for name in ("deepseekv3", "deepseek_r1_distill"):
        assert rendered(tokenizer_of(name), CASES["multi"], history="single_pass") == [
            ["[[1,2],[3,4]]" + DS, "hello" + DS]
        ]


def test_deepseek_tool_arguments_are_text():
    conversation = CASES["tools"]
    renderer = renderer_of("deepseekv3", history="single_pass")
    (document,) = renderer.render(type(conversation)(messages=conversation.messages, origin=conversation.origin))
    assert trained(document, renderer.tokenizer) == [
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' + DS,
        "It is sunny." + DS,
    ]


def test_the_notes_template_prints_exactly_the_notes_example():
    conversation = CASES["single"]
    renderer = renderer_of("im_sep")
    system = type(conversation.messages[0])(role="system", content="You are a helpful assistant")
    question = type(system)(role="user", content="what is 2+2 ?")
    answer = type(system)(role="assistant", content="The answer is 4")
    (document,) = renderer.render(type(conversation)(messages=(system, question, answer), origin=conversation.origin))
    assert renderer.tokenizer.decode(document.ids) == (
        "<|im_start|>system<|im_sep|>You are a helpful assistant<|im_end|>"
        "<|im_start|>user<|im_sep|>what is 2+2 ?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>The answer is 4<|im_end|>"
    )
    assert trained(document, renderer.tokenizer) == ["The answer is 4<|im_end|>"]
    assert renderer.tokenizer.decode(renderer.prompt((system, question))).endswith("<|im_start|>assistant<|im_sep|>")
