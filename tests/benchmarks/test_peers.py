"""The comparison's own logic: which rows, which steps count, when two runs may be compared, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import peers, record, report
from benchmarks.peer_stages import sft
from benchmarks.peer_tools import chat, rows
from benchmarks.peer_tools.breakdown import breakdown
from benchmarks.peer_tools.compare import Measured, Pair, compare, run_side
from tests import tiny

TEMPLATES = Path(__file__).parent.parent / "data" / "chat_templates"


def measured(seconds, *, useful=(100, 300, 300), losses=(2.0, 1.5, 1.25), peak=4_000_000_000, **changes) -> Measured:
    values = {
        "seconds": list(seconds),
        "cpu_seconds": [2 * s for s in seconds],
        "losses": list(losses),
        "useful_tokens": list(useful),
        "trained_tokens": [n // 2 for n in useful],
        "computed_tokens": [n + 50 for n in useful],
        "flops": [1e9 * n for n in useful],
        "peak_bytes": peak,
        "start_bytes": 1_000_000_000,
        "matmul_rates": {"fp32": 1e12, "bf16": 4e12},
        **changes,
    }
    return Measured(**values)


def conversation(text: str, answer: str = "Yes.") -> dict:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


# ---- comparing ----


def test_ratio_is_the_median_over_pairs_of_rates_after_warm_up():
    # Rates after one step: 600 tokens in 2 s against 6, 4 and 10 s.
    pairs = [Pair(measured((9.0, 1.0, 1.0)), measured((9.0, s, s), peak=8_000_000_000)) for s in (3.0, 2.0, 5.0)]
    line = compare(pairs, warmup=1, dtype="fp32")
    assert line["ratio"] == 3.0
    assert line["memory_ratio"] == 0.5
    assert line["pairs"] == 3
    assert line["step_seconds"]["peer"] == {"median": 3.0, "min": 2.0, "max": 5.0}
    assert line["cpu_seconds_per_step"] == {"ptl": 2.0, "peer": 6.0}
    assert line["useful_tokens_per_second"] == {"ptl": 300.0, "peer": 100.0}
    assert line["trained_tokens_per_second"]["ptl"] == 150.0
    assert line["share_of_matmul"] == {"ptl": 0.3, "peer": 0.1}
    assert compare(pairs, warmup=1, dtype="bf16")["share_of_matmul"]["ptl"] == 0.075
    assert "mfu" not in line
    assert compare(pairs, warmup=1, dtype="bf16", peak=8e12)["mfu"] == {"ptl": 0.037, "peer": 0.013}


def test_the_largest_difference_is_over_all_pairs_but_only_the_shown_steps():
    same = measured((1.0,) * 6, useful=(9,) * 6, losses=(1.0,) * 6)
    late = measured((1.0,) * 6, useful=(9,) * 6, losses=(1.0,) * 5 + (7.0,))
    early = measured((1.0,) * 6, useful=(9,) * 6, losses=(1.0, 1.25, 1.0, 1.0, 1.0, 1.0))
    line = compare([Pair(same, late), Pair(same, early)], warmup=1, dtype="fp32")
    assert line["losses"]["largest_difference"] == 0.25
    assert line["losses"]["peer"] == [1.0] * 5


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (measured((1.0, 1.0, 1.0), useful=(100, 301, 300)), "step 1: useful_tokens are 300 for ptl and 301"),
        (measured((1.0, 1.0, 1.0), trained_tokens=[50, 150, 149]), "step 2: trained_tokens are 150 for ptl and 149"),
        (measured((1.0, 1.0), useful=(100, 300)), "ptl ran 3 steps and the peer 2"),
    ],
)
def test_runs_that_did_other_work_are_not_compared(other, reason):
    with pytest.raises(ValueError, match=reason):
        compare([Pair(measured((1.0, 1.0, 1.0)), other)], warmup=1, dtype="fp32")


def test_a_side_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"ptl side of stage nowhere ended with code 1:\n(.|\n)*ModuleNotFoundError"):
        run_side("nowhere", "ptl", {}, tmp_path, threads=1, device="cpu", timeout=120)
    with pytest.raises(RuntimeError, match=r"peer side of stage sft did not end within --timeout 0\.01 s"):
        run_side("sft", "peer", {}, tmp_path, threads=1, device="cpu", timeout=0.01)


# ---- rows ----


def test_rows_are_chosen_by_rendered_length_in_an_order_of_the_seed(tokenizer):
    many = [conversation("word " * n) for n in range(60)]
    many.append({"messages": many[30]["messages"][:1]})  # nothing to train on
    chosen, lengths = rows.choose_rows(many, tokenizer, count=20, tokens=(60, 200), seed=0)
    again, _ = rows.choose_rows(many, tokenizer, count=20, tokens=(60, 200), seed=0)
    other, _ = rows.choose_rows(many, tokenizer, count=20, tokens=(60, 200), seed=1)
    assert chosen == again != other
    assert all(60 <= n <= 200 for n in lengths)
    assert lengths == [len(tokenizer.apply_chat_template(r["messages"], return_dict=False)) for r in chosen]
    assert all(row["messages"][-1]["role"] == "assistant" for row in chosen)


def test_joined_rows_fill_what_there_is_and_lose_nothing_but_what_is_too_long(tokenizer):
    many = [conversation("word " * n) for n in (3, 5, 8, 13, 500, 2, 1, 9, 4)]
    joined = rows.join_rows(many, tokenizer, tokens=(60, 200), seed=0)
    size = [len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in joined]
    assert 1 < len(joined) < len(many) and sum(n > 200 for n in size) <= 1
    pairs = [m["content"] for row in joined for m in row["messages"] if m["role"] == "user"]
    assert sorted(pairs) == sorted(row["messages"][0]["content"] for row in many)
    assert joined == rows.join_rows(many, tokenizer, tokens=(60, 200), seed=0)


def test_too_few_rows_name_the_options(tokenizer):
    with pytest.raises(ValueError, match=r"0 of 3 conversations have 500 to 600 tokens, 8 are.*--rows.*--tokens"):
        rows.choose_rows([conversation("hi")] * 3, tokenizer, count=8, tokens=(500, 600), seed=0)


def test_rows_are_read_from_messages_or_from_two_named_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    extra = {**conversation("a", "b"), "id": 7}
    path.write_text(json.dumps(extra) + "\n\n" + json.dumps({"q": "c", "a": "d"}) + "\n", encoding="utf-8")
    assert rows.read_rows([path], ("q", "a")) == [conversation("a", "b"), conversation("c", "d")]
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: expected 'messages', got the columns a, q.*--columns"):
        rows.read_rows([path])


def test_written_rows_read_back_and_have_a_digest_of_their_text(tmp_path):
    some = [conversation("où ?"), conversation("b")]
    digest = rows.write_rows(tmp_path / "a.jsonl", some)
    assert rows.read_rows([tmp_path / "a.jsonl"]) == some
    assert digest == rows.write_rows(tmp_path / "b.jsonl", some) != rows.write_rows(tmp_path / "c.jsonl", some[:1])


# ---- the SFT stage ----


def test_the_training_template_marks_the_words_and_the_end_of_each_answer(tokenizer):
    tokenizer = tiny.make_tokenizer(template=(TEMPLATES / "smollm2.jinja").read_text(encoding="utf-8"))
    messages = [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "The answer is 4"},
        {"role": "user", "content": "Où est Shanghai ?"},
        {"role": "assistant", "content": "En Chine."},
    ]
    chat.check_template(tokenizer, chat.SMOLLM2_TRAINING, [messages, messages[:2]])
    out = tokenizer.apply_chat_template(
        messages, chat_template=chat.SMOLLM2_TRAINING, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, mask in zip(out["input_ids"], out["assistant_masks"]) if mask]
    assert tokenizer.decode(marked) == "The answer is 4<|im_end|>En Chine.<|im_end|>"


def test_a_training_template_of_another_model_is_refused(tokenizer):
    with pytest.raises(ValueError, match="renders another text than the model's own"):
        chat.check_template(tokenizer, chat.SMOLLM2_TRAINING, [conversation("hi")["messages"]])


def arguments(model: Path, source: Path, *more: str):
    given = ["--stage", "sft", "--model", str(model), "--rows", str(source), "--tokens", "20", "200", *more]
    return peers.parse([*given, "--steps", "3", "--batch-rows", "4", "--micro", "2", "--trl-micro", "2"])


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source.jsonl"
    rows.write_rows(path, [conversation("What is 2+2? " * (1 + n % 5), f"The answer is {n}") for n in range(40)])
    return path


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_ptl_side_runs_the_steps_and_counts_its_tokens(model_folder, source, tmp_path, tokenizer, adapter):
    template = tmp_path / "own.jinja"
    template.write_text(tokenizer.chat_template, encoding="utf-8")
    args = arguments(model_folder, source, "--adapter", adapter, "--trl-template", str(template), "--lr", "1e-2")
    spec = sft.make_spec(args, tmp_path)
    run = sft.run_ptl(json.loads(json.dumps(spec)))
    lines = rows.read_rows([Path(spec["rows"])])
    lengths = [len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in lines]
    ends = [tokenizer.encode(row["messages"][1]["content"] + "<|im_end|>") for row in lines]
    assert run.useful_tokens == [sum(lengths[i : i + 4]) for i in (0, 4, 8)]
    assert run.trained_tokens == [sum(len(end) for end in ends[i : i + 4]) for i in (0, 4, 8)]
    assert run.computed_tokens == run.useful_tokens  # packed: nothing is padding
    assert len(run.seconds) == len(run.cpu_seconds) == len(run.flops) == 3
    assert run.losses[-1] < run.losses[0]
    assert run.peak_bytes >= run.start_bytes > 0


def test_a_batch_that_does_not_divide_into_forward_passes_names_the_option(model_folder, source, tmp_path):
    args = arguments(model_folder, source)
    args.trl_micro = 3
    with pytest.raises(ValueError, match="--batch-rows 4 is no multiple of --trl-micro 3"):
        sft.make_spec(args, tmp_path)


# ---- the command ----


def test_every_stage_has_what_the_command_calls():
    assert {"sft", "distill"} <= set(peers.STAGES)
    for name in peers.STAGES:
        module = peers.stage_module(name)
        for attribute in ("PEER", "PEER_PACKAGE", "add_arguments", "make_spec", "run_ptl", "run_peer"):
            assert hasattr(module, attribute), f"{name} lacks {attribute}"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--warmup", "3"], "--warmup 3 leaves none of --steps 3"),
        (["--pairs", "0"], "--pairs must be 1 or more"),
        (["--model", "nowhere"], "nowhere/config.json is not there: run `make demo`"),
        (["--no-such-option", "1"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_a_bad_command_line_is_one_message(model_folder, source, more, reason, capsys):
    with pytest.raises(SystemExit):
        arguments(model_folder, source, *more)
    assert reason in capsys.readouterr().err


def test_the_recorded_line_names_what_was_compared(model_folder, source, tmp_path):
    args = arguments(model_folder, source, "--adapter", "lora", "--dtype", "bf16")
    pair = Pair(measured((3.0, 1.0, 1.0)), measured((3.0, 2.0, 2.0)))
    result = peers.result(args, {"adapter": "lora", "rows_sha256": "ab"}, [pair], "trl 9 SFTTrainer")
    line = record.append("peers_sft", result, folder=tmp_path)
    assert (line["benchmark"], line["stage"], line["variant"]) == ("peers_sft", "sft", "lora-bf16")
    assert line["peer"] == "trl 9 SFTTrainer"
    assert line["ratio"] == 2.0 and line["pairs"] == 1 and line["rows_sha256"] == "ab"
    assert record.read("peers_sft", tmp_path) == [line]
    assert "| lora-bf16 |" in report.table([line])


def test_with_and_without_liger_two_runs_of_trl_take_turns_with_ours(
    model_folder, source, tokenizer, tmp_path, monkeypatch
):
    turns = []

    def run_side(stage, side, spec, folder, **settings):
        turns.append("ptl" if side == "ptl" else spec["trl_liger"])
        return measured((3.0, 1.0, 1.0) if side == "ptl" else (3.0, 3.0 - spec["trl_liger"], 3.0 - spec["trl_liger"]))

    monkeypatch.setattr(peers, "run_side", run_side)
    template = tmp_path / "own.jinja"
    template.write_text(tokenizer.chat_template, encoding="utf-8")
    words = ["--model", str(model_folder), "--rows", str(source), "--tokens", "20", "200", "--steps", "3"]
    words += ["--pairs", "2", "--trl-template", str(template), "--results", str(tmp_path), "--trl-liger", "both"]
    assert peers.main(words) == 0
    assert turns == ["ptl", False, True] * 2
    without, with_it = record.read("peers_sft", tmp_path)
    assert (without["ratio"], without["pairs"]) == (3.0, 2) and not without["peer"].endswith("with Liger")
    assert (with_it["ratio"], with_it["pairs"]) == (2.0, 2) and with_it["peer"].endswith("with Liger")


# ---- results ----


def test_a_result_is_appended_with_the_common_keys_or_not_at_all(tmp_path):
    assert record.read("speed", tmp_path) == []
    first = record.append("speed", {"stage": "sft", "variant": "full-fp32", "ratio": 2.0}, folder=tmp_path)
    for key in ("benchmark", "stage", "variant", "device", "date", "command", "versions"):
        assert first[key]
    assert first["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="the result of benchmark 'speed' is not JSON"):
        record.append("speed", {"ratio": float("nan")}, folder=tmp_path)
    second = record.append("speed", {"ratio": 3.0}, folder=tmp_path)
    assert record.read("speed", tmp_path) == [first, second]


def test_a_recorded_command_can_be_typed_again_and_tells_no_machine_path(tmp_path, monkeypatch):
    program = str(Path(record.__file__).with_name("peers.py"))
    monkeypatch.chdir(tmp_path)
    inside = str(tmp_path / "data" / "rows.jsonl")
    words = [program, "--rows", inside, "/elsewhere/more.jsonl", "--model=/elsewhere/m", "--lr", "2e-5"]
    assert record.command(words) == ("python -m benchmarks.peers --rows data/rows.jsonl more.jsonl --model=m --lr 2e-5")
    package = str(Path(record.__file__).with_name("peer_tools") / "__main__.py")
    assert record.command([package]) == "python -m benchmarks.peer_tools"


def test_the_report_has_a_row_a_line_and_leaves_unknown_cells_empty():
    text = report.table([{"variant": "a", "ratio": 2.5, "step_seconds": {"ptl": 1}}, {"variant": "b"}])
    assert text.splitlines()[0].startswith("| benchmark | stage | variant |")
    assert len(text.splitlines()) == 4
    assert "| a |" in text and "2.5" in text and "step_seconds" not in text


# ---- where the time goes ----


def test_a_breakdown_gives_each_operation_to_the_outermost_scope_and_what_is_left_to_python():
    class Event:
        def __init__(self, name, seconds, parent=None):
            self.name, self.self_cpu_time_total, self.cpu_parent = name, seconds * 1e6, parent

    step, loss = Event("Optimizer.step#AdamW.step", 0.25), Event("_FusedLinearCrossEntropy", 0.5)
    update = Event("aten::_fused_adamw_", 0.5, step)
    events = [step, loss, update, Event("aten::copy_", 0.25, update)]
    events += [Event("aten::mm", 1.5), Event("aten::addmm", 0.5, step)]  # the trainer's closure runs in the step
    events += [Event("aten::mm", 1.0, loss), Event("aten::softmax", 0.5, loss), Event("aten::silu", 0.5)]
    found = breakdown(events, 10.0)
    assert found["shares"] == {
        "products": 0.2,
        "loss": 0.1,
        "loss products": 0.1,
        "optimizer": 0.075,
        "rest": 0.075,
        "python": 0.45,
    }
    assert found["rest"] == {"aten::silu": 0.05, "Optimizer.step#AdamW.step": 0.025}
