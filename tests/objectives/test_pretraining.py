"""Pre-training from scratch: a tokenizer and a model of one's own text, through the recipe and the command line."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl import cli
from ptl.data.module import ChatDataModule, Preparation
from ptl.data.sources import Source
from tests.objectives.law import WORDS

RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "pretrain.yaml"
WINDOW = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus whose sentences repeat, in documents of 3 to 300 words, and a tokenizer trained on it."""
    root = tmp_path_factory.mktemp("pretraining")
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=8)) + "." for _ in range(8)]
    texts = [" ".join(rng.choices(sentences, k=rng.choice((1, 2, 5, 30)))) for _ in range(60)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["tokens", "train", str(root / "text.jsonl"), "--out", str(root / "tokenizer"), "--size", "320"]
    assert cli.main(command) == 0
    return root


def module(folder, **settings) -> ChatDataModule:
    return ChatDataModule(
        [Source(path=str(folder / "text.jsonl"))],
        tokenizer=str(folder / "tokenizer"),
        max_length=WINDOW,
        truncation="split",
        preparation=Preparation(cache_dir=str(folder / "cache"), num_proc=1),
        **settings,
    )


def test_law_8_no_document_longer_than_the_window_is_lost(folder):
    """The windows of the file, in order, hold each token of each document, and packs of them are full."""
    data = module(folder, pack_to=4 * WINDOW)
    data.prepare()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    rows = data.prepared_rows("train").rows.with_format("numpy")
    found: dict[int, list[int]] = {}
    for row in (rows[i] for i in range(len(rows))):
        ids = row["ids"].tolist()
        assert len(ids) <= WINDOW and np.array_equal(row["spans"], [1, len(ids)])
        found[int(row["line"])] = [*found.get(int(row["line"]), ids[:1]), *ids[1:]]
    assert [found[line] for line in sorted(found)] == expected
    assert max(map(len, expected)) > 5 * WINDOW
    summary = data.summary()["train"]
    assert summary["utilisation"] > 0.95 and summary["tokens"] == sum(row["length"] for row in rows)


def test_law_8_windows_of_one_document_are_on_one_side_of_the_split(folder):
    data = module(folder, val_fraction=0.3)
    data.prepare()
    lines = np.asarray(data.prepared_rows("train").rows["line"])
    sides = {part: set(lines[data._parts[part].units.rows(np.arange(n))[0]]) for part in ("train", "val")
             for n in [len(data._parts[part].units)]}  # fmt: skip
    assert not sides["train"] & sides["val"] and len(sides["train"] | sides["val"]) == 60


def fit(folder, name: str, steps: int, *more: str) -> Path:
    keys = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "model_type": "llama", "max_position_embeddings": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    command = [
        "fit", "-c", str(RECIPE), "--run.dir", str(folder / name), "--model.policy.name", str(folder / "tokenizer"),
        "--model.policy.config_overrides", json.dumps(keys), "--data.train", f"[{{path: {folder}/text.jsonl}}]",
        "--data.max_length", str(WINDOW), "--data.pack_to", str(2 * WINDOW), "--data.preparation.num_proc", "1",
        "--data.preparation.cache_dir", str(folder / "cache"), "--data.val_fraction", "0.1",
        "--model.optimizer.lr", "0.01", "--model.schedule.kind", "constant", "--trainer.accelerator", "cpu",
        "--trainer.precision", "32-true", "--trainer.max_epochs", "20", "--trainer.max_steps", str(steps),
        "--trainer.accumulate_grad_batches", "1", "--trainer.log_every_n_steps", "1",
        "--trainer.enable_progress_bar", "false", *more,
    ]  # fmt: skip
    assert cli.main(command) == 0
    return folder / name


def test_a_model_from_scratch_learns_a_small_corpus(folder):
    run = fit(folder, "learns", 30)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[0] == pytest.approx(np.log(320), abs=0.2)  # it begins as ignorant as it should be
    assert losses[-1] < 0.5 * losses[0]
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    ids = torch.tensor([tokenizer("the quick brown fox")["input_ids"]])
    assert model(ids, labels=ids).loss.item() < losses[0]


def test_law_6_a_model_from_scratch_that_was_stopped_ends_with_the_same_weights(folder):
    whole = load_file(fit(folder, "whole", 6) / "export" / "model.safetensors")
    run = fit(folder, "cut", 3)
    cut = load_file(fit(folder, "cut", 6, "--run.resume", "auto") / "export" / "model.safetensors")
    assert run == folder / "cut" and whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
