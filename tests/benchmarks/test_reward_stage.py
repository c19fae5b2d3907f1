"""The reward stage: the same pairs for both sides, counted alike, and two real runs that did the same work."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.peer_stages import reward
from benchmarks.peer_tools import rows
from benchmarks.peer_tools.compare import Pair, check_same_work
from tests import tiny
from tests.benchmarks.test_distill_stage import MARKED, conversation


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    # Padding apart from the end of a turn is what the peer's pooling needs.
    tokenizer = tiny.make_tokenizer(special=("<|pad|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.pad_token = "<|pad|>"
    return tiny.save_folder(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture
def make_spec(model, tmp_path):
    source, template = tmp_path / "source.jsonl", tmp_path / "marked.jinja"
    rows.write_rows(source, [conversation(n) for n in range(40)])
    template.write_text(MARKED, encoding="utf-8")

    def make(*more: str) -> dict:
        given = ["--stage", "reward", "--model", str(model), "--rows", str(source), "--tokens", "20", "200"]
        given += ["--steps", "2", "--batch-rows", "2", "--micro", "1", "--lr", "1e-2"]
        args = peers.parse([*given, "--trl-template", str(template), *more])
        return json.loads(json.dumps(reward.make_spec(args, tmp_path)))

    return make


def test_the_peer_is_given_every_pair_of_every_ranking(make_spec):
    spec = make_spec("--answers", "4")
    ranked = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    paired = [json.loads(line) for line in Path(spec["pair_rows"]).read_text().splitlines()]
    assert spec["step_pairs"] == 12 and spec["trl_micro"] == 6 and len(paired) == 6 * len(ranked) == 24
    texts = [answer[0]["content"] for answer in ranked[0]["completions"]]
    assert len(set(texts)) == 4
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in paired[:4]] == [
        (texts[0], texts[1]), (texts[0], texts[2]), (texts[0], texts[3]), (texts[1], texts[2]),
    ]  # fmt: skip


def test_a_worse_answer_differs():
    rng = random.Random(0)
    for text in ("The answer is 4", "one two three", "word", ""):
        assert reward.worse(text, rng) != text


@pytest.mark.parametrize("more", [("--answers", "1"), ("--answers", "4", "--trl-micro", "5")])
def test_refuses_what_does_not_divide(make_spec, more):
    with pytest.raises(ValueError, match="--answers must be|--trl-micro 5"):
        make_spec(*more)


@pytest.mark.timeout(280)
@pytest.mark.parametrize("more", [pytest.param(("--answers", "2"), marks=pytest.mark.slow), ("--answers", "3")])
def test_both_sides_do_the_same_work_and_agree_on_the_losses(make_spec, more):
    pytest.importorskip("trl")
    spec = make_spec(*more)
    pair = Pair(ptl=reward.run_ptl(spec), peer=reward.run_peer(spec))
    check_same_work(pair)
    assert pair.ptl.losses == pytest.approx(pair.peer.losses, abs=1e-5)
    assert sum(pair.ptl.computed_tokens) < sum(pair.peer.computed_tokens)
    assert sum(pair.ptl.trained_tokens) == 2 * spec["step_pairs"]
