"""A model of random weights and rows of full length, both from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LINE = "the model reads one word after another and learns which of them comes next in a line of plain text"
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
ROLE = 16
"""Tokens that a turn's role and its marks take at most."""


def make_model(folder: Path, *, layers: int, hidden: int, vocab: int = 16384) -> int:
    """Saves a Llama with a byte-level tokenizer and a chat template; returns the count of its parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<|start|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.num_parameters()


def write_rows(folder: Path, tokenizer: str, *, sequence: int, count: int, seed: int = 0) -> dict[str, str]:
    """Rows that fill a pack of ``sequence`` tokens each: one text, or one ranking of two answers.

    Arguments:
        folder: for the files.
        tokenizer: folder or hub name, whose tokens are counted.
        sequence: tokens of a pack.
        count: rows.
        seed: of the words.

    Returns:
        The file of each objective.
    """
    from transformers import AutoTokenizer

    own, rng = AutoTokenizer.from_pretrained(tokenizer), random.Random(seed)

    def words(tokens: int) -> str:
        text = " ".join(rng.choices(LINE.split(), k=tokens))
        return own.decode(own(text, add_special_tokens=False)["input_ids"][:tokens])

    folder.mkdir(parents=True, exist_ok=True)
    answer = sequence // 2 - sequence // 8 - 2 * ROLE - 4
    texts = [{"text": words(sequence + 8)} for _ in range(count)]
    rankings: list[dict[str, Any]] = [
        {
            "prompt": [{"role": "user", "content": words(sequence // 8)}],
            "completions": [words(answer), words(answer)],
            "ranks": [1, 2],
        }
        for _ in range(count)
    ]
    for name, rows in (("text", texts), ("rankings", rankings)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text, ranked = str(folder / "text.jsonl"), str(folder / "rankings.jsonl")
    return {"sft": text, "distillation": text, "reward": ranked, "dpo": ranked}
