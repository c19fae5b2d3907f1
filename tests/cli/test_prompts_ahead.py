"""Prompts on the command line: looked at, prepared ahead as the run will want them, and what a bad reward says."""

from __future__ import annotations

import json

import pytest

from ptl import cli
from ptl.apps.data import _view_of
from tests.objectives import rl


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    rl.make_folder(tmp_path)
    return tmp_path


def test_prompts_are_shown_with_what_they_expect(folder, capsys):
    arguments = ["preview", f"{folder}/rows.jsonl", "--tokenizer", f"{folder}/model", "--rows", "2"]
    assert cli.main(["data", *arguments]) == 0
    answer = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])["answer"]
    assert f"answer '{answer}'" in capsys.readouterr().out


def test_the_room_of_an_answer_is_part_of_what_is_prepared(folder):
    """Rows that were kept for short answers would leave no room for longer ones."""
    model = {"class_path": "ptl.objectives.grpo.GRPO", "init_args": {"rollout": {"max_new_tokens": 77}}}
    assert _view_of(model).room == 77
    kept = set()
    for room in (8, 12):
        objective, data = rl.build(str(folder), rollout={"max_new_tokens": room})
        assert objective.view.room == room
        data.prepare()
        kept.add(data.prepared_rows("train").path)
    assert len(kept) == 2


def test_a_reward_that_raises_is_one_line_and_code_2(folder, capsys):
    reward = {"class_path": "tests.objectives.test_grpo.Raises"}
    code = cli.main(
        [
            *("fit", "-c", "configs/objective/grpo.yaml", "--model.rewards", json.dumps([reward])),
            *("--model.policy.name", f"{folder}/model", "--data.train", f"[{{path: {folder}/rows.jsonl}}]"),
            *("--model.rollout.max_new_tokens", "8", "--data.max_length", "64", "--run.dir", f"{folder}/run"),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_steps", "1"),
            *("--data.micro_batch_size", "4", "--trainer.enable_progress_bar", "false"),
        ]
    )
    said = capsys.readouterr().err
    assert code == 2
    assert "ptl: error: the reward raises failed for 32 of the last 32 answers (32 raised)" in said
    assert "no division" in said and "Traceback" not in said
