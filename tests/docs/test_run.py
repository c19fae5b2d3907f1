"""The commands of the README and of the pages run as they stand, page by page, with tiny models under every name.

A hub's name is a tiny model in the hub's cache; ``MODEL`` and the files that a reader would have are a folder and files
of these names. Only ``ptl fit`` and ``ptl validate`` are given more words: two steps, on this CPU. What runs elsewhere:
the tutorials and docs/objective.md (beside this file), jobs (``tests/slurm``), benchmarks (``tests/benchmarks``), what
asks a W&B server (``tests/apps``), and make's targets, which continuous integration or a person runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests import tiny
from tests.docs.test_commands import PAGES, block_commands
from tests.objectives import law, ranking, rl
from tests.ranks import EXTENSIONS, ROOT, compile_extensions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

HUB = (
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen2.5-7B-Instruct",
    "meta-llama/Llama-3.1-70B-Instruct",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct",
    "microsoft/phi-4",
)
ELSEWHERE = re.compile(
    r"make |slurm/|sbatch |python -m benchmarks|ptl compare .*--project|ptl fit -c run\.yaml -c focal\.yaml"
)
OWN_TEST = {"tutorial.md", "tutorial.fr.md", "objective.md"}
SERVER = re.compile(r"ptl (serve|rank serve) ")
CPU = (
    "--trainer.accelerator cpu --trainer.devices 1 --trainer.num_nodes 1 --trainer.max_steps 2 "
    "--trainer.enable_progress_bar false"
)
LEARN = "--trainer.max_steps 120 --trainer.max_epochs -1 --model.optimizer.lr 3e-3 --trainer.precision 32-true"
RUNNABLE = {
    page: [c for c in block_commands(page) if not ELSEWHERE.match(c)] for page in PAGES if page.name not in OWN_TEST
}
SEEDS = {  # runs that a page means the reader to have
    "my-run": "-c configs/recipes/lora.yaml",
    "sft": "-c configs/recipes/lora.yaml",
    "lr-1e-3": "-c configs/recipes/lora.yaml --model.optimizer.lr 1e-3",
    "NAME": "-c configs/recipes/lora.yaml -c configs/overlay/wandb.yaml",
    "reward": "-c configs/recipes/reward.yaml",
}


FACTS = {
    f"Say {word} twice.": f"{word} {word}"
    for word in ("hello", "world", "brown", "quick", "lazy", "over", "dog", "fox")
}
"""What the tiny model is taught, so that it knows something."""
WEATHER = '''
def weather(town: str) -> str:
    """The weather of a town.

    Args:
        town: its name.
    """
    return f"It rains in {town}."
'''


def test_most_commands_run():
    assert sum(map(len, RUNNABLE.values())) > 55


def for_this_machine(command: str) -> str:
    """The command with what lets a training end soon, on a CPU."""
    command = re.sub(r"^ptl fit \.\.\.", "ptl fit -c configs/recipes/lora.yaml -c configs/overlay/wandb.yaml", command)
    command = re.sub(r"\s+# .*$", "", command)
    command = command.replace("pass_rate: [0.1,", "pass_rate: [0.0,")  # the tiny model solves nothing
    if not re.match(r"ptl (fit|validate) ", command):
        return command
    more = [CPU, "--trainer.accumulate_grad_batches 1 --data.preparation.num_proc 1 --data.max_length 256"]
    sampled = re.search(r"grpo|ppo", command)
    more += ["--data.pack_to null" if sampled else "--data.pack_to 512"]
    if sampled:
        more += ["--model.rollout.max_new_tokens 8 --model.rollout.minibatches 1 --model.self_check.min_finished 0"]
        more += ["--data.micro_batch_size 4 --trainer.val_check_interval null"]
    if "pretrain" in command:
        more += ["--trainer.val_check_interval null --trainer.check_val_every_n_epoch 1 --data.micro_batch_size 1"]
    if "sequence_parallel" in command or "long_context" in command:  # one process shares with nobody
        more += ["--model.sequence_parallel 1"]
    if "ppo" in command:
        more += ["--model.warm_up 1"]
    return " ".join([command, *more])


def make_room(folder: Path, command: str) -> None:
    """What a command is to write is not there yet, be it the seed's or that of another way which the page shows."""
    found = re.search(r"(?:--out|--run\.dir) (\S+)", command)
    for path in folder.glob(f"{found[1]}*") if found else []:
        (shutil.rmtree if path.is_dir() else os.unlink)(path)


def environment(folder: Path) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "PTL", "SLURM"))}
    return env | {
        "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
        "PYTHONPATH": f"{ROOT}:{folder}",
        "PTL_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
        "WANDB_MODE": "offline",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run(folder: Path, command: str) -> None:
    make_room(folder, command)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment(folder),
        input="What is 2+2?\n" if command.startswith("ptl chat") else "",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])
    assert "Traceback" not in done.stderr, (command, done.stderr[-3000:])


def serve(folder: Path, command: str) -> None:
    """A server says where it is, answers there, and ends well when interrupted. Nobody has ranked before."""
    log = folder / "server.log"
    rankings = folder / "rankings.jsonl"
    rankings.rename(folder / "ranked")
    with log.open("w") as out:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port 0"], cwd=folder, env=environment(folder), stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + 120
        while not (said := re.search(r"(http://[^/\s]+/)(v1)?(\S*)", log.read_text())):
            assert server.poll() is None and time.monotonic() < deadline, (command, log.read_text())
            time.sleep(0.2)
        with urllib.request.urlopen(said[1] + said[3], timeout=60) as answer:
            assert answer.status == 200 and b"<html" in answer.read().lower()
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(60)
        (folder / "ranked").replace(rankings)
    assert code in (0, 130) and "Traceback" not in log.read_text(), (command, log.read_text())


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def said(word: str) -> dict:
    return {"messages": [{"role": "assistant", "content": word}]}


def write_files(folder: Path) -> None:
    """The rows that the pages and the recipes name."""
    data = folder / "data"
    data.mkdir()
    chats = law.write_rows(data / "train.jsonl", count=40)
    for name in (
        "my.jsonl",
        "chats.jsonl",
        "more/story.md/story/tools.jsonl",
        "assets/demo/chats.jsonl",
        "assets/demo/questions/train.jsonl",
        "assets/demo/questions/held_out.jsonl",
    ):
        write(folder / name, chats)
    texts = [{"text": " ".join(m["content"] for m in row["messages"])} for row in chats]
    for name in ("data/text.jsonl", "text.jsonl"):
        write(folder / name, texts)
    (data / "more.txt").write_text("\n\n".join(row["text"] for row in texts))
    rankings = ranking.write_rows(data / "rankings.jsonl", count=40)
    for name in ("rankings.jsonl", "held-out.jsonl", "held_out.jsonl"):
        write(folder / name, rankings)
    prompts = rl.write_rows(data / "prompts.jsonl", count=16)
    for name in ("prompts.jsonl", "data/gsm8k/train.jsonl", "data/gsm8k/test.jsonl"):
        write(folder / name, prompts)
    candidates = [
        {"prompt": row["prompt"], "id": f"{at}", "completions": [said(word) for word in ("four", "five", "six")]}
        for at, row in enumerate(prompts)
    ]
    write(folder / "candidates.jsonl", candidates)
    write(folder / "facts.jsonl", [{"prompt": q, "completion": a} for q, a in FACTS.items()])
    towns = [(f"Town {at}", f"Region {at}") for at in range(40)]
    write(folder / "documents.jsonl", [{"title": t, "text": f"{t} is the capital of {r}."} for t, r in towns])
    asked = {**FACTS, **{f"What is the capital of {region}?": town for town, region in towns}}
    write(folder / "questions.jsonl", [{"question": q, "answers": [a]} for q, a in asked.items()])
    (folder / "mypackage").mkdir()
    (folder / "mypackage/__init__.py").touch()
    (folder / "mypackage/tools.py").write_text(WEATHER)


def large_tokenizer():
    """A base model's, as large as o200k: the ids that docs/tokens.md gives are a little above it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"word{at}" for at in range(199_999 - len(letters)))]
    backend = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def seeded(tmp_path_factory) -> Path:
    compile_extensions()
    folder = tmp_path_factory.mktemp("pages") / "seed"
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "docs").symlink_to(ROOT / "docs")
    write_files(folder)
    tiny.save_folder(folder / "untaught", tiny.make_tokenizer(), layers=13, hidden=128)
    taught = (
        "ptl fit -c configs/recipes/sft_full.yaml --model.policy.name untaught --data.train '[{path: facts.jsonl}]'"
    )
    run(folder, f"{for_this_machine(taught)} {LEARN} --run.dir runs/taught")
    shutil.copytree(folder / "runs/taught/export", folder / "MODEL")
    tiny.save_folder(folder / "base", large_tokenizer())
    shutil.copytree(folder / "MODEL", folder / "assets/smollm2-135m-instruct")
    for name in HUB:
        cached = folder / "hub/hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder / "MODEL", cached / "snapshots/1")
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text("1")
    shutil.copy(ROOT / "configs/recipes/distill_demo.yaml", folder / "run.yaml")
    tiny.make_tokenizer().save_pretrained(folder / "more/tokens.md/tokenizer")
    for name, words in SEEDS.items():
        run(folder, for_this_machine(f"ptl fit {words} --run.dir runs/{name}"))
    for rates in ("runs/lr-1e-4", "runs/rates/lr-1e-4"):
        shutil.copytree(folder / "runs/my-run", folder / rates)
    shutil.copytree(folder / "runs/lr-1e-3", folder / "runs/rates/lr-1e-3")
    shutil.copytree(folder / "runs/NAME/wandb", folder / "wandb")
    run(folder, "ptl tokens add MODEL --out more/story.md/story/idk/export --set chat think tools")
    return folder


@pytest.mark.parametrize(
    "page", [p for p, c in RUNNABLE.items() if c], ids=lambda page: f"{page.parent.name}-{page.stem}"
)
def test_the_commands_of_a_page_run(page, seeded, tmp_path):
    folder = tmp_path / "page"
    shutil.copytree(seeded, folder, symlinks=True)
    for path in (folder / "more" / page.name).glob("*"):  # what is in runs/ where the page begins
        path.rename(folder / "runs" / path.name)
    if page.name == "tokens.md":  # which begins with a model that knows no turns
        shutil.rmtree(folder / "MODEL")
        (folder / "base").rename(folder / "MODEL")
    for command in map(for_this_machine, RUNNABLE[page]):
        (serve if SERVER.match(command) else run)(folder, command)
