"""The whole road, with real parts: sampled answers, a person at the page, a reward model, an order of new answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.apps.rank_browser import chromium, need_browser
from tests.apps.rank_parts import read_rows, served, write_rows
from tests.apps.test_rank_page import Person

QUESTIONS = [
    *("What is the sun?", "Name a fruit.", "How do birds fly?", "What is a computer?", "Why is the sky blue?"),
    *("Who was Newton?", "What is bread?", "How old is the Earth?", "What do cows eat?", "What is a verb?"),
    *("Where is Paris?", "What is rain?", "How does a car work?", "What is gold?", "Why do we sleep?"),
    *("What is a poem?", "What is music?", "How do fish breathe?", "What is a map?", "Why do we laugh?"),
    *("What is ice?", "What is a bank?", "How do I boil an egg?", "What is a river?", "What is chess?"),
    *("Why do leaves fall?", "What is a king?", "What is glass?", "How do planes fly?", "What is sugar?"),
]
HELD_OUT = 10


def ptl(*arguments: object, folder: Path) -> str:
    """Runs the command and returns what it printed."""
    command = [sys.executable, "-m", "ptl.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def words(answer) -> int:
    return len(answer["messages"][0]["content"])


@pytest.fixture(scope="module")
def model() -> Path:
    from ptl.apps.demo import MODEL, unpack

    pytest.importorskip("gguf")
    unpack()
    return MODEL.resolve()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_answers_ranked_at_the_page_train_a_model_that_orders_new_ones(model, tmp_path):
    """The person likes short answers; the model is to like those to questions that it has not seen."""
    need_browser()
    asked = write_rows(tmp_path / "prompts.jsonl", [{"prompt": question} for question in QUESTIONS])
    sampling = ("--k", 4, "--temperature", 1.0, "--max-new-tokens", 40, "--keep-unfinished", "--seed", 1)
    ptl("synth", "candidates", asked, "--model", model, "--out", tmp_path / "answers.jsonl", *sampling, folder=tmp_path)
    rows = read_rows(tmp_path / "answers.jsonl")
    assert len(rows) == len(QUESTIONS) and all(len(row["completions"]) >= 2 for row in rows)
    ranked = write_rows(tmp_path / "to_rank.jsonl", rows[:-HELD_OUT])
    with served(ranked, "--out", tmp_path / "rankings.jsonl") as page, chromium(tmp_path / "profile") as driver:
        person = Person(driver, page.url)
        for place, row in enumerate(rows[:-HELD_OUT], 1):
            person.at(place)
            order = shown(person, len(row["completions"]))
            person.type(*(str(number) for number in order), "Enter")
        assert len(done(tmp_path / "rankings.jsonl", len(rows) - HELD_OUT)) == len(rows) - HELD_OUT
        assert page.stop()[0] == 0
    for line in read_rows(tmp_path / "rankings.jsonl"):
        lengths = [words(answer) for answer in line["completions"]]
        best = min(line["completions"], key=lambda answer: answer["rank"])
        assert words(best) <= min(lengths) * 1.2 + 5  # Markdown is shown without its marks
    held = [{**row, "completions": by_length(row["completions"])} for row in rows[-HELD_OUT:]]
    write_rows(tmp_path / "held.jsonl", held)
    fit = (
        "fit", "--run.dir", tmp_path / "reward", "--seed_everything", 0,
        "--model.class_path", "ptl.objectives.reward.RewardModeling", "--model.policy.name", model,
        "--model.policy.adapter.rank", 8, "--model.optimizer.lr", 5e-4,
        "--data.train", json.dumps([{"path": str(tmp_path / "rankings.jsonl")}]), "--data.micro_batch_size", 2,
        "--data.preparation.cache_dir", tmp_path / "cache",
        "--trainer.accelerator", "cpu", "--trainer.max_epochs", 3, "--trainer.enable_progress_bar", "false",
    )  # fmt: skip
    ptl(*fit, folder=tmp_path)
    report = tmp_path / "report"
    ptl("rank", "eval", tmp_path / "held.jsonl", "--model", tmp_path / "reward", "--out", report, folder=tmp_path)
    overall = json.loads((report / "report.json").read_text())["models"][0]["overall"]
    assert overall["accuracy"] >= 0.7, overall


def shown(person, answers: int) -> list[int]:
    """The numbers of the answers at the page, shortest first."""
    lengths = person.driver.execute_script(
        "return [...document.querySelectorAll('article.answer')]"
        ".map((card) => [...card.querySelectorAll('.text')].reduce((sum, text) => sum + text.textContent.length, 0))"
    )
    assert len(lengths) == answers
    return sorted(range(1, answers + 1), key=lambda number: lengths[number - 1])


def done(path: Path, count: int) -> list:
    from tests.apps.rank_parts import until

    return until(lambda: (lines := read_rows(path)) and len(lines) >= count and lines)


def by_length(completions):
    order = sorted(range(len(completions)), key=lambda at: words(completions[at]))
    return [{**answer, "rank": 1 + order.index(at)} for at, answer in enumerate(completions)]
