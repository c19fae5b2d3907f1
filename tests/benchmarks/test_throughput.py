"""The grid, what becomes of its cells, and what is held against a baseline."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import record, report
from benchmarks.throughput import __main__ as command
from benchmarks.throughput import baseline, scaling
from benchmarks.throughput.cells import Cell, Setting, config_of, grid
from benchmarks.throughput.parts import make_model, write_rows
from benchmarks.throughput.report import newest, over_ddp, plot, rendered
from benchmarks.throughput.run import outcome


def line(strategy="ddp", seconds=1.0, **changes):
    cell = Cell(strategy=strategy, ranks=2)
    measured = {"outcome": "ok", "step_seconds_median": seconds, "step_seconds_p90": seconds, "peak_memory_gib": 1.0}
    measured |= {"share_of_matmul": 0.5 / seconds, "tokens_per_second": 100 / seconds, "padding_fraction": 0.0}
    common = {"model": "m", "device": "d", "date": "2026-11-26", "versions": {}, "variant": cell.variant}
    return {**asdict(cell), **common, **measured, **changes}


def test_the_grid_is_every_combination_and_one_process_has_one_rank():
    cells = grid(strategy=["single", "ddp", "zero3-offload"], ranks=[1, 2], adapter=["full", "lora:8"])
    assert len(cells) == 2 * (1 + 2 + 2) and len(set(cells)) == len(cells)
    assert {cell.ranks for cell in cells if cell.strategy == "single"} == {1}


def test_a_cell_is_a_layer_of_configuration(tmp_path):
    rows = {"sft": "t.jsonl", "dpo": "r.jsonl"}
    setting = Setting(model="m", rows=rows, row_format="text", steps=40, warmup=10)
    cell = Cell(strategy="zero3-offload", adapter="qlora:8", ranks=2, sequence=256, micro_batch=4)
    config = config_of(cell, setting, tmp_path)
    strategy = config["trainer"]["strategy"]["init_args"]
    assert strategy == {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
    policy = config["model"]["init_args"]["policy"]
    assert policy == {"name": "m", "adapter": {"rank": 8, "alpha": 16}, "quantize": "nf4"}
    assert config["data"]["train"] == [{"path": "t.jsonl", "format": "text"}] and config["data"]["pack_to"] == 256
    assert config["throughput"] == {"warmup": 10} and config["checkpoint"] == {"save_top_k": 0}
    assert config_of(Cell(objective="dpo"), setting, tmp_path)["data"]["train"] == [{"path": "r.jsonl"}]
    assert config_of(Cell(objective="dpo"), setting, tmp_path)["trainer"]["strategy"] == "auto"
    layered = config_of(Cell(objective="config"), Setting(layers=("a.yaml",)), tmp_path)
    assert "class_path" not in layered["model"] and "train" not in layered["data"]


@pytest.mark.parametrize(
    ("adapter", "strategy"), [("lora", "ddp"), ("full:8", "ddp"), ("dora:8", "ddp"), ("full", "fsdp")]
)
def test_words_that_are_none_are_refused(adapter, strategy, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        config_of(Cell(adapter=adapter, strategy=strategy), Setting(), tmp_path)


def test_whatever_becomes_of_a_run_is_a_result():
    done = {"throughput": {"measured_steps": 3, "tokens_per_second": 123456.789, "mfu": None}}
    found = outcome(0, "", done)
    assert found["outcome"] == "ok" and found["tokens_per_second"] == 123460.0 and found["mfu"] is None
    assert outcome(1, "x\ntorch.OutOfMemoryError: CUDA out of memory\n", None)["outcome"] == "out of memory"
    assert outcome(-9, "", None)["outcome"] == "out of memory"
    assert outcome(None, "still going", None) == {"outcome": "timeout", "error": "still going"}
    assert outcome(2, "begin\nptl fit: error: got 3\nbye", None) == {
        "outcome": "failed",
        "error": "ptl fit: error: got 3",
    }
    assert outcome(0, "", {"throughput": {"measured_steps": 0}})["outcome"] == "failed"


def test_rows_fill_their_packs(tmp_path):
    from transformers import AutoTokenizer

    parameters = make_model(tmp_path / "model", layers=1, hidden=64, vocab=512)
    assert parameters > 64 * 512
    files = write_rows(tmp_path / "rows", str(tmp_path / "model"), sequence=256, count=3)
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in Path(files["sft"]).read_text().splitlines():
        assert len(own(json.loads(text)["text"])["input_ids"]) >= 256
    for text in Path(files["dpo"]).read_text().splitlines():
        row = json.loads(text)
        for answer in row["completions"]:
            messages = [*row["prompt"], {"role": "assistant", "content": answer}]
            length = len(own.apply_chat_template(messages, tokenize=True, return_dict=False))
            assert 0.75 * 128 < length <= 128
    again = write_rows(tmp_path / "again", str(tmp_path / "model"), sequence=256, count=3)
    assert Path(files["dpo"]).read_text() == Path(again["dpo"]).read_text()


def test_the_table_holds_each_cells_last_line_against_ddp(tmp_path):
    lines = [line(seconds=9.0), line(seconds=2.0), line("zero2", 3.0), line("zero3", 1.0, outcome="failed", error="x")]
    assert over_ddp(newest(lines)) == {0: 1.0, 1: 1.5}
    text = rendered(lines)
    assert len(text.splitlines()) == 2 + 3 and "| 1.50 |" in text and "| failed |" in text
    plot(lines, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_baseline_is_broken_by_time_and_by_memory():
    settings = {"layers": 1, "hidden": 64, "steps": 10, "warmup": 3}
    held = json.loads(json.dumps(baseline.make([line(), line("zero2", 2.0)], settings)))
    assert baseline.regressions(held, [line(), line("zero2", 2.0)]) == []
    assert baseline.regressions(held, [line(seconds=1.2), line("zero2", 1.0, peak_memory_gib=1.05)]) == []
    worse = [line(seconds=1.6), line("zero2", 2.0, peak_memory_gib=1.2)]
    slow, large = baseline.regressions(held, worse)
    assert "ddp" in slow and "slower" in slow and "zero2" in large and "20% larger" in large
    failed = baseline.regressions(held, [line(outcome="failed", error="boom"), line("zero2", 2.0)])
    assert failed == ["sft full-fp32 ddp on 2 ranks: failed: boom"]
    with pytest.raises(ValueError, match="has failed: boom"):
        baseline.make([line(outcome="failed", error="boom")], settings)


def test_a_file_that_is_no_baseline_is_named(tmp_path):
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ValueError, match="is no baseline"):
        baseline.read(tmp_path / "none.json")


def test_scaling_deals_one_batch_or_grows_it():
    base = Cell(strategy="ddp", accumulate=4, ranks=8)
    assert [cell.accumulate for cell in scaling.cells(base, [1, 2, 4], "weak")] == [4, 4, 4]
    assert [cell.accumulate for cell in scaling.cells(base, [1, 2, 4], "strong")] == [4, 2, 1]
    with pytest.raises(ValueError, match="3 does not divide"):
        scaling.cells(base, [1, 3], "strong")
    lines = [line(nodes=1), line(nodes=2, tokens_per_second=180.0), line(nodes=4, tokens_per_second=None)]
    assert scaling.efficiencies(lines) == [1.0, 0.9, None]


def test_peers_of_all_stages_are_one_table():
    text = report.peers()
    stages = {row.split("|")[1].strip() for row in text.splitlines()[2:]}
    assert {"sft", "reward", "grpo", "distill"} <= stages
    assert len(text.splitlines()) - 2 == sum(len(record.read(p.stem)) for p in record.RESULTS.glob("peers_*.json"))


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_a_real_cell_is_recorded(tmp_path):
    words = ["run", "--layers", "1", "--hidden", "64", "--sequence", "64", "--steps", "4", "--warmup", "1"]
    assert command.main(["--results", str(tmp_path), *words, "--adapter", "lora:4"]) == 0
    (found,) = record.read("throughput", tmp_path)
    assert found["outcome"] == "ok" and found["variant"] == "lora-fp32" and found["model"] == "llama-random-1x64"
    assert found["measured_steps"] == 3 and found["padding_fraction"] == 0.0
    assert found["tokens_per_second"] * found["step_seconds_median"] == pytest.approx(64, rel=0.5)
    assert 0 < found["share_of_matmul"] < 1 and found["peak_memory_gib"] > 0.1
