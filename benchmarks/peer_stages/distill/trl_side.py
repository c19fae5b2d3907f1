"""TRL's GKDTrainer without rollouts (``lmbda=0``), on the forward KL (``beta=0``).

Of TRL 1.16's trainers it is the one that distils best off policy. ``DistillationTrainer``, the stable one, makes its
divergence in chunks but always trains on what the student has just written: it has no ``lmbda``. ``experimental.gold``
runs the same two forward passes and the same loss as GKD, but shuffles the rows in an order of its own and pads each
optimizer step's rows to the longest of them before it splits them, where GKD pads a micro-batch.

In TRL's favour: no gradient checkpointing, rows tokenised before the clock starts, and TRL's collator for supervised
fine-tuning, since GKD's own trains the text after the end of the turn too and the last answer alone. Not in its favour:
``--trl-micro`` is 8 by default, as TRL's is. Rows of a micro-batch are padded to the longest and all their logits are
held, so that on a CPU 1 is both faster and smaller: a claim against TRL at its best is made with ``--trl-micro 1``.

GKD never passes its temperature to the loss, which is taken at 1. In fp32 the two sides' losses differ by some 1e-5 of
their size: log-softmax over a vocabulary of 49,152 is that far from fp64 on either side, while padding changes nothing.
GKD takes it in the type of the logits, so that bf16 weights give bf16 log-probabilities and a loss that differs more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from benchmarks.peer_tools import trl_run
from benchmarks.peer_tools.compare import Measured
from benchmarks.peer_tools.counts import Counts


class CountedGKD(trl_run.Counted, GKDTrainer):
    """The trainer, with its tokens and losses written down."""


def settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What GKDConfig is given, beside where it writes."""
    dtype = "bfloat16" if spec["dtype"] == "bf16" else "float32"
    return {
        **trl_run.settings(spec, dtype=dtype, autocast=spec["dtype"] == "bf16-mixed"),
        "teacher_model_init_kwargs": {"dtype": dtype},
        "lmbda": 0.0,
        "beta": 0.0,
    }


def labelled(tokenizer: Any, messages: list[dict[str, str]], *, template: str, length: int) -> dict[str, list[int]]:
    """Ids of a conversation, and labels that are -100 but on the assistant's words and end of turn.

    Arguments:
        tokenizer: of both models.
        messages: the conversation.
        template: marks what the assistant says.
        length: tokens that are kept, from the first.
    """
    out = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = out["input_ids"][:length]
    return {"input_ids": ids, "labels": [i if own else -100 for i, own in zip(ids, out["assistant_masks"])]}


def run(spec: Mapping[str, Any]) -> Measured:
    """One measured run in this process."""

    def make(counts: Counts, config: GKDConfig, callbacks: list[TrainerCallback]) -> GKDTrainer:
        tokenizer = AutoTokenizer.from_pretrained(spec["student"])
        how = {"template": spec["trl_template"], "length": spec["max_length"]}
        rows = [labelled(tokenizer, row["messages"], **how) for row in trl_run.read_lines(spec)]
        return CountedGKD(
            counts,
            model=spec["student"],
            teacher_model=spec["teacher"],
            args=config,
            data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    return trl_run.train(spec, GKDConfig, settings(spec), make, teacher=spec["teacher"])
