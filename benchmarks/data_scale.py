"""Preparing a million conversations: memory, speed beside TRL's own preparation, and the second start.

    python -m benchmarks.data_scale prepare [--rows FILE.jsonl ...] [--count 1000000] [--peer-count 60000] [--pairs 3]

The rows are made from real conversations (by default those of ``make demo``) by drawing several of their exchanges into
one, so that almost no two rows are equal and their lengths are as ragged as those of real chats. Both sides read the
same JSONL file, with the same tokenizer, template and number of processes, each run in a process of its own with empty
caches, alternating. TRL's side is ``SFTTrainer._prepare_dataset`` itself, on ``datasets.load_dataset("json")``, with
``assistant_only_loss`` and a template that carries the ``{% generation %}`` marks it needs; the counts of tokens and of
trained tokens of both must agree. ``cpu_ratio`` compares processor time, which a busy machine distorts less than the
wall clock. ``peak_gb`` is the largest sum of the resident sizes of all processes of a side, a page that several share
counted for each; ``memory_ratio`` is of proportional sizes, where it is counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import record

DEMO = [f"assets/demo/{name}.jsonl" for name in ("chats", "english", "french")]
TOKENIZER = "assets/smollm2-135m-instruct"
MAX_LENGTH = 1024
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# ---- rows ----


def exchanges(files: Sequence[str]) -> list[list[dict[str, str]]]:
    """Every user turn with the assistant turn that answers it, of conversations in the messages format."""
    found = []
    for name in files:
        for line in Path(name).read_text(encoding="utf-8").splitlines():
            turns = json.loads(line)["messages"]
            for first, second in pairwise(turns):
                if (first["role"], second["role"]) == ("user", "assistant"):
                    found.append([{key: turn[key] for key in ("role", "content")} for turn in (first, second)])
    if not found:
        raise SystemExit(
            f"no exchange of a user and an assistant in {list(files)}; run `make demo` first, or give --rows"
        )
    return found


def write_rows(path: Path, files: Sequence[str], count: int, seed: int = 0) -> None:
    """``count`` conversations of 2 to 12 drawn exchanges, of up to 2,000 characters."""
    draw, known = random.Random(seed), exchanges(files)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns: list[dict[str, str]] = []
            size = 0
            for _ in range(draw.randint(2, 12)):
                pair = draw.choice(known)
                size += sum(len(turn["content"]) for turn in pair)
                if turns and size > 2000:
                    break
                turns += pair
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


# ---- the two sides, each in a process of its own ----


def ptl_side(path: str, tokenizer_name: str, num_proc: int, folder: str) -> dict[str, Any]:
    """Prepares, or opens what is prepared; seconds, rows, tokens and trained tokens."""
    from ptl.data.prepare import prepare
    from ptl.data.render import Renderer
    from ptl.data.sources import Source
    from ptl.data.tokenizer import load_tokenizer
    from ptl.data.views import ChatView

    renderer = Renderer(load_tokenizer(tokenizer_name, template=TEMPLATE))
    cpu, start = cpu_seconds(), time.perf_counter()
    how: dict[str, Any] = {"max_length": MAX_LENGTH, "truncation": "keep_start", "num_proc": num_proc, "quiet": True}
    prepared = prepare([Source(path=path)], view=ChatView(), renderer=renderer, cache_dir=folder, **how)
    seconds = time.perf_counter() - start
    used = cpu_seconds() - cpu
    (entry,) = prepared.audit.sources
    middle = prepared.rows[len(prepared.rows) // 2]
    assert len(middle["ids"]) == prepared.lengths[len(prepared.rows) // 2]
    counts = {"rows": entry.rows, "tokens": entry.tokens, "trained_tokens": entry.trained_tokens}
    return {"seconds": seconds, "cpu_seconds": used, **counts}


def trl_side(path: str, tokenizer_name: str, num_proc: int, folder: str) -> dict[str, Any]:
    """The same by TRL: seconds with and without reading the file."""
    from datasets import Dataset, disable_progress_bars, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    tokenizer.chat_template = TEMPLATE
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape))
    arguments = SFTConfig(
        output_dir=f"{folder}/out",
        max_length=MAX_LENGTH,
        assistant_only_loss=True,
        dataset_num_proc=num_proc,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=Dataset.from_list([{"messages": pair}] * 4), processing_class=tokenizer
    )
    cpu, start = cpu_seconds(), time.perf_counter()
    dataset = load_dataset("json", data_files=path, split="train", cache_dir=f"{folder}/cache")
    loaded = time.perf_counter() - start
    prepared: Any = trainer._prepare_dataset(dataset, tokenizer, arguments, False, None, "train")
    seconds, used = time.perf_counter() - start, cpu_seconds() - cpu
    tokens = trained = 0
    for batch in prepared.select_columns(["labels"]).with_format("numpy").iter(2000):
        tokens += sum(len(labels) for labels in batch["labels"])
        trained += sum(int((labels != -100).sum()) for labels in batch["labels"])
    return {
        "seconds": seconds,
        "cpu_seconds": used,
        "seconds_without_reading": seconds - loaded,
        "rows": len(prepared),
        "tokens": tokens,
        "trained_tokens": trained,
    }


def cpu_seconds() -> float:
    """Processor time of this process and of those it started that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measured(side: str, path: Path, tokenizer: str, num_proc: int, folder: Path) -> dict[str, Any]:
    """Runs a side in a process of its own and adds its peak memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.data_scale", "side", side, str(path), tokenizer, str(num_proc)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, text=True, env=environment)
    peaks = {"rss": 0, "pss": 0}
    watcher = threading.Thread(target=watch, args=(process.pid, peaks), daemon=True)
    watcher.start()
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the {side} side failed with code {process.returncode}")
    watcher.join()
    return {**json.loads(out.splitlines()[-1]), "peak_bytes": peaks["rss"], "peak_proportional": peaks["pss"]}


def watch(pid: int, peaks: dict[str, int]) -> None:
    """Keeps the largest sums of a process and all it started: resident size, and now and then the proportional one."""
    import psutil

    try:
        root = psutil.Process(pid)
        looks = 0
        while root.status() != psutil.STATUS_ZOMBIE:
            family = [root, *root.children(recursive=True)]
            peaks["rss"] = max(peaks["rss"], sum(sizes(family, lambda one: one.memory_info().rss)))
            if looks % 10 == 0:
                peaks["pss"] = max(peaks["pss"], sum(sizes(family, lambda one: one.memory_full_info().pss)))
            looks += 1
            time.sleep(0.1)
    except psutil.NoSuchProcess:
        return


def sizes(processes: Sequence[Any], size: Callable[[Any], int]) -> Iterator[int]:
    """A size of each process that is still there."""
    import psutil

    for process in processes:
        try:
            yield size(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


# ---- the benchmark ----


def peers(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Alternating runs of both sides on the first ``peer_count`` rows."""
    path = folder / "peer.jsonl"
    write_rows(path, args.rows, args.peer_count)
    runs: dict[str, list[dict[str, Any]]] = {"ptl": [], "trl": []}
    for pair in range(args.pairs):
        for side in ("ptl", "trl") if pair % 2 == 0 else ("trl", "ptl"):
            with tempfile.TemporaryDirectory(dir=folder) as own:
                runs[side].append(measured(side, path, args.tokenizer, args.num_proc, Path(own)))
            print(side, runs[side][-1], flush=True)
    ours, theirs = runs["ptl"], runs["trl"]
    for key in ("rows", "tokens", "trained_tokens"):
        if ours[0][key] != theirs[0][key]:
            raise SystemExit(f"the sides disagree on {key}: {ours[0][key]} here, {theirs[0][key]} in TRL")
    mine = median([run["seconds"] for run in ours])

    def over(key: str) -> float:
        return round(median([run[key] for run in theirs]) / median([run[key] for run in ours]), 3)

    return {
        "peer": "trl",
        "pairs": args.pairs,
        "peer_rows": ours[0]["rows"],
        "ratio": over("seconds"),
        "cpu_ratio": over("cpu_seconds"),
        "ratio_without_reading": round(median([run["seconds_without_reading"] for run in theirs]) / mine, 3),
        "memory_ratio": round(1 / over("peak_proportional"), 3),
        "ptl_rows_per_s": [round(run["rows"] / run["seconds"], 1) for run in ours],
        "trl_rows_per_s": [round(run["rows"] / run["seconds"], 1) for run in theirs],
        "trl_peak_gb": round(max(run["peak_bytes"] for run in theirs) / 1e9, 3),
    }


def prepare_stage(args: argparse.Namespace) -> dict[str, Any]:
    """The million, its second start, and the peer."""
    if args.scratch:
        Path(args.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        found = peers(folder, args) if args.pairs else {}
        path = folder / "rows.jsonl"
        write_rows(path, args.rows, args.count)
        first, second = (measured("ptl", path, args.tokenizer, args.num_proc, folder / "cache") for _ in range(2))
        print("first start", first, "second start", second, sep="\n", flush=True)
        (cached,) = [entry for entry in (folder / "cache").iterdir() if entry.is_dir()]
        return {
            "stage": "prepare",
            "variant": f"{args.count:,} conversations, {args.num_proc} processes",
            **found,
            "rows": first["rows"],
            "tokens": first["tokens"],
            "trained_tokens": first["trained_tokens"],
            "seconds": round(first["seconds"], 1),
            "rows_per_s": round(first["rows"] / first["seconds"], 1),
            "tokens_per_s": round(first["tokens"] / first["seconds"]),
            "peak_gb": round(first["peak_bytes"] / 1e9, 3),
            "second_start_s": round(second["seconds"], 2),
            "second_start_peak_gb": round(second["peak_bytes"] / 1e9, 3),
            "file_gb": round(path.stat().st_size / 1e9, 3),
            "cache_gb": round(sum(entry.stat().st_size for entry in cached.iterdir()) / 1e9, 3),
            "load_average": [round(load, 1) for load in os.getloadavg()],
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="preparation of conversations")
    prepare.add_argument("--rows", nargs="+", default=DEMO, help="real conversations, JSONL in the messages format")
    prepare.add_argument("--tokenizer", default=TOKENIZER)
    prepare.add_argument("--count", type=int, default=1_000_000)
    prepare.add_argument("--peer-count", type=int, default=60_000)
    prepare.add_argument("--pairs", type=int, default=3, help="runs of each side; 0 leaves TRL out")
    prepare.add_argument("--num-proc", type=int, default=record.core_count())
    prepare.add_argument("--scratch", help="where rows and caches are written for the time being")
    side = commands.add_parser("side")
    for name in ("side", "path", "tokenizer", "num_proc", "folder"):
        side.add_argument(name)
    args = parser.parse_args(argv)
    if args.command == "side":
        print(
            json.dumps(
                (ptl_side if args.side == "ptl" else trl_side)(
                    args.path, args.tokenizer, int(args.num_proc), args.folder
                )
            )
        )
        return 0
    print(json.dumps(record.append("data_scale", prepare_stage(args)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
