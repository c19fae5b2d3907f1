"""Talking to runs and exporting adapters, on tiny models through the commands themselves."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from ptl.apps import chat, export
from ptl.apps.chat import generate_reply
from ptl.apps.reply import choose
from ptl.apps.runs import load_model
from ptl.data.render import Renderer
from ptl.models.export import export as write
from ptl.models.export import largest_logit_change
from ptl.models.names import resolve_model
from ptl.models.spec import LoRA, ModelSpec
from ptl.types import Message
from tests import tiny

ASKED = [Message(role="user", content="hello world")]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tokenizer):
    """A run folder whose export_adapter is a LoRA with weights that are not zero."""
    folder = tmp_path_factory.mktemp("run")
    tiny.save_folder(folder / "base", tokenizer, hidden=128)
    spec = ModelSpec(name=str(folder / "base"), adapter=LoRA(rank=4, init="gaussian"))
    model = spec.build()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    write(model, tokenizer, folder / "run" / "export_adapter", merged=False, spec=spec)
    return folder / "run"


def test_greedy_chat_takes_the_likeliest_token_of_the_full_forward(model_folder, tokenizer):
    model, renderer = load_model(resolve_model(str(model_folder))), Renderer(tokenizer)
    reply = generate_reply(model, renderer, ASKED, temperature=0.0, max_new_tokens=12)
    ids, said = renderer.prompt(ASKED), []
    for _ in range(12):
        token = int(model(torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax())
        if token in renderer.terminators:
            break
        said.append(token)
    assert reply == tokenizer.decode(said, skip_special_tokens=True)


def test_the_same_seed_says_the_same_and_top_p_cuts_the_tail(model_folder, tokenizer):
    model, renderer = load_model(resolve_model(str(model_folder))), Renderer(tokenizer)
    one, two = (generate_reply(model, renderer, ASKED, temperature=1.0, max_new_tokens=8, seed=3) for _ in range(2))
    assert one == two
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -5.0]), torch.Generator().manual_seed(0)
    assert {choose(logits, 1.0, 0.6, generator) for _ in range(50)} == {0}
    assert {choose(logits, 1.0, 0.9, generator) for _ in range(200)} == {0, 1}


def test_law_9_a_merged_export_has_the_live_models_logits(adapter, tmp_path, capsys):
    assert export.main([str(adapter), "--out", str(tmp_path / "merged")]) == 0
    assert "largest logit change" in capsys.readouterr().out
    live, merged = (
        load_model(resolve_model(str(adapter), adapter=True)),
        load_model(resolve_model(str(tmp_path / "merged"))),
    )
    plain = load_model(resolve_model(str(adapter.parent / "base")))
    ids = [[5, 9, 20, 33, 41, 7]]
    assert largest_logit_change(live, merged, ids) < 1e-5
    assert largest_logit_change(live, plain, ids) > 1e-2


def test_chat_answers_once_for_each_message(adapter, tmp_path, capsys):
    export.main([str(adapter), "--out", str(tmp_path / "export")])
    capsys.readouterr()
    said = ["--message", "hello", "--message", "again", "--greedy", "--max-new-tokens", "4"]
    assert chat.main([str(tmp_path), *said]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/model"], "/nowhere/model"),
        ([".", "--message", "x"], "holds no model"),
    ],
)
def test_a_wrong_model_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert chat.main(arguments) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert export.main([arguments[0], "--out", str(tmp_path / "out")]) == 2


def test_a_wrong_temperature_is_one_line(model_folder, capsys):
    assert chat.main([str(model_folder), "--temperature", "-1", "--message", "x"]) == 2
    assert "--temperature" in capsys.readouterr().err


def test_help_answers_without_torch():
    code = "import sys; from ptl.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "fit" in done.stdout and "chat" in done.stdout
    assert time.monotonic() - start < 30
