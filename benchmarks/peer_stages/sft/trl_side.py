"""TRL's SFTTrainer as its documentation has it: rows as messages, the loss on the assistant's words alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.peer_tools import trl_run
from benchmarks.peer_tools.compare import Measured
from benchmarks.peer_tools.counts import Counts


class CountedSFT(trl_run.Counted, SFTTrainer):
    """The trainer, with its tokens and losses written down."""


def settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What SFTConfig is given, beside where it writes."""
    autocast = spec["dtype"] == "bf16-mixed" or (spec["dtype"] == "bf16" and spec["trl_bf16"] == "autocast")
    dtype = "bfloat16" if spec["dtype"] == "bf16" and not autocast else "float32"
    return {**trl_run.settings(spec, dtype=dtype, autocast=autocast), "assistant_only_loss": True}


def run(spec: Mapping[str, Any]) -> Measured:
    """One measured run in this process."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

    def make(counts: Counts, config: SFTConfig, callbacks: list[TrainerCallback]) -> SFTTrainer:
        tokenizer = AutoTokenizer.from_pretrained(spec["model"])
        tokenizer.chat_template = spec["trl_template"]
        return CountedSFT(
            counts,
            model=spec["model"],
            args=config,
            train_dataset=Dataset.from_list(trl_run.read_lines(spec)),
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=lora if spec["adapter"] == "lora" else None,
        )

    return trl_run.train(spec, SFTConfig, settings(spec), make)
