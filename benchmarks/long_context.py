"""Memory and time of a training step on one long row, by the number of ranks that share it.

``python -m benchmarks.long_context`` takes a tiny Llama forward and backward over a packed row of 8,192 tokens, with
``model.sequence_parallel`` 1 and 2, each rank a process with one thread over gloo, and appends a line for each number
of ranks to ``benchmarks/results/long_context.json``. ``peak_mib`` is the largest increase over what a rank held before;
``kept_mib`` are the bytes that autograd keeps for the backward pass, each storage once and parameters not among them:
the activations. Seconds are processor seconds, as ranks may share cores. Numbers are those of the rank that has most.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys

from benchmarks import record
from benchmarks.memory import MIB, increase

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def measure(size: int, tokens: int, documents: int) -> dict[str, float]:
    """What one rank of ``size`` holds and takes in a step; all ranks call it."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    import ptl.models.attention  # noqa: F401  registers the implementation
    from ptl.models.heads import lm_loss
    from ptl.models.sequence_parallel import join_group
    from ptl.types import TokenBatch

    torch.set_num_threads(1)
    sequence = None
    if size > 1:
        dist.init_process_group("gloo")
        sequence = join_group(size)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, max_position_embeddings=tokens)  # pyright: ignore[reportArgumentType]
    model = LlamaForCausalLM._from_config(config, attn_implementation="ptl_packed").train()
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def row(length: int) -> TokenBatch:
        each = length // documents
        return TokenBatch(
            input_ids=torch.randint(0, SHAPE["vocab_size"], (1, length)),
            loss_mask=torch.ones(1, length),
            position_ids=torch.arange(each).repeat(documents)[None],
            document_ids=torch.arange(documents).repeat_interleave(each)[None],
            sources=torch.zeros(documents, dtype=torch.int64),
            window_weight=torch.tensor(float(length), dtype=torch.float64),
            cu_seqlens=torch.arange(0, length + 1, each, dtype=torch.int32),
        )

    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step(batch: TokenBatch) -> None:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = lm_loss(model, batch, sequence=sequence).fused.total
        loss.backward()

    step(row(16 * documents))  # loads the libraries, and makes the gradients
    found = increase(step, (row(tokens),), "cpu")
    return {**found, "kept_mib": sum(kept.values()) / MIB}


def run(size: int, tokens: int, documents: int, timeout: float) -> dict[str, float]:
    """The most of every rank's numbers.

    Raises:
        RuntimeError: a rank failed, with the end of what it wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.long_context", "--one", json.dumps([size, tokens, documents])]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **world, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    results = []
    try:
        for rank in ranks:
            out, error = rank.communicate(timeout=timeout)
            if rank.returncode:
                raise RuntimeError(f"a rank of {size} failed:\n{error[-2000:]}")
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for rank in ranks:
            rank.kill()
    return {key: max(result[key] for result in results) for key in results[0]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_context", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="of the row (default 8192)")
    parser.add_argument("--documents", type=int, default=4, help="packed in it, of equal length (default 4)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="that share it, beside one alone (default 2)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one run (default 300)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    alone = run(1, options.tokens, options.documents, options.timeout)
    for size in options.ranks:
        shared = run(size, options.tokens, options.documents, options.timeout)
        line = record.append(
            "long_context",
            {
                "stage": "sft",
                "variant": "full-fp32",
                "peer": "the same row on one rank",
                "pairs": 1,
                "ranks": size,
                "tokens": options.tokens,
                "documents": options.documents,
                "kept_mib": round(shared["kept_mib"], 1),
                "peer_kept_mib": round(alone["kept_mib"], 1),
                "kept_ratio": round(shared["kept_mib"] / alone["kept_mib"], 4),
                "peak_mib": round(shared["peak_mib"], 1),
                "peer_peak_mib": round(alone["peak_mib"], 1),
                "memory_ratio": round(shared["peak_mib"] / alone["peak_mib"], 4),
                "seconds": round(shared["seconds"], 3),
                "peer_seconds": round(alone["seconds"], 3),
                "ratio": round(alone["seconds"] / shared["seconds"], 3),
            },
        )
        print(
            f"{size} ranks, {options.tokens} tokens: a rank keeps {line['kept_mib']} MiB against "
            f"{line['peer_kept_mib']} ({line['kept_ratio']:.1%}), at its peak {line['peak_mib']} against "
            f"{line['peer_peak_mib']} ({line['memory_ratio']:.1%})"
        )


if __name__ == "__main__":
    main()
