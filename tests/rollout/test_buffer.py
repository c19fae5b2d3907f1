"""Answers in the buffer: dealt to micro-batches whole, weighed as the loss says, and back from a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptl.functional.policy_loss import PolicyLoss
from ptl.rollout.buffer import Answer, Buffer, Collation, Group

HOW = Collation("packed", 0, True)


def make(groups: int = 5, window_size: int = 3, seed: int = 0) -> Buffer:
    rng = np.random.default_rng(seed)
    made = []
    for position in range(groups):
        answers = []
        for place in range(3):
            ids = rng.integers(5, 90, rng.integers(1, 9)).astype(np.int32)
            trained = np.full(len(ids), position != 1 or place != 0)
            logprobs = -rng.random(len(ids)).astype(np.float32)
            tokens = {"behaviour": logprobs, "advantages": np.full(len(ids), place - 1, np.float32)}
            answers.append(Answer(ids, trained, place != 2, 0, float(place), tokens=tokens))
        prompt = rng.integers(5, 90, rng.integers(1, 5)).astype(np.int32)
        made.append(Group(position, position // window_size, position, position % 2, prompt, answers))
    return Buffer(0, 0, -(-groups // window_size), made)


def trained_ids(buffer: Buffer, window: int) -> list[int]:
    groups = buffer.window(window)
    return sorted(t for group in groups for answer in group.answers for t in answer.ids[answer.trained].tolist())


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
def test_every_trained_token_is_in_one_micro_batch_whatever_their_number(accumulate):
    buffer = make()
    for window in range(buffer.count):
        batches = [buffer.batch(window, micro, accumulate, HOW) for micro in range(accumulate)]
        assert sorted(t for batch in batches for t in batch.answers.targets.tolist()) == trained_ids(buffer, window)
        for batch in batches:
            assert all(len(of) == len(batch.answers.targets) for of in batch.tokens.values())
            ids = batch.answers.tokens.input_ids.flatten()
            owned = torch.bincount(batch.answers.owners, minlength=len(batch.rewards))
            assert len(owned) == len(batch.rewards) and len(ids) > 0


def test_a_rank_without_a_prompt_has_a_batch_that_trains_nothing():
    buffer = Buffer(0, 0, 1, [])
    batch = buffer.batch(0, 0, 2, HOW)
    assert len(batch.answers.targets) == 0 and len(batch.rewards) == 1
    assert buffer.own_weights(PolicyLoss(kind="dapo")).tolist() == [0.0]


@pytest.mark.parametrize("kind", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_the_weights_known_ahead_are_those_of_the_batches(kind):
    buffer, loss = make(), PolicyLoss(kind=kind, constant=9)
    for window, weight in enumerate(buffer.own_weights(loss)):
        total = 0.0
        for micro in range(2):
            batch = buffer.batch(window, micro, 2, HOW)
            owners = batch.answers.owners
            mask = torch.ones(len(owners), dtype=torch.bool)
            total += float(loss.weights(mask, owners, len(batch.rewards), group_tokens=batch.group_tokens).total)
        assert total == pytest.approx(weight)


def test_what_is_kept_comes_back_with_its_token_under_another_accumulation():
    buffer = make()
    for window in range(buffer.count):
        for micro in range(2):
            batch = buffer.batch(window, micro, 2, HOW)
            buffer.keep(window, micro, 2, "old", batch.answers.targets.float() / 7)
    for window in range(buffer.count):
        batch = buffer.batch(window, 0, 1, HOW)
        assert torch.equal(batch.tokens["old"], batch.answers.targets.float() / 7)


def test_law_6_a_buffer_is_whole_after_a_checkpoint_on_any_rank(tmp_path):
    buffer = make()
    buffer.weights = np.array([3.5, 1.25])
    parts = [Buffer(0, 0, 2, buffer.groups[:2]), Buffer(0, 0, 2, buffer.groups[2:])]
    for part in parts:
        part.weights = buffer.weights
    torch.save([part.state() for part in parts], tmp_path / "buffer.pt")
    states = torch.load(tmp_path / "buffer.pt", weights_only=True)
    again = Buffer.restored(states, np.array([4, 1, 3]))
    assert again.weights.tolist() == [3.5, 1.25] and [group.position for group in again.groups] == [4, 1, 3]
    for group in again.groups:
        for answer, before in zip(group.answers, buffer.groups[group.position].answers, strict=True):
            assert answer.ids.tolist() == before.ids.tolist() and answer.trained.tolist() == before.trained.tolist()
            assert answer.reward == before.reward and answer.finished == before.finished
            assert answer.tokens["behaviour"].tolist() == before.tokens["behaviour"].tolist()
    with pytest.raises(ValueError, match="holds no answers to the prompt at position 9"):
        Buffer.restored(states, np.array([9]))
