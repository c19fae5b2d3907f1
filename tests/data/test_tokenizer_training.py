"""A trained tokenizer gives every text back, is the same each time, and keeps its special tokens."""

import json
import random

import pytest
from transformers import AutoTokenizer

from ptl.data.render import Renderer
from ptl.data.token_sets import SETS
from ptl.data.tokenizer import resolve_template
from ptl.data.tokenizer_training import texts_of, train_tokenizer
from tests import forks, tiny
from tests.data.chat_cases import chat, trained
from tests.ranks import ROOT


def trained_here():
    tokens = [*SETS["chat"], *SETS["tools"]]
    return train_tokenizer(tiny.CORPUS, 320, tokens=tokens, template=resolve_template("im_sep"))


@pytest.fixture(scope="module")
def tokenizer():
    return trained_here()


def test_any_text_comes_back(tokenizer):
    generator = random.Random(0)
    letters = [chr(i) for i in (*range(256), 0x20AC, 0x4E00, 0x1F600, 0xFDD1, 0x10FFFF)]
    for length in (0, 1, 5, 200):
        for _ in range(20):
            text = "".join(generator.choices(letters, k=length))
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token is None


def test_the_size_counts_all_tokens_and_special_ones_are_last(tokenizer):
    assert len(tokenizer) == 320 and tokenizer.eos_token_id == 0 and tokenizer.pad_token_id == 0
    names = [token.text for token in (*SETS["chat"], *SETS["tools"])]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(309, 320))
    assert len(tokenizer(" the quick brown fox")["input_ids"]) < 12 < len(" the quick brown fox")
    assert len(tokenizer("2025")["input_ids"]) == 4
    (document,) = Renderer(tokenizer).render(chat("hello", "<SEARCH-TOOL>fox</SEARCH-TOOL>"))
    assert trained(document, tokenizer) == ["<SEARCH-TOOL>fox</SEARCH-TOOL><|im_end|>"]


def test_another_process_with_other_threads_trains_the_same(tokenizer, tmp_path):
    code = (
        "import sys; from tests.data import test_tokenizer_training as t\nt.trained_here().save_pretrained(sys.argv[1])"
    )
    for threads in ("1", "4"):
        folder = tmp_path / threads
        env = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": threads, "PATH": "", "HF_HUB_OFFLINE": "1"}
        forks.run(["-c", code, folder], env, cwd=ROOT, check=True)
    tokenizer.save_pretrained(tmp_path / "here")
    files = {(tmp_path / name / "tokenizer.json").read_bytes() for name in ("1", "4", "here")}
    assert len(files) == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "1").chat_template == tokenizer.chat_template


def test_texts_of_rows_and_of_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("x", "y")) + "{broken\n")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    refused: list[str] = []
    texts = [list(texts_of(str(tmp_path / name), refused)) for name in ("a.txt", "b.jsonl", "c.jsonl")]
    assert texts == [["one\n", "two\n"], ["x", "y"], ["q", "a"]]
    assert len(refused) == 1 and "b.jsonl:3: broken_json" in refused[0]


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--size is 100, below the 257"):
        train_tokenizer(["a"], 100)
    with pytest.raises(ValueError, match="the files hold no text"):
        train_tokenizer([], 300)
    (tmp_path / "bad.txt").write_bytes(b"ok\n\xff\xfe")
    with pytest.raises(ValueError, match="bad.txt is not UTF-8"):
        list(texts_of(str(tmp_path / "bad.txt"), []))
