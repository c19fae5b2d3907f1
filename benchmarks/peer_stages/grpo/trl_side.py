"""TRL's GRPOTrainer: with transformers' own generation in the process, its default, or with another of its engines.

What is not TRL's default: ``shuffle_dataset`` is off, so that both sides have the prompts in the same order;
``gradient_checkpointing`` is off, which is faster; temperature, ``top_p`` and ``top_k`` are written out, and draw from
the whole distribution. ``--trl-micro`` is 8, as TRL's is, and the answers of a step are drawn together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peer_stages.grpo import rule
from benchmarks.peer_tools import trl_run
from benchmarks.peer_tools.compare import Measured
from benchmarks.peer_tools.counts import Counts

ENGINES: dict[str, dict[str, Any]] = {
    "hf": {"use_vllm": False},
    "continuous": {"use_vllm": False, "use_transformers_continuous_batching": True},
    "vllm": {"use_vllm": True, "vllm_mode": "colocate"},
}


class CountedGRPO(GRPOTrainer):
    """The trainer, with its tokens and losses written down."""

    def __init__(self, counts: Counts, **kwargs: Any) -> None:
        self.counts = counts
        super().__init__(**kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        # The only place that sees what was drawn and the loss of a micro-batch.
        own = inputs["completion_mask"].sum(1)
        computed = inputs["prompt_mask"].numel() + inputs["completion_mask"].numel()
        self.counts.add(inputs["prompt_mask"].sum(1) + own, own.sum(), computed)
        loss = super()._compute_loss(model, inputs)
        self.counts.add_loss(loss)
        return loss


def settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What GRPOConfig is given, beside where it writes."""
    autocast = spec["dtype"] == "bf16-mixed"
    dtype = "bfloat16" if spec["dtype"] == "bf16" else "float32"
    # A step's rows are answers here.
    given = trl_run.settings({**spec, "batch_rows": spec["step_answers"]}, dtype=dtype, autocast=autocast)
    unknown = ("max_length", "train_sampling_strategy", "use_liger_kernel")
    return {
        **{key: value for key, value in given.items() if key not in unknown},
        "num_generations": spec["answers"],
        "max_completion_length": spec["new_tokens"],
        "shuffle_dataset": False,
        **ENGINES[spec["engine"]],
        **({"vllm_max_model_length": spec["max_length"]} if spec["engine"] == "vllm" else {}),
        "beta": 0.0,
        "loss_type": "dapo",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }


def reward(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """The rule, as the trainer calls a reward."""
    return [rule(messages[0]["content"]) for messages in completions]


def run(spec: Mapping[str, Any]) -> Measured:
    """One measured run in this process."""

    def make(counts: Counts, config: GRPOConfig, callbacks: list[TrainerCallback]) -> GRPOTrainer:
        return CountedGRPO(
            counts,
            model=spec["model"],
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in trl_run.read_lines(spec)]),
            processing_class=AutoTokenizer.from_pretrained(spec["model"]),
            callbacks=callbacks,
        )

    return trl_run.train({**spec, "batch_rows": spec["step_answers"]}, GRPOConfig, settings(spec), make)
