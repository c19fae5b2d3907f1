"""Rankings of a file under a reward model: nothing lost, nothing cut, the same score in any batch."""

import json

import numpy as np
import pytest
import torch

from ptl.data.render import Renderer
from ptl.data.reward_ensemble import combined, disagreement, normalised, scale_of
from ptl.data.scored_rankings import batches, measure, read_rankings, render_rankings, score_examples
from ptl.models import scoring
from tests import reward_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tokenizer):
    folder = reward_parts.save_base(tmp_path_factory.mktemp("reward") / "base", tokenizer)
    return reward_parts.reward_policy(folder), Renderer(tokenizer)


# ---- reading ----


def test_law_8_every_row_is_read_or_counted(tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [good, {**good, "chosen": None}, {**good, "subset": "x"}, {"prompt": "a", "chosen": "b"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    found = read_rankings(str(file))
    assert found.read == 5 == len(found.records) + sum(reason.count for reason in found.left_out.values())
    assert found.left_out["broken_json"].examples[0].startswith(f"{file}:5")
    assert [record.origin.line for record in found.records] == [1, 3] and found.subsets == ["(none)", "x"]


def test_a_subset_column_has_to_be_there_if_it_was_asked_for(tmp_path):
    file = reward_parts.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "k": 7}])
    assert read_rankings(str(file)).subsets is None
    assert read_rankings(str(file), subset_column="k").subsets == ["7"]
    with pytest.raises(ValueError, match="no row has a column 'part'"):
        read_rankings(str(file), subset_column="part")


def test_rows_that_are_no_rankings_are_refused(tmp_path):
    file = reward_parts.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="rows are no rankings, they have the keys \\['completion', 'prompt'\\]"):
        read_rankings(str(file))
    with pytest.raises(ValueError, match="no such file"):
        read_rankings(str(tmp_path / "nowhere.jsonl"))


def test_law_8_a_row_that_is_too_long_is_counted_and_never_cut(tmp_path, tokenizer):
    rows = reward_parts.ranking_rows(6)
    rows[2]["completions"][1] = "fox " * 300
    file = reward_parts.write_jsonl(tmp_path / "rows.jsonl", rows)
    found = render_rankings(read_rankings(str(file)).records, Renderer(tokenizer), 200)
    assert [example is None for example in found.examples] == [False, False, True, False, False, False]
    assert found.left_out["too_long"].count == 1
    assert "longer than the 200 tokens that the model holds" in found.left_out["too_long"].examples[0]
    assert not any(example["truncated"] for example in found.examples if example)


# ---- scoring ----


@pytest.mark.parametrize("budget", [1, 150, 10_000])
def test_scores_are_the_objectives_in_any_batch_and_in_order(budget, parts):
    objective, renderer = parts
    found = reward_parts.examples(renderer, reward_parts.ranking_rows(9))
    own = torch.cat([reward_parts.own_scores(objective, [one], layout="padded", share=False) for one in found])
    done: list[int] = []
    scores = score_examples(objective.policy, found, batch_tokens=budget, progress=done.append)
    assert [len(one) for one in scores] == [len(one["suffixes"]) for one in found] and sum(done) == len(found)
    assert np.allclose(np.concatenate(scores), own.numpy(), atol=1e-5)
    assert {1: len(done) == 9, 150: 1 < len(done) < 9, 10_000: len(done) == 1}[budget]


def test_a_model_that_takes_no_packed_rows_is_given_padded_ones(parts, monkeypatch):
    objective, renderer = parts
    found = reward_parts.examples(renderer, reward_parts.ranking_rows(5))
    expected = score_examples(objective.policy, found, batch_tokens=400)

    def refuse(model, batch, parents=None):
        if batch.cu_seqlens is not None:
            raise ValueError("packed documents would mix")
        return real(model, batch, parents=parents)

    real = scoring.hidden_states
    monkeypatch.setattr(scoring, "hidden_states", refuse)
    scores = score_examples(objective.policy, found, batch_tokens=400)
    assert np.allclose(np.concatenate(scores), np.concatenate(expected), atol=1e-5)


def test_batches_keep_to_the_budget_and_lose_no_prompt(parts):
    found = reward_parts.examples(parts[1], reward_parts.ranking_rows(20))
    for layout in ("packed", "padded"):
        made = list(batches(found, 200, layout))
        assert sorted(index for batch in made for index in batch) == list(range(20))
        for batch in made:
            lengths = [ids for index in batch for ids in reward_parts.documents([found[index]])]
            size = sum(len(found[index]["ids"]) for index in batch)
            size = size if layout == "packed" else len(lengths) * max(map(len, lengths))
            assert size <= 200 or len(batch) == 1


def test_a_score_that_is_not_finite_is_an_error(parts):
    objective, renderer = parts
    found = reward_parts.examples(renderer, reward_parts.ranking_rows(2))
    head = objective.policy.score.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.fill_(float("nan"))
    try:
        with pytest.raises(ValueError, match="scores of prompt 1 are not finite"):
            score_examples(objective.policy, found, batch_tokens=1000)
    finally:
        with torch.no_grad():
            head.copy_(kept)


# ---- measures ----


def example(ranks, lengths=None):
    return {"ranks": np.array(ranks, np.float32), "suffixes": lengths or [5] * len(ranks)}


def test_measures_are_over_pairs_of_all_prompts():
    scores = [np.array([2.0, 1.0], np.float32), np.array([0.0, 0.0, 3.0, 1.0], np.float32)]
    found = measure(scores, [example([1, 2]), example([1, 2, 2, 2], [100, 5, 5, 5])])
    assert found["pairs"] == 4 and found["accuracy"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert found["prompts"] == 2 and found["best_of_k"] == 0.0 and found["best_of_k_prompts"] == 1
    assert found["by_length"][2] == {"longer_by": "-16 to 16", "pairs": 1, "accuracy": 1.0}
    assert found["by_length"][4] == {"longer_by": "65 and more", "pairs": 3, "accuracy": pytest.approx(0.5 / 3)}


def test_an_ensemble_weighs_its_members_alike_whatever_their_size():
    """Member b shouts: its scores are a hundred times larger, and wrong on the first prompt."""
    a = [np.array([1.0, -1.0]), np.array([1.0, -1.0])]
    b = [np.array([-50.0, 50.0]), np.array([200.0, -200.0])]
    ranks = [np.array([1.0, 2.0])] * 2
    scaled = [normalised(a, scale_of({"mean": 0.0, "std": 1.0}, a)), normalised(b, scale_of(None, b))]
    assert scale_of({"mean": 0.0, "std": 1.0}, a).source == "ptl_reward.json"
    assert scale_of({"mean": None, "std": None}, b).source == "the rows of this file"
    assert np.std(np.concatenate(scaled[1])) == pytest.approx(1)
    together = combined(scaled)
    assert together["mean"][0][0] > together["mean"][0][1]  # a alone is right there, and is heard
    assert np.array_equal(together["worst"][1], np.minimum(scaled[0][1], scaled[1][1]))
    found = disagreement(scaled, ranks)
    spread = [np.std([one[i][0] - one[i][1] for one in scaled]) for i in range(2)]
    assert found["right_pairs"] == pytest.approx(np.mean(spread)) and found["wrong_pairs"] is None
    flipped = disagreement(scaled, [ranks[0], ranks[0][::-1]])
    assert flipped["right_pairs"] == pytest.approx(spread[0])
    assert flipped["wrong_pairs"] == pytest.approx(spread[1])
    assert found["answers"] == pytest.approx(np.stack([np.concatenate(one) for one in scaled]).std(0).mean())


def test_a_member_without_deviation_says_nothing():
    flat = [np.array([3.0, 3.0])]
    assert np.array_equal(normalised(flat, scale_of(None, flat))[0], [0.0, 0.0])
