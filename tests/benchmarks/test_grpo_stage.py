"""The GRPO stage: the same prompts for both sides, answers that cannot end, and two real runs of the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmarks import peers
from benchmarks.peer_stages import grpo
from benchmarks.peer_tools import rows
from benchmarks.peer_tools.compare import Pair, check_same_work
from ptl.rollout.hf import HF
from ptl.rollout.hf_cb import HFContinuous
from ptl.rollout.vllm import VLLM
from tests import tiny
from tests.benchmarks.test_distill_stage import MARKED, conversation


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("model"), tiny.make_tokenizer())


@pytest.fixture
def make_spec(model, tmp_path):
    source, template = tmp_path / "source.jsonl", tmp_path / "marked.jinja"
    rows.write_rows(source, [conversation(n) for n in range(40)])
    template.write_text(MARKED, encoding="utf-8")

    def make(*more: str) -> dict:
        given = ["--stage", "grpo", "--policy", "model", "--model", str(model), "--rows", str(source)]
        given += ["--tokens", "20", "200", "--steps", "2", "--group", "4", "--new-tokens", "8", "--lr", "1e-2"]
        args = peers.parse([*given, "--trl-template", str(template), *more])
        return json.loads(json.dumps(grpo.make_spec(args, tmp_path)))

    return make


def test_prompts_are_printed_as_before_and_an_answer_ends_with_what_no_model_writes(make_spec, model):
    spec = make_spec()
    ours, own = AutoTokenizer.from_pretrained(spec["model"]), AutoTokenizer.from_pretrained(model)
    prompts = [json.loads(line)["prompt"] for line in Path(spec["rows"]).read_text(encoding="utf-8").splitlines()]
    assert len(prompts) == 4
    for prompt in prompts:
        texts = [t.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for t in (ours, own)]
        assert texts[0] == texts[1] and grpo.END not in texts[0]
    answered = [*prompts[0], {"role": "assistant", "content": "yes"}]
    assert f"yes{grpo.END}" in ours.apply_chat_template(answered, tokenize=False)
    assert ours.eos_token_id >= AutoConfig.from_pretrained(spec["model"]).vocab_size


def test_the_rule_tells_answers_apart():
    assert grpo.rule("aeiou") == 1.0 and grpo.rule("xyz") == grpo.rule("") == 0.0 and grpo.rule("ab") == 0.5


@pytest.mark.parametrize("more", [("--group", "1"), ("--trl-micro", "3")])
def test_refuses_what_does_not_divide(make_spec, more):
    with pytest.raises(ValueError, match="--group must be|--trl-micro 3"):
        make_spec(*more)


@pytest.mark.parametrize("engine, ours", [("hf", HF), ("continuous", HFContinuous), ("vllm", VLLM)])
def test_both_sides_draw_with_the_engine_that_is_asked(make_spec, engine, ours):
    pytest.importorskip("trl")
    from benchmarks.peer_stages.grpo import ptl_side, trl_side

    spec = make_spec("--engine", engine)
    assert type(ptl_side.engine_of(spec)) is ours
    given = trl_side.settings(spec)
    assert given["use_vllm"] == (engine == "vllm")
    assert given.get("use_transformers_continuous_batching", False) == (engine == "continuous")
    assert given.get("vllm_max_model_length") == (spec["max_length"] if engine == "vllm" else None)


@pytest.mark.timeout(280)
def test_both_sides_draw_and_train_the_same_number_of_tokens(make_spec):
    pytest.importorskip("trl")
    spec = make_spec()
    pair = Pair(ptl=grpo.run_ptl(spec), peer=grpo.run_peer(spec))
    check_same_work(pair)
    assert pair.ptl.trained_tokens == [2 * 4 * 8] * 2
    assert sum(pair.ptl.computed_tokens) < sum(pair.peer.computed_tokens)
    assert all(abs(loss) < 1e-4 for run in (pair.ptl, pair.peer) for loss in run.losses)
