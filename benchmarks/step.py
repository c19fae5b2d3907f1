"""What a bare training step makes of a GPU: tokens a second, MFU and memory at a shape, layers compiled or not.

    python -m benchmarks.step --shape 1.5B --documents 4 --tokens 4096 [--compile] [--dtype bf16-mixed]

Random weights and ids, one pack of documents of slightly different lengths, every token trained: ``ptl``'s attention,
head and loss, clipping, and fused AdamW, without a trainer around them (``benchmarks.overhead`` measures that). One
line is added to ``benchmarks/results/step.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.peer_tools.shapes import SHAPES


def lengths(documents: int, tokens: int) -> list[int]:
    """Lengths of a pack's documents, the longest of ``tokens``."""
    return [max(2, tokens - 37 * number) for number in range(documents)]


def pack(sizes: Sequence[int], vocabulary: int, device: str) -> Any:
    """A packed batch of random ids in which everything is trained."""
    import numpy as np
    import torch

    from ptl.types import TokenBatch

    places = torch.cat([torch.arange(size) for size in sizes])
    trained = (places > 0).nonzero()[:, 0]
    batch = TokenBatch(
        input_ids=torch.randint(0, vocabulary, (1, len(places))),
        loss_mask=(places > 0).float()[None],
        position_ids=places[None],
        document_ids=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None],
        sources=torch.zeros(len(sizes), dtype=torch.int64),
        window_weight=torch.tensor(float(len(trained)), dtype=torch.float64),
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
        trained=trained,
        host_trained=trained.numpy(),
        host_lengths=np.array(sizes),
    )
    return batch.on(device)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Steps of one model in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.peer_tools.machine import matmul_rate, peak_memory, synchronize
    from ptl.callbacks.shape import model_shape
    from ptl.functional.flops import Work, peak_flops, training_flops
    from ptl.models.attention import NAME
    from ptl.models.compiled import compile_layers
    from ptl.models.heads import lm_loss

    device, mixed = options.device, options.dtype == "bf16-mixed"
    sizes = dict(SHAPES[options.shape]) | ({"num_hidden_layers": options.layers} if options.layers else {})
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes, max_position_embeddings=32_768)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=dtype).train()
    if options.compile:
        compile_layers(model.get_decoder())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    documents = lengths(options.documents, options.tokens)
    batch = pack(documents, config.vocab_size, device)
    work = Work(tokens=sum(documents), head_tokens=sum(documents) - len(documents), pairs=sum(n * n for n in documents))
    flops = training_flops(model_shape(model), work)
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=mixed, cache_enabled=False):
            total = lm_loss(model, batch).fused.total
        (total / batch.window_weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[2:])
    kind = "fp32" if options.dtype == "fp32" else "bf16"
    peak, rate = peak_flops(record.device_name(device), kind), matmul_rate(device, getattr(torch, _TORCH[kind]))
    return {
        "variant": f"full-{options.dtype}{'-compiled' if options.compile else ''}",
        "shape": options.shape,
        "layers": config.num_hidden_layers,
        "documents": len(documents),
        "tokens": sum(documents),
        "first_step_seconds": round(seconds[0], 2),
        "step_seconds": round(step, 4),
        "tokens_per_second": round(sum(documents) / step, 1),
        "mfu": None if peak is None else round(flops / step / peak, 4),
        "share_of_matmul": round(flops / step / rate, 4),
        "peak_gb": round(peak_memory(device) / 1e9, 2),
        "loss": round(float(total) / float(batch.window_weight), 5),
    }


_TORCH = {"fp32": "float32", "bf16": "bfloat16"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1.5B")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--documents", type=int, default=4, help="of a pack (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="of its longest document (default %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "bf16-mixed"), default="bf16-mixed")
    parser.add_argument("--compile", action="store_true", help="as policy.compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", type=int, default=8, help="the first two are not counted (default %(default)s)")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    if options.steps < 3:
        parser.error(f"--steps must be 3 or more, got {options.steps}")
    found = measure(options)
    record.append("step", {"stage": "sft", **found}, device=options.device, folder=options.results)
    print(", ".join(f"{key} {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
