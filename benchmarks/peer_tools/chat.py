"""What every stage that trains on conversations beside TRL tells both sides: rows, masks, micro-batches, rates."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.peer_tools.rows import choose_rows, join_rows, read_rows, write_rows

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
    """The options of the rows and the micro-batches."""
    parser.add_argument("--max-length", type=int, help="tokens a row may have; default the upper end of --tokens")
    parser.add_argument("--micro", type=int, default=2, help="rows of a forward pass on ptl's side")
    parser.add_argument("--layout", choices=("packed", "padded"), default="packed", help="of ptl's batches")
    parser.add_argument("--join", action="store_true", help="put rows together to such of --tokens tokens")
    parser.add_argument("--compile", action="store_true", help="ptl compiles the layers of its models")
    parser.add_argument("--checkpointing", action="store_true", help="ptl recomputes its layers in the backward pass")
    parser.add_argument("--trl-micro", type=int, help="per_device_train_batch_size; default TRL's 8, or --batch-rows")
    parser.add_argument("--trl-checkpointing", action="store_true", help="TRL's default; off here, which is faster")
    parser.add_argument(
        "--trl-liger",
        choices=("off", "on", "both"),
        default="off",
        help="Liger's kernels (CUDA); both: two sides, beside one of ptl",
    )
    parser.add_argument("--trl-template", type=Path, help="chat template with {%% generation %%} marks, as TRL needs")


def make_spec(args: argparse.Namespace, folder: Path, *, lr: float) -> dict[str, Any]:
    """The part of a stage's spec that both sides need whatever the loss; the rows are written to ``folder``.

    Arguments:
        args: with the options of ``add_arguments`` and of the command.
        folder: for the rows.
        lr: learning rate where ``--lr`` gives none.

    Raises:
        ValueError: settings that do not go together, or too few rows of the wanted length.
    """
    from transformers import AutoTokenizer

    trl_micro = min(8, args.batch_rows) if args.trl_micro is None else args.trl_micro
    for flag, micro in (("--micro", args.micro), ("--trl-micro", trl_micro)):
        if args.batch_rows % micro:
            raise ValueError(f"--batch-rows {args.batch_rows} is no multiple of {flag} {micro}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    count = args.batch_rows * args.steps
    read, tokens = read_rows(args.rows, args.columns), tuple(args.tokens)
    if args.join:
        read = join_rows(read, tokenizer, tokens=tokens, seed=args.seed)
    rows, lengths = choose_rows(read, tokenizer, count=count, tokens=tokens, seed=args.seed)
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
        "dtype": args.dtype,
        "device": args.device,
        "seed": args.seed,
        "max_length": args.max_length or args.tokens[1],
        "lr": args.lr if args.lr is not None else lr,
        "weight_decay": args.weight_decay,
        "clip": args.clip,
        "micro": args.micro,
        "layout": args.layout,
        "compile": args.compile,
        "checkpointing": args.checkpointing,
        "trl_micro": trl_micro,
        "trl_checkpointing": args.trl_checkpointing,
        "trl_liger": args.trl_liger == "on",
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
