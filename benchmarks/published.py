"""Published training speeds, with their source and what is known of their configuration.

Which rows are modelled was decided by their configuration alone, before any was predicted; ``EXCLUDED`` has the rest.
A row's cluster (devices of a node, ports) is a fact of the row; the rates of a device are those of ``plan_rates`` for
all its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ptl.functional.model_size import ModelSize, model_size
from ptl.functional.plan_job import Job, Strategy

FSDP = Strategy("fsdp", 3)
"""Weights, gradients and states cut over the ranks as in ZeRO-3, fetched by the framework without Python hooks."""


def llama(hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, **more: Any) -> ModelSize:
    """A model of Llama's form, from the numbers of its config."""
    return model_size(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "intermediate_size": inner,
            "vocab_size": vocab,
            "tie_word_embeddings": False,
            **more,
        }
    )


def mpt(hidden: int, layers: int, heads: int) -> ModelSize:
    """A model of MPT's form: plain MLP of 4 widths, tied embeddings of 50,432 entries."""
    config = {"d_model": hidden, "n_layers": layers, "n_heads": heads, "vocab_size": 50432}
    return model_size({"model_type": "mpt", "expansion_ratio": 4, "tie_word_embeddings": True, **config})


LLAMA_8B = llama(4096, 32, 32, 8, 14336, 128256)
LLAMA_70B = llama(8192, 80, 64, 8, 28672, 128256)
LLAMA2_13B = llama(5120, 40, 40, 40, 13824, 32000)
KEMPNER_13B = llama(5120, 40, 40, 8, 17920, 128256)
QWEN2_7B = llama(3584, 28, 28, 4, 18944, 152064, model_type="qwen2")
QWEN3_06B = llama(1024, 28, 16, 8, 3072, 151936, model_type="qwen3", head_dim=128, tie_word_embeddings=True)
MPT_1B, MPT_7B, MPT_70B = mpt(2048, 24, 16), mpt(4096, 32, 32), mpt(8192, 80, 64)

TITAN = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_A100 = "torchtitan docs/performance.md"
FOUNDRY = "llm-foundry scripts/train/benchmarking/README.md"
NEMO = "docs.nvidia.com/nemo/automodel performance-summary, 2025-10"
KEMPNER = "KempnerForge benchmarks/mfu_scaling/mfu_scaling_2026-04-05.md"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published figure.

    Attributes:
        name: what ran.
        device: a key of ``plan_rates.DEVICES``.
        job: its configuration.
        tokens_per_second: published, of one device.
        source: where.
        section: it is in the table of this project's survey, on which the target is set; the others are from the same
            sources, for a second device and more sizes.
        assumed: what the source does not say.
        cluster: rates that are facts of the cluster.
    """

    name: str
    device: str
    job: Job
    tokens_per_second: float
    source: str
    section: bool = True
    strategy: Strategy = FSDP
    assumed: str = ""
    cluster: dict[str, float] = field(default_factory=dict)


def _job(model: ModelSize, sequence: int, micro: int, world: int, **more: Any) -> Job:
    return Job(model=model, sequence=sequence, micro_batch=micro, world=world, **{"fused": True, **more})


_MPT_A100 = {"network": 25e9}
ROWS: tuple[Published, ...] = (
    Published(
        name="Llama-3.1-8B, 8 GPUs, eager",
        device="h100-500w",
        job=_job(LLAMA_8B, 8192, 2, 8, checkpointing="selective", fused=False),
        tokens_per_second=5762,
        source=TITAN,
    ),
    Published(
        name="Llama-3.1-8B, 8 GPUs, compiled",
        device="h100-500w",
        job=_job(LLAMA_8B, 8192, 2, 8, checkpointing="selective"),
        tokens_per_second=6667,
        source=TITAN,
    ),
    Published(
        name="Llama-3.1-8B, 128 GPUs, eager",
        device="h100-500w",
        job=_job(LLAMA_8B, 8192, 2, 128, checkpointing="selective", fused=False),
        tokens_per_second=5605,
        source=TITAN,
    ),
    Published(
        name="Llama-3.1-8B, 128 GPUs, compiled",
        device="h100-500w",
        job=_job(LLAMA_8B, 8192, 2, 128, checkpointing="selective"),
        tokens_per_second=6514,
        source=TITAN,
    ),
    Published(
        name="MPT-1B, 8 GPUs", device="h100", job=_job(MPT_1B, 2048, 14, 8), tokens_per_second=45455, source=FOUNDRY
    ),
    Published(
        name="MPT-7B, 8 GPUs", device="h100", job=_job(MPT_7B, 2048, 6, 8), tokens_per_second=10643, source=FOUNDRY
    ),
    Published(
        name="MPT-7B, 128 GPUs",
        device="h100",
        job=_job(MPT_7B, 2048, 6, 128),
        tokens_per_second=10475,
        source=FOUNDRY,
        assumed="the micro-batch of the 8 GPUs",
    ),
    Published(
        name="MPT-7B, 512 GPUs",
        device="h100",
        job=_job(MPT_7B, 2048, 6, 512),
        tokens_per_second=9670,
        source=FOUNDRY,
        assumed="the micro-batch of the 8 GPUs",
    ),
    Published(
        name="MPT-70B, 64 GPUs",
        device="h100",
        job=_job(MPT_70B, 2048, 8, 64, accumulate=4, checkpointing="full"),
        tokens_per_second=1039,
        source=FOUNDRY,
    ),
    Published(
        name="Llama-3-70B, 64 GPUs",
        device="h100",
        job=_job(LLAMA_70B, 4096, 1, 64, document=8192, accumulate=4, checkpointing="full"),
        tokens_per_second=867,
        source=NEMO,
        assumed="2 GPUs share a sequence of 8,192 (context parallel): half its tokens each; full recomputation",
    ),
    Published(
        name="LoRA Llama-3-8B, 1 GPU",
        device="h100",
        job=_job(LLAMA_8B, 4096, 2, 1, rank=8, accumulate=16),
        tokens_per_second=12473,
        source=NEMO,
        strategy=Strategy("single"),
        assumed="rank 8",
    ),
    Published(
        name="LoRA Qwen2.5-7B, 1 GPU",
        device="h100",
        job=_job(QWEN2_7B, 4096, 2, 1, rank=8, accumulate=16),
        tokens_per_second=14110,
        source=NEMO,
        strategy=Strategy("single"),
        assumed="rank 8",
    ),
    Published(
        name="Qwen3-0.6B, 1 GPU",
        device="h100",
        job=_job(QWEN3_06B, 8192, 1, 1, checkpointing="full", fused=False),
        tokens_per_second=26005,
        source="prime-rl benchmarks/baselines, 1xh100 sft full 8192",
        strategy=Strategy("single"),
        assumed="micro-batch 1; attention at FlashAttention-2's rate, where it ran FlashAttention-3",
    ),
    Published(
        name="Llama-3 8B, 1 GPU",
        device="h200",
        job=_job(LLAMA_8B, 4096, 4, 1, accumulate=2, checkpointing="full"),
        tokens_per_second=10471,
        source=KEMPNER,
        strategy=Strategy("single"),
    ),
    Published(
        name="Llama-3 8B, 4 GPUs",
        device="h200",
        job=_job(LLAMA_8B, 4096, 4, 4, accumulate=2, checkpointing="full", per_node=4),
        tokens_per_second=9746,
        source=KEMPNER,
    ),
    Published(
        name="Llama-3 13B, 8 GPUs of 2 nodes, eager",
        device="h200",
        job=_job(KEMPNER_13B, 4096, 4, 8, accumulate=4, checkpointing="full", per_node=4, fused=False),
        tokens_per_second=4426,
        source=KEMPNER,
        section=False,
    ),
    Published(
        name="Llama-3-8B, 64 GPUs",
        device="a100",
        job=_job(LLAMA_8B, 8192, 1, 64, checkpointing="selective", fused=False),
        tokens_per_second=2973,
        source=TITAN_A100,
        section=False,
    ),
    Published(
        name="Llama-3-70B, 64 GPUs",
        device="a100",
        job=_job(LLAMA_70B, 8192, 1, 64, checkpointing="full", fused=False),
        tokens_per_second=331,
        source=TITAN_A100,
        section=False,
    ),
    Published(
        name="Llama-2-13B, 64 GPUs",
        device="a100",
        job=_job(LLAMA2_13B, 4096, 2, 64, fused=False),
        tokens_per_second=2162,
        source=TITAN_A100,
        section=False,
    ),
    Published(
        name="MPT-7B, 8 GPUs",
        device="a100",
        job=_job(MPT_7B, 2048, 6, 8, accumulate=2),
        tokens_per_second=4641,
        source=FOUNDRY,
        section=False,
    ),
    Published(
        name="MPT-70B, 64 GPUs",
        device="a100",
        job=_job(MPT_70B, 2048, 8, 64, accumulate=4, checkpointing="full"),
        tokens_per_second=410,
        source=FOUNDRY,
        section=False,
        cluster=_MPT_A100,
    ),
)

EXCLUDED: tuple[tuple[str, str], ...] = (
    ("Llama-3.1-8B with fp8, 8 and 128 GPUs; Llama-2-7B and -70B with fp8", "fp8 products, which ptl does not have"),
    ("Llama-3.1-70B, 256 GPUs (fp8, tensor parallel 8)", "tensor parallel and fp8"),
    ("LoRA Llama-3-70B, 8 and 16 GPUs", "tensor parallel 2"),
    ("Llama-3 8B, 8 GPUs of 2 nodes", "tensor parallel 4, although the survey's table does not say so"),
    ("GRPO Qwen3-30B-A3B, 32 GPUs", "experts, and generation by another engine"),
    ("LoRA Llama-2-7B, 21.3 GB and 14.1 GB", "memory, not speed"),
)
