"""TRL's RewardTrainer as its documentation has it: conversational pairs with an explicit prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer

from benchmarks.peer_tools import trl_run
from benchmarks.peer_tools.compare import Measured
from benchmarks.peer_tools.counts import Counts


class CountedReward(RewardTrainer):
    """The trainer, with its tokens, pairs and losses written down."""

    def __init__(self, counts: Counts, **kwargs: Any) -> None:
        self.counts = counts
        super().__init__(**kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        lengths = inputs["attention_mask"].sum(1)
        pairs = lengths.new_tensor(len(lengths) // 2)
        self.counts.add(lengths, pairs, inputs["input_ids"].numel())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.counts.add_loss(loss)
        return loss


def settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What RewardConfig is given, beside where it writes."""
    autocast = spec["dtype"] == "bf16-mixed"
    dtype = "bfloat16" if spec["dtype"] == "bf16" else "float32"
    # A step's rows are pairs here.
    given = trl_run.settings({**spec, "batch_rows": spec["step_pairs"]}, dtype=dtype, autocast=autocast)
    return {key: value for key, value in given.items() if key != "use_liger_kernel"}


def run(spec: Mapping[str, Any]) -> Measured:
    """One measured run in this process."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])

    def make(counts: Counts, config: RewardConfig, callbacks: list[TrainerCallback]) -> RewardTrainer:
        lines = Path(spec["pair_rows"]).read_text(encoding="utf-8").splitlines()
        return CountedReward(
            counts,
            model=spec["scored"],
            args=config,
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=AutoTokenizer.from_pretrained(spec["scored"]),
            callbacks=callbacks,
            peft_config=lora if spec["adapter"] == "lora" else None,
        )

    return trl_run.train({**spec, "batch_rows": spec["step_pairs"]}, RewardConfig, settings(spec), make)
