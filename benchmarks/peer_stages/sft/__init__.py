"""Supervised fine-tuning, whole or LoRA: ``ptl`` beside TRL's SFTTrainer.

Both sides load the same folder, take the same rows in the same order, ``batch_rows`` an optimizer step, train on the
assistant's words and end of turn alone, and divide each step's loss by its count of trained tokens. Each renders the
conversations itself; the harness refuses to compare runs whose counts of tokens differ at any step.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peer_tools.compare import Measured
from benchmarks.peer_tools.rows import choose_rows, read_rows, write_rows

PEER = "SFTTrainer"
PEER_PACKAGE = "trl"

SMOLLM2_TRAINING = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's chat template with the marks that ``assistant_only_loss`` needs; it renders to the same text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", choices=("none", "lora"), default="none", help="lora: rank 16, every linear layer")
    parser.add_argument("--lora-dtype", choices=("auto", "base", "fp32"), default="auto", help="ptl's adapter weights")
    parser.add_argument("--max-length", type=int, help="tokens a row may have; default the upper end of --tokens")
    parser.add_argument("--micro", type=int, default=2, help="rows of a forward pass on ptl's side")
    parser.add_argument("--layout", choices=("packed", "padded"), default="packed", help="of ptl's batches")
    parser.add_argument("--trl-micro", type=int, default=8, help="per_device_train_batch_size (TRL's default is 8)")
    parser.add_argument(
        "--trl-bf16",
        choices=("autocast", "weights"),
        default="weights",
        help="with --dtype bf16: fp32 weights under autocast, or weights in bf16",
    )
    parser.add_argument("--trl-checkpointing", action="store_true", help="TRL's default; off here, which is faster")
    parser.add_argument("--trl-liger", action="store_true", help="Liger's layer kernels (CUDA)")
    parser.add_argument("--trl-template", type=Path, help="chat template with {%% generation %%} marks, as TRL needs")


def make_spec(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both sides are told.

    Raises:
        ValueError: settings that do not go together, or too few rows of the wanted length.
    """
    from transformers import AutoTokenizer

    for name in ("micro", "trl_micro"):
        if args.batch_rows % getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--batch-rows {args.batch_rows} is no multiple of {flag} {getattr(args, name)}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    count = args.batch_rows * args.steps
    rows, lengths = choose_rows(
        read_rows(args.rows, args.columns), tokenizer, count=count, tokens=tuple(args.tokens), seed=args.seed
    )
    template = args.trl_template.read_text(encoding="utf-8") if args.trl_template else SMOLLM2_TRAINING
    check_template(tokenizer, template, [row["messages"] for row in rows])
    path = folder / "rows.jsonl"
    digest = write_rows(path, rows)
    return {
        "model": str(args.model),
        "rows": str(path),
        "rows_sha256": digest,
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "folder": str(folder),
        "batch_rows": args.batch_rows,
        "steps": args.steps,
        "warmup": args.warmup,
        "profile": args.profile,
        "adapter": args.adapter,
        "lora_dtype": args.lora_dtype,
        "dtype": args.dtype,
        "device": args.device,
        "seed": args.seed,
        "max_length": args.max_length or args.tokens[1],
        "lr": args.lr if args.lr is not None else (2e-4 if args.adapter == "lora" else 2e-5),
        "weight_decay": args.weight_decay,
        "clip": args.clip,
        "micro": args.micro,
        "layout": args.layout,
        "trl_micro": args.trl_micro,
        "trl_bf16": args.trl_bf16,
        "trl_checkpointing": args.trl_checkpointing,
        "trl_liger": args.trl_liger,
        "trl_template": template,
    }


def check_template(tokenizer: Any, template: str, conversations: list[list[dict[str, str]]]) -> None:
    """Holds the template that marks the assistant's words to the text of the model's own.

    Raises:
        ValueError: a conversation is rendered otherwise.
    """
    for messages in conversations:
        own = tokenizer.apply_chat_template(messages, tokenize=False)
        marked = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
        if own != marked:
            raise ValueError(
                "the training template renders another text than the model's own: give this model's template with "
                "{% generation %} marks by --trl-template FILE"
            )


def run_ptl(spec: Mapping[str, Any]) -> Measured:
    """One run of ``ptl``."""
    from benchmarks.peer_stages.sft.ptl_side import run

    return run(spec)


def run_peer(spec: Mapping[str, Any]) -> Measured:
    """One run of TRL."""
    from benchmarks.peer_stages.sft.trl_side import run

    return run(spec)
