"""The distillation stage: one student for both sides, labels as ours, and two real runs that did the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import peers
from benchmarks.peer_stages import distill
from benchmarks.peer_tools import rows
from benchmarks.peer_tools.compare import Pair, check_same_work
from benchmarks.peer_tools.counts import folder_shape
from ptl.functional.flops import Work, forward_flops, training_flops
from tests import tiny

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The tiny tokenizer's ChatML with the marks that TRL needs."""


def conversation(n: int) -> dict:
    words = ["What is 2+2?", f"The answer is {n}", "hello " * (1 + n % 7), "I do not know."]
    return {"messages": [{"role": r, "content": w} for r, w in zip(("user", "assistant") * 2, words)]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("teacher"), tokenizer, layers=5, tie=False, initializer_range=0.3)


@pytest.fixture
def make_spec(teacher, tmp_path):
    source, template = tmp_path / "source.jsonl", tmp_path / "marked.jinja"
    rows.write_rows(source, [conversation(n) for n in range(40)])
    template.write_text(MARKED, encoding="utf-8")

    def make(*more: str) -> dict:
        given = ["--stage", "distill", "--model", str(teacher), "--rows", str(source), "--tokens", "20", "200"]
        given += ["--steps", "2", "--batch-rows", "4", "--micro", "2", "--trl-micro", "2", "--lr", "1e-2"]
        args = peers.parse([*given, "--trl-template", str(template), *more])
        return json.loads(json.dumps(distill.make_spec(args, tmp_path)))

    return make


# ---- what both sides are told ----


def test_the_student_is_the_teacher_with_layers_spread_from_the_first_to_the_last(teacher, make_spec, tokenizer):
    spec = make_spec("--student-layers", "3")
    whole, cut = (AutoModelForCausalLM.from_pretrained(spec[name]) for name in ("teacher", "student"))
    assert spec["student_layers"] == len(cut.model.layers) == cut.config.num_hidden_layers == 3
    for ours, kept in zip(cut.model.layers, (0, 2, 4)):
        assert torch.equal(ours.mlp.up_proj.weight, whole.model.layers[kept].mlp.up_proj.weight)
    assert torch.equal(cut.lm_head.weight, whole.lm_head.weight)
    assert AutoTokenizer.from_pretrained(spec["student"]).chat_template == tokenizer.chat_template


def test_a_given_student_is_not_cut(make_spec, model_folder):
    spec = make_spec("--student", str(model_folder))
    assert spec["student"] == str(model_folder) and "student_layers" not in spec


@pytest.mark.parametrize("layers", ["0", "6"])
def test_a_student_of_more_layers_than_the_teacher_names_the_option(make_spec, layers):
    with pytest.raises(ValueError, match=f"--student-layers {layers}"):
        make_spec("--student-layers", layers)


# ---- what is counted ----


def test_a_step_needs_the_student_forward_and_backward_and_the_teacher_forward_on_real_tokens():
    from benchmarks.peer_tools.counts import Counts
    from benchmarks.peer_tools.machine import StepClock

    student = tiny.make_model(layers=1, tie=False)
    clock, counts = StepClock("cpu"), Counts(accumulate=2)
    clock.start()
    counts.add(torch.tensor([3, 5]), torch.tensor(4), 32)  # 24 of the 32 are padding
    counts.add(torch.tensor([7]), torch.tensor(2), 7)
    for loss in (0.25, 0.5):
        counts.add_loss(torch.tensor(loss))
    clock.mark()
    run = counts.measured(clock, student, start_bytes=1, settings={})
    assert (run.useful_tokens, run.trained_tokens, run.computed_tokens, run.losses) == ([15], [6], [39], [0.75])
    pairs, hidden, width = 9 + 25 + 49, 32, 32
    layer = 2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * 2 * hidden
    assert run.flops == [6 * (15 * layer + 6 * 400 * hidden) + 12 * width * pairs]


def test_the_shape_of_a_folder_is_that_of_the_model_in_it(teacher, tokenizer):
    shape, work = folder_shape(str(teacher)), Work(tokens=10, head_tokens=4, pairs=100)
    layer = 3 * 32 * 32 + 3 * 32 * 64
    assert forward_flops(shape, work) == 2 * (10 * 5 * layer + 4 * len(tokenizer) * 32) + 4 * 5 * 32 * 100
    assert training_flops(shape, work) == 3 * forward_flops(shape, work)


# ---- two real runs ----


def kl_of_first_step(spec: dict) -> tuple[float, int]:
    """The forward KL a trained token of the first step, row by row in fp64, and the count of trained tokens."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(spec[name], dtype=torch.float64) for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["student"])
    total, count = 0.0, 0
    for row in rows.read_rows([Path(spec["rows"])])[: spec["batch_rows"]]:
        out = tokenizer.apply_chat_template(
            row["messages"], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        trained = torch.tensor(out["assistant_masks"], dtype=torch.bool)[1:]
        with torch.no_grad():
            p, q = (m(torch.tensor([out["input_ids"]])).logits[0, :-1].log_softmax(-1) for m in (teacher, student))
        total += float((p.exp() * (p - q)).sum(-1)[trained].sum())
        count += int(trained.sum())
    return total / count, count


def test_the_peer_trains_the_answers_and_their_ends_and_nothing_else(tokenizer):
    from benchmarks.peer_stages.distill.trl_side import labelled

    row = labelled(tokenizer, conversation(3)["messages"], template=MARKED, length=200)
    kept = [i for i in row["labels"] if i != -100]
    assert tokenizer.decode(kept) == "The answer is 3<|im_end|>I do not know.<|im_end|>"
    assert row["input_ids"] == tokenizer.apply_chat_template(conversation(3)["messages"], return_dict=False)
    short = labelled(tokenizer, conversation(3)["messages"], template=MARKED, length=20)
    assert len(short["input_ids"]) == len(short["labels"]) == 20


def test_both_sides_did_the_same_work_and_lost_the_forward_kl_of_the_definition(make_spec):
    spec = make_spec("--student-layers", "3")
    pair = Pair(ptl=distill.run_ptl(spec), peer=distill.run_peer(spec))
    check_same_work(pair)
    expected, count = kl_of_first_step(spec)
    for run in (pair.ptl, pair.peer):
        assert run.trained_tokens[0] == count
        assert run.losses[0] == pytest.approx(expected, rel=1e-5)
        assert run.losses[0] > 0.05  # the student is not the teacher
        assert run.flops == pair.ptl.flops and len(run.seconds) == 2
    assert pair.ptl.losses[1] == pytest.approx(pair.peer.losses[1], rel=1e-3)  # after an update of each
    assert pair.ptl.losses[1] != pytest.approx(pair.ptl.losses[0], rel=1e-3)
