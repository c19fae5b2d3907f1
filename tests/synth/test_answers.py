"""The teacher writes the answers: batched as if alone, restartable, whole lines, ends as training taught."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ptl.rollout.sampling import generate
from ptl.synth.answers import Answers, Writing, write_answers
from tests import forks
from tests.ranks import ROOT
from tests.synth import parts

SETTINGS = {"teacher": "t", "renderer": "r", "max_new_tokens": 12, "batch_tokens": 200, "keep_unfinished": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parts.make_folder(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def teacher(folder):
    return parts.teacher_of(folder)


def encoder(folder: Path):
    from ptl.data.files import resolve
    from ptl.data.prepare import encoder_of

    data = parts.data_of(folder)
    sources = data.train_sources
    how: dict[str, Any] = {"max_length": 256, "truncation": "error", "view": data.view, "renderer": data.renderer}
    return encoder_of(sources, [resolve(source) for source in sources], **how)


def write(
    folder: str | Path, out: str | Path, *, model: Any = None, kill_after: int = -1, ranks=(0, 1), **settings: Any
) -> Answers:
    """Answers of the folder's rows; with ``kill_after``, the process is killed after so many batches, in a line."""
    batches = []

    def report(done: int) -> None:
        batches.append(done)
        if len(batches) == kill_after:
            with open(f"{out}.part-0", "ab") as file:
                file.write(b'{"messages": [{"role": "us')
            os.kill(os.getpid(), signal.SIGKILL)

    model = model or parts.teacher_of(Path(folder))
    how: dict[str, Any] = {"rank": ranks[0], "world_size": ranks[1], "report": report}
    return write_answers(model, encoder(Path(folder)), Path(out), Writing(**{**SETTINGS, **settings}), **how)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def alone(model, prompt, count, vocab):
    """The likeliest ids after a prompt, one whole forward a token, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1, :vocab].argmax()))
    return ids[len(prompt) :]


def test_batched_with_a_cache_writes_what_one_forward_a_token_writes(teacher):
    prompts = [[5, 6, 7], [9], [30, 31, 32, 33, 34, 35], [8, 9]]
    options = {"vocab": 300, "temperature": 0.0, "seed": 0, "numbers": range(4)}
    expected = [alone(teacher, prompt, 10, 300) for prompt in prompts]
    assert generate(teacher, prompts, stop=[399], limits=[10] * 4, **options) == expected
    # Each stops at its own limit, or at an end that comes before, and leaves the others alone.
    stop = [expected[0][4], expected[2][2]]
    got = generate(teacher, prompts, stop=stop, limits=[10, 3, 10, 7], **options)
    for ids, whole, limit in zip(got, expected, [10, 3, 10, 7]):
        end = next((i + 1 for i, token in enumerate(whole) if token in stop), 10)
        assert ids == whole[: min(end, limit)]


def test_what_is_drawn_depends_on_seed_and_number_alone(teacher):
    options = {"vocab": 300, "temperature": 1.0, "stop": [399]}
    both = generate(teacher, [[5, 6, 7], [9]], [11, 12], limits=[8, 8], seed=1, **options)
    assert both[1:] == generate(teacher, [[9]], [12], limits=[8], seed=1, **options)
    assert both[1:] != generate(teacher, [[9]], [13], limits=[8], seed=1, **options)
    assert both[1:] != generate(teacher, [[9]], [12], limits=[8], seed=2, **options)


def test_draws_follow_the_tempered_distribution(teacher):
    prompt, n = [5, 6, 7], 3000
    numbers = range(n)
    ids = generate(teacher, [prompt] * n, numbers, stop=[399], limits=[1] * n, vocab=300, temperature=0.7, seed=0)
    with torch.no_grad():
        p = torch.softmax(teacher(input_ids=torch.tensor([prompt])).logits[0, -1, :300].double() / 0.7, -1)
    shares = torch.bincount(torch.tensor(ids)[:, 0], minlength=300) / n
    assert ((shares - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1e-3).all()


def test_rows_hold_the_question_and_the_teachers_answer(folder, teacher, tmp_path):
    written = write(folder, tmp_path / "a.jsonl", model=teacher)
    given, made = rows(folder / "rows.jsonl"), rows(tmp_path / "a.jsonl")
    assert written.rows == len(made) == 24 - written.left_out.counts["empty"]
    tokenizer = parts.data_of(folder).renderer.tokenizer
    for row in made:
        before = given[row["number"]]["messages"]
        assert row["messages"][:-1] == before[:-1]
        assert row["origin"].endswith(f"rows.jsonl:{row['number'] + 1}")
        prompt = tokenizer.apply_chat_template(before[:-1], add_generation_prompt=True, tokenize=True)["input_ids"]
        ids = alone(teacher, prompt, 12, len(tokenizer))
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert row["finished"] == (end in ids)
        said = ids[: ids.index(end)] if end in ids else ids
        assert row["messages"][-1] == {"role": "assistant", "content": tokenizer.decode(said, skip_special_tokens=True)}


def test_what_it_writes_can_be_trained_on(folder, teacher, tmp_path):
    from ptl.data.sources import Source

    write(folder, tmp_path / "a.jsonl", model=teacher)
    data = parts.data_of(folder)
    data.train_sources = [Source(path=str(tmp_path / "a.jsonl"))]
    data.prepare()
    audit = data.audits["train"].sources[0]
    assert audit.kept == len(rows(tmp_path / "a.jsonl")) and not audit.refused


def test_answers_that_hit_the_limit_are_left_out_and_counted(folder, teacher, tmp_path):
    written = write(folder, tmp_path / "a.jsonl", model=teacher, keep_unfinished=False)
    kept, counts = rows(tmp_path / "a.jsonl"), written.left_out.counts
    assert all(row["finished"] for row in kept) and written.rows == len(kept)
    assert counts["unfinished"] > 0 and len(kept) + counts.total() == 24
    assert written.left_out.first["unfinished"].rpartition(":")[0] == str(folder / "rows.jsonl")


def test_rows_without_a_question_and_prompts_that_fill_the_context(folder, teacher, tmp_path):
    word = "hello world " * 300
    lines = [
        {"messages": [{"role": "assistant", "content": "I begin"}]},
        {"text": "plain text"},
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "teacher").symlink_to(folder / "teacher")
    made, left_out = write(tmp_path, tmp_path / "a.jsonl", model=teacher)
    assert made + left_out.counts["empty"] == 1
    assert {name: left_out.counts[name] for name in ("no_question", "too_long", "missing_key")} == {
        "no_question": 1, "too_long": 1, "missing_key": 1,
    }  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_killed_and_restarted_writes_each_answer_once(folder, teacher, tmp_path, temperature):
    write(folder, tmp_path / "whole.jsonl", model=teacher, temperature=temperature, seed=3)
    arguments = f"{str(folder)!r}, {str(tmp_path / 'a.jsonl')!r}, kill_after=2, temperature={temperature}, seed=3"
    code = f"from tests.synth.test_answers import write; write({arguments})"
    run = forks.run(["-c", code], cwd=ROOT)
    assert run.returncode == -9, run.stderr
    assert (tmp_path / "a.jsonl.part-0").read_bytes().endswith(b'"us')
    write(folder, tmp_path / "a.jsonl", model=teacher, temperature=temperature, seed=3)
    assert rows(tmp_path / "a.jsonl") == rows(tmp_path / "whole.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    write(folder, tmp_path / "a.jsonl", model=teacher, temperature=temperature, seed=3)
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_file_of_other_settings_is_not_gone_on_with(folder, teacher, tmp_path):
    write(folder, tmp_path / "a.jsonl", model=teacher)
    with pytest.raises(ValueError, match=r"max_new_tokens 12 against 5"):
        write(folder, tmp_path / "a.jsonl", model=teacher, max_new_tokens=5)
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="was not begun by this command"):
        write(folder, tmp_path / "b.jsonl", model=teacher)


def test_processes_share_the_conversations_and_the_last_one_joins_them(folder, teacher, tmp_path):
    write(folder, tmp_path / "whole.jsonl", model=teacher, temperature=1.0)
    first = write(folder, tmp_path / "a.jsonl", model=teacher, temperature=1.0, ranks=(1, 2))
    assert first.rows is None and not (tmp_path / "a.jsonl").exists()
    assert rows(tmp_path / "a.jsonl.part-1")
    last = write(folder, tmp_path / "a.jsonl", model=teacher, temperature=1.0, ranks=(0, 2))
    assert last.rows == len(rows(tmp_path / "a.jsonl")) > 0
    assert rows(tmp_path / "a.jsonl") == rows(tmp_path / "whole.jsonl")
