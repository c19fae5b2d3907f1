"""What the demo trains on, and what it shows at its end; the training itself is the recipe's test."""

import json
import logging
import os
import subprocess
import sys

from ptl.apps.demo import TOPICS, before_and_after, chat_rows, corpus_rows


def test_its_rows_are_real_exchanges_in_two_languages():
    for rows in (list(corpus_rows("english", TOPICS)), list(corpus_rows("french")), list(chat_rows(5))):
        assert rows
        for row in rows:
            turns = row["messages"]
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
            assert all(turn["content"].strip() for turn in turns)
    assert len(rows) == 5 and {len(row["messages"]) for row in rows} == {6}


def test_it_shows_both_answers_and_the_held_out_loss(tmp_path, capsys):
    answers = [(0, "Ça va ?", "Hello"), (0, "Why?", "No"), (4, "Ça va ?", "Très bien"), (4, "Why?", "Yes")]
    samples = [json.dumps({"step": step, "prompt": prompt, "answer": text}) for step, prompt, text in answers]
    (tmp_path / "samples.jsonl").write_text("\n".join(samples) + "\n", encoding="utf-8")
    rows = [{"event": "start", "step": 0}, {"step": 0, "val/loss": 4.5}, {"step": 1, "train/loss": 4.0}]
    rows += [{"step": 1, "val/loss": 3.25}, {"step": 3, "val/loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before_and_after(tmp_path)
    said = capsys.readouterr().out
    assert "held-out loss: 4.500 before -> 3.250 at step 2 -> 3.000 at step 4" in said
    for question, before, after in (("Ça va ?", "Hello", "Très bien"), ("Why?", "No", "Yes")):
        (line,) = [line for line in said.splitlines() if question in line]
        assert line.index(before) < line.index(after)


def test_libraries_are_hushed_by_their_own_switches():
    code = (
        "from ptl.apps.demo import hush; hush(); import logging, transformers.utils.logging as t;"
        "print(t.is_progress_bar_enabled(), logging.getLogger('lightning.pytorch').level)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["False", str(logging.WARNING)]
