"""TRL's SFTTrainer as its documentation has it: rows as messages, the loss on the assistant's words alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.peer_tools.compare import Measured
from benchmarks.peer_tools.counts import Counts
from benchmarks.peer_tools.machine import StepClock, peak_memory


class Steps(TrainerCallback):
    """Marks the end of each optimizer step."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.mark()


class Counted(SFTTrainer):
    """The trainer, with its tokens and losses written down."""

    def __init__(self, counts: Counts, **kwargs: Any) -> None:
        self.counts = counts
        super().__init__(**kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        trained = (inputs["labels"][:, 1:] != -100).sum()
        self.counts.add(inputs["attention_mask"].sum(1), trained, inputs["input_ids"].numel())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.counts.add_loss(loss)
        return loss


def settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What SFTConfig is given, beside where it writes."""
    autocast = spec["dtype"] == "bf16-mixed" or (spec["dtype"] == "bf16" and spec["trl_bf16"] == "autocast")
    return {
        "model_init_kwargs": {"dtype": "bfloat16" if spec["dtype"] == "bf16" and not autocast else "float32"},
        "bf16": autocast,
        "per_device_train_batch_size": spec["trl_micro"],
        "gradient_accumulation_steps": spec["batch_rows"] // spec["trl_micro"],
        "gradient_checkpointing": spec["trl_checkpointing"],
        "use_liger_kernel": spec["trl_liger"],
        "max_steps": spec["steps"],
        "train_sampling_strategy": "sequential",
        "assistant_only_loss": True,
        "max_length": spec["max_length"],
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": spec["weight_decay"],
        "max_grad_norm": spec["clip"],
        "seed": spec["seed"],
    }


def run(spec: Mapping[str, Any]) -> Measured:
    """One measured run in this process."""
    device = spec["device"]
    clock, counts = StepClock(device), Counts(spec["batch_rows"] // spec["trl_micro"])
    start_bytes = peak_memory(device)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.chat_template = spec["trl_template"]
    lines = Path(spec["rows"]).read_text(encoding="utf-8").splitlines()
    config = SFTConfig(
        output_dir=str(Path(spec["folder"]) / "trl"),
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        save_strategy="no",
        **settings(spec),
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Counted(
        counts,
        model=spec["model"],
        args=config,
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=tokenizer,
        callbacks=[Steps(clock)],
        peft_config=lora if spec["adapter"] == "lora" else None,
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return counts.measured(clock, trainer.model, start_bytes=start_bytes, settings=settings(spec))  # pyright: ignore
