"""Supervised fine-tuning, whole or LoRA: ``ptl`` beside TRL's SFTTrainer.

Both sides load the same folder, take the same rows in the same order, ``batch_rows`` an optimizer step, train on the
assistant's words and end of turn alone, and divide each step's loss by its count of trained tokens. Each renders the
conversations itself; the harness refuses to compare runs whose counts of tokens differ at any step.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peer_stages.breakdown import breakdown
from benchmarks.peer_stages.compare import Measured
from benchmarks.peer_stages.machine import StepClock, matmul_rate, peak_memory
from benchmarks.peer_stages.rows import choose_rows, read_rows, write_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    parser.add_argument("--micro", type=int, default=8, help="rows of a forward pass on ptl's side")
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


def _flops(shape: Any, useful: list[int], trained: list[int], pairs: list[int]) -> list[float]:
    from ptl.functional.flops import Work, training_flops

    return [training_flops(shape, Work(tokens=t, head_tokens=n, pairs=p)) for t, n, p in zip(useful, trained, pairs)]


def _rates(device: str) -> dict[str, float]:
    import torch

    return {"fp32": matmul_rate(device, torch.float32), "bf16": matmul_rate(device, torch.bfloat16)}


class _Counts:
    """Losses and tokens of micro-batches, kept on their device until the run is over and then summed by step."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.values: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self.losses: list[Tensor] = []

    def add(self, lengths: Tensor, trained: Tensor, computed: int) -> None:
        """Lengths of the micro-batch's rows, its trained tokens, and the tokens that go through the model."""
        self.values.append((lengths.sum(), trained, lengths.square().sum(), computed))

    def measured(self, clock: StepClock, policy: nn.Module, start_bytes: int, settings: dict[str, Any]) -> Measured:
        from ptl.callbacks.shape import model_shape

        peak = peak_memory(clock.device)
        useful, trained, pairs, computed = (
            self._by_step([float(row[column]) for row in self.values]) for column in range(4)
        )
        shape = model_shape(policy)
        return Measured(
            seconds=clock.seconds,
            cpu_seconds=clock.cpu_seconds,
            losses=self._by_step([float(loss) for loss in self.losses]),
            useful_tokens=[int(n) for n in useful],
            trained_tokens=[int(n) for n in trained],
            computed_tokens=[int(n) for n in computed],
            flops=_flops(shape, [int(n) for n in useful], [int(n) for n in trained], [int(n) for n in pairs]),
            peak_bytes=peak,
            start_bytes=start_bytes,
            matmul_rates=_rates(clock.device),
            settings=settings,
        )

    def _by_step(self, values: list[float]) -> list[float]:
        return [sum(values[i : i + self.accumulate]) for i in range(0, len(values), self.accumulate)]


# ---- TRL ----


def run_peer(spec: Mapping[str, Any]) -> Measured:
    """TRL's SFTTrainer as its documentation has it: rows as messages, loss on the assistant alone."""
    import json

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device, accumulate = spec["device"], spec["batch_rows"] // spec["trl_micro"]
    clock, counts = StepClock(device), _Counts(accumulate)
    start_bytes = peak_memory(device)

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.mark()

    class Counted(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            trained = (inputs["labels"][:, 1:] != -100).sum()
            counts.add(inputs["attention_mask"].sum(1), trained, inputs["input_ids"].numel())
            loss = super().training_step(model, inputs, num_items_in_batch)
            counts.losses.append(loss.detach())
            return loss

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.chat_template = spec["trl_template"]
    lines = Path(spec["rows"]).read_text(encoding="utf-8").splitlines()
    settings = _trl_settings(spec)
    config = SFTConfig(
        output_dir=str(Path(spec["folder"]) / "trl"),
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        save_strategy="no",
        **settings,
    )
    trainer = Counted(
        model=spec["model"],
        args=config,
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=tokenizer,
        callbacks=[Steps()],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        if spec["adapter"] == "lora"
        else None,
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return counts.measured(clock, trainer.model, start_bytes, settings)  # pyright: ignore[reportArgumentType]


def _trl_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    autocast = spec["dtype"] == "bf16-mixed" or (spec["dtype"] == "bf16" and spec["trl_bf16"] == "autocast")
    weights = "bfloat16" if spec["dtype"] == "bf16" and not autocast else "float32"
    return {
        "model_init_kwargs": {"dtype": weights},
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


# ---- ptl ----


def run_ptl(spec: Mapping[str, Any]) -> Measured:
    """``ptl fit`` as a recipe sets it up, without the run folder: objective, data module and trainer."""
    import lightning as L
    import torch

    from ptl.data.module import ChatDataModule
    from ptl.data.parts import Preparation
    from ptl.data.sources import Source
    from ptl.models.optimizer import Optimizer, Schedule
    from ptl.models.spec import LoRA, ModelSpec
    from ptl.objectives.lora import LoRASFT
    from ptl.objectives.sft import SFT

    device, accumulate = spec["device"], spec["batch_rows"] // spec["micro"]
    clock, counts = StepClock(device), _Counts(accumulate)
    start_bytes = peak_memory(device)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if spec["profile"] else None

    class Steps(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            clock.start()

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if profiler is not None:
                profiler.stop()

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            lengths = torch.bincount(batch.document_ids[batch.document_ids >= 0])
            counts.add(lengths, (batch.loss_mask != 0).sum(), batch.input_ids.numel())

        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            counts.losses.append(outputs["loss"])
            if (batch_idx + 1) % accumulate == 0:
                clock.mark()
                if profiler is not None and len(clock.seconds) == spec["warmup"]:
                    profiler.start()

    adapter = LoRA(rank=16, alpha=32, dtype=spec["lora_dtype"]) if spec["adapter"] == "lora" else None
    policy = ModelSpec(name=spec["model"], dtype="bf16" if spec["dtype"] == "bf16" else "fp32", adapter=adapter)
    L.seed_everything(spec["seed"], verbose=False)
    objective = (LoRASFT if adapter else SFT)(
        policy,
        optimizer=Optimizer(lr=spec["lr"], betas=(0.9, 0.999), weight_decay=spec["weight_decay"]),
        schedule=Schedule(kind="constant", warmup=0),
    )
    folder = Path(spec["folder"]) / "ptl"
    data = ChatDataModule(
        [Source(path=spec["rows"], format="messages")],
        max_length=spec["max_length"],
        layout=spec["layout"],
        micro_batch_size=spec["micro"],
        shuffle=False,
        preparation=Preparation(cache_dir=str(folder / "cache")),
    )
    data.bind(view=objective.view, tokenizer=policy.name)
    trainer = L.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed" if spec["dtype"] == "bf16-mixed" else "32-true",
        max_steps=spec["steps"],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=spec["clip"] or None,
        callbacks=[Steps()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=10,
        default_root_dir=str(folder),
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(objective, data)
    settings = {
        "precision": str(trainer.precision),
        "dtype": policy.dtype,
        "adapter_dtype": adapter.dtype if adapter else None,
        "layout": spec["layout"],
        "micro_batch_size": spec["micro"],
        "accumulate_grad_batches": accumulate,
    }
    if profiler is not None:
        settings["profile"] = breakdown(profiler.events() or [], sum(clock.seconds[spec["warmup"] :]))
    return counts.measured(clock, objective.policy, start_bytes, settings)
