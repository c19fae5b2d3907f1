"""Reinforcement learning with a rule as reward: ``ptl`` beside TRL's GRPOTrainer, both drawing in their own process.

Both sides load the same folder, take the same prompts in the same order, ``batch_rows`` prompts an optimizer step, draw
``group`` answers to each at temperature 1 from the whole distribution, judge them with ``rule`` and make one update
with the loss of DAPO, without a divergence from a reference. No answer can end: what ends a turn is a token that the
tokenizer knows and the model's table does not have. So every answer has ``new_tokens`` tokens on both sides, and the
harness refuses to compare runs whose counts of tokens differ at any step. What is drawn differs, as the two draw from
different streams of random numbers; the answers of a step all have one length, so that its loss is 0 on both sides but
for rounding, and says nothing of the gradient.

*Useful tokens* are those of each answer with its prompt and *trained tokens* the answers' own, so that ``ratio`` is one
of answers trained a second.

``--engine`` is what draws on both sides: ``hf``, the policy's own pass, which is TRL's default; ``continuous``,
transformers' continuous batching; or ``vllm``, colocated, where it is installed. The peak of memory is of the process
that trains. TRL's vLLM lives in it, ours in a process of its own: with ``vllm`` the ``memory_ratio`` says nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peer_tools import chat
from benchmarks.peer_tools.compare import Measured

PEER = "GRPOTrainer"
PEER_PACKAGE = "trl"
END = "<|never|>"
"""Ends a turn of the assistant; no model has a row for it."""
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
"""Sizes of a Llama of 19 million weights with the vocabulary of SmolLM2."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", choices=("small", "model"), default="small", help="small: 19M random weights")
    parser.add_argument("--group", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument(
        "--engine", choices=("hf", "continuous", "vllm"), default="hf", help="what draws, on both sides"
    )
    chat.add_arguments(parser)
    parser.set_defaults(batch_rows=2, micro=1)


def make_spec(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both sides are told; model and prompts are written to ``folder``.

    Raises:
        ValueError: settings that do not go together, or too few rows of the wanted length.
    """
    if args.group < 2:
        raise ValueError(f"--group must be 2 or more, got {args.group}")
    answers, micro = args.batch_rows * args.group, args.trl_micro
    args.trl_micro = None
    spec = chat.make_spec(args, folder, lr=1e-6)
    chosen = micro or min(8, answers)
    if answers % chosen:
        raise ValueError(f"--trl-micro {chosen} does not divide the {answers} answers of a step")
    how: dict[str, Any] = {"template": spec["trl_template"], "small": args.policy == "small", "seed": args.seed}
    policy = write_policy(args.model, folder / "policy", **how)
    conversations = [json.loads(line) for line in Path(spec["rows"]).read_text(encoding="utf-8").splitlines()]
    prompts = folder / "prompts.jsonl"
    write_prompts(conversations, prompts)
    if args.policy == "small":
        args.model = Path("llama-19m")
    return {
        **spec,
        "model": str(policy),
        "rows": str(prompts),
        "format": "prompt",
        "trl_micro": chosen,
        "answers": args.group,
        "step_answers": answers,
        "new_tokens": args.new_tokens,
        "engine": args.engine,
        "max_length": spec["max_length"] + args.new_tokens,
    }


def write_policy(model: Path, folder: Path, *, template: str, small: bool, seed: int) -> Path:
    """The model, or a small one with its vocabulary and random weights, with a tokenizer that has ``END``.

    Arguments:
        model: folder.
        folder: is made.
        template: of chats, with the marks of what the assistant says.
        small: random weights of ``SMALL``.
        seed: of the weights.

    Raises:
        ValueError: the model has a row for the token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir()
    tokenizer, config = AutoTokenizer.from_pretrained(model), AutoConfig.from_pretrained(model)
    end = tokenizer.eos_token
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": end})
    if tokenizer.eos_token_id < config.vocab_size:
        raise ValueError(f"{model} has a row for id {tokenizer.eos_token_id}, which is to be one that no answer has")
    marked = re.compile(r"{% generation %}(.*?){% endgeneration %}", re.DOTALL)
    tokenizer.chat_template = marked.sub(lambda said: said[1].replace(end, END), template)
    tokenizer.save_pretrained(folder)
    config.eos_token_id = tokenizer.eos_token_id
    if small:
        torch.manual_seed(seed)
        for name, value in SMALL.items():
            setattr(config, name, value)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        return folder
    config.save_pretrained(folder)
    for weights in model.glob("*.safetensors*"):
        shutil.copyfile(weights, folder / weights.name)
    return folder


def write_prompts(conversations: list[Any], path: Path) -> None:
    """The turns since the last answer but one, as rows that both sides read: an earlier answer would end with ``END``,
    for which the model has no row."""
    with path.open("w", encoding="utf-8") as file:
        for row in conversations:
            *turns, last = row["messages"]
            spoken = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
            prompt = turns[spoken[-1] + 1 :] if spoken else turns
            file.write(json.dumps({"prompt": prompt, "answer": last["content"]}) + "\n")


def rule(text: str) -> float:
    """The reward: the share of an answer's characters that are vowels. It costs nothing, and differs from answer to
    answer whatever the model."""
    return sum(character in "aeiou" for character in text) / max(1, len(text))


def run_ptl(spec: Mapping[str, Any]) -> Measured:
    """One run of ``ptl``."""
    from benchmarks.peer_stages.grpo.ptl_side import run

    return run(spec)


def run_peer(spec: Mapping[str, Any]) -> Measured:
    """One run of TRL."""
    from benchmarks.peer_stages.grpo.trl_side import run

    return run(spec)
