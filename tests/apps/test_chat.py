"""``ptl chat`` as a person meets it: streamed pieces, turns, stops, limits."""

import io

import pytest
import torch

from ptl.apps import chat
from ptl.apps.chat import generate_reply, stream_reply
from ptl.apps.runs import load_model
from ptl.data.render import Renderer
from ptl.models.names import resolve_model
from ptl.types import Message

ASKED = [Message(role="user", content="hello world")]
GREEDY = {"temperature": 0.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(resolve_model(str(model_folder)))


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


def test_pieces_come_one_by_one_and_make_the_answer(model, renderer):
    pieces = list(stream_reply(model, renderer, ASKED, **GREEDY))
    assert len(pieces) > 3 and "".join(pieces) == generate_reply(model, renderer, ASKED, **GREEDY)


class Says(torch.nn.Module):
    """A model that says fixed ids, whatever it reads; what a chat reads of one is its logits and its configuration."""

    def __init__(self, model, ids):
        super().__init__()
        self.model, self.ids, self.said = model, ids, 0
        self.config, self.generation_config = model.config, model.generation_config

    def forward(self, **inputs):
        out = self.model(**inputs)
        out.logits[:, -1] = -100.0
        out.logits[0, -1, self.ids[self.said]] = 100.0
        self.said += 1
        return out


def test_a_character_of_several_tokens_is_streamed_whole(model, renderer):
    """A byte-level vocabulary splits an accented letter, which must not come out as a replacement mark."""
    text = "Où ? ça 🦊"
    ids = renderer.tokenizer(text)["input_ids"]
    assert len(ids) > len(text)
    speaker = Says(model, [*ids, renderer.terminators[0]])
    pieces = list(stream_reply(speaker, renderer, ASKED, temperature=0.0, max_new_tokens=99))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("end", ["template", "model"])
def test_the_templates_end_and_the_models_own_stop_the_answer(end, model, renderer):
    said = renderer.tokenizer("the quick")["input_ids"]
    own = 40
    assert own not in said
    speaker = Says(model, [*said, renderer.terminators[0] if end == "template" else own, *said])
    speaker.generation_config = type(model.generation_config)(eos_token_id=[own])
    assert generate_reply(speaker, renderer, ASKED, temperature=0.0, max_new_tokens=99) == "the quick"


def test_the_models_own_sampling_values_are_not_used(model, renderer, monkeypatch):
    before = generate_reply(model, renderer, ASKED, **GREEDY)
    for field, value in {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0, "top_k": 3}.items():
        monkeypatch.setattr(model.generation_config, field, value)
    assert generate_reply(model, renderer, ASKED, **GREEDY) == before


def test_an_answer_ends_where_the_context_does(model, renderer):
    size = model.config.max_position_embeddings
    prompt = len(renderer.prompt(ASKED))
    ids = renderer.tokenizer("a" * 3)["input_ids"]
    speaker = Says(model, [ids[0]] * (size + 9))
    generate_reply(speaker, renderer, ASKED, temperature=0.0, max_new_tokens=10_000)
    assert speaker.said == size - prompt
    long = [Message(role="user", content="hello " * size)]
    with pytest.raises(ValueError, match="start a new one"):
        generate_reply(model, renderer, long, **GREEDY)


def run(monkeypatch, capsys, folder, typed: str, *options: str) -> list[str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert chat.main([str(folder), "--greedy", "--max-new-tokens", "8", *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_piped_lines_are_turns_and_reset_forgets(model_folder, monkeypatch, capsys):
    real, told = stream_reply, []

    def listened(model, renderer, messages, **sampling):
        told.append([message.role for message in messages])
        yield from real(model, renderer, messages, **sampling)

    monkeypatch.setattr(chat, "stream_reply", listened)
    said = "hello\n\nagain\n/reset\nhello\n/exit\nnever said\n"
    assert run(monkeypatch, capsys, model_folder, said, "--system", "Be brief.")
    assert told == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]


def test_ctrl_c_stops_the_answer_and_not_the_program(model_folder, monkeypatch, capsys):
    told = []

    def interrupted(model, renderer, messages, **sampling):
        told.append([(m.role, m.content) for m in messages])
        yield "half an"
        if len(told) == 1:
            raise KeyboardInterrupt
        yield " answer"

    monkeypatch.setattr(chat, "stream_reply", interrupted)
    assert run(monkeypatch, capsys, model_folder, "one\ntwo\n") == ["half an", "half an answer"]
    assert told[1] == [("user", "one"), ("assistant", "half an"), ("user", "two")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "-1"], "--temperature must be 0 or more"),
        (["--top-p", "0"], "--top-p must be above 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
        (["--template", "nothing"], "template: got 'nothing'"),
        (["--message", "hello " * 600], "start a new one"),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(options, words, model_folder, capsys):
    assert chat.main([str(model_folder), "--message", "x", *options]) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
