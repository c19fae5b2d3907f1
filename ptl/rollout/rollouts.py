"""From prompts to judged answers: what GRPO and PPO have in common, beside the loss.

A rollout is filled on the first micro-batch that names it, by all ranks together, and serves the steps that it is for.
What is sampled is a function of the weights, the seed and the prompt's position in the epoch (with an engine that is
reproducible): not of ranks, accumulation or micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ptl.data.prompts import record_of
from ptl.data.render import stop_token_ids
from ptl.functional.advantages import tells_apart
from ptl.rewards.base import Completion, Outcome
from ptl.rewards.panel import RewardPanel
from ptl.rollout.buffer import Answer, Buffer, Collation, Group
from ptl.rollout.engine import Asked, Draw, Draws, Engine
from ptl.rollout.evaluation import Evaluation, Rated, measures
from ptl.rollout.ranks import agreed, of_all_ranks
from ptl.rollout.sampling import numbered
from ptl.rollout.settings import Rollout
from ptl.rollout.shown import said_at_last
from ptl.rollout.tool_turns import ToolUse, Written, answered_with_tools, one_turn
from ptl.types import Prompt, PromptBatch

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from ptl.data.module import ChatDataModule

PROMPT_END = 64
"""Tokens of a prompt's end that rewards see as text."""
Sums = dict[str, tuple[float, float]]


class Rollouts:
    """Samples, judges and keeps answers.

    Arguments:
        settings: how training samples.
        engine: where answers come from.
        panel: the rewards.
        tools: what an answer may use on its way, see ``ToolUse``.

    Attributes:
        buffer: of the rollout that is trained on; None before the first.
        evaluated: the groups of the latest evaluation's last batch.
        rated: how often each of its prompts was answered right.
    """

    def __init__(self, settings: Rollout, engine: Engine, panel: RewardPanel, tools: ToolUse | None = None) -> None:
        self.settings, self.engine, self.panel, self.tools = settings, engine, panel, tools
        self._box = tools.toolbox() if tools else None
        self.buffer: Buffer | None = None
        self.evaluated: list[Group] = []
        self.rated: list[Rated] = []
        self._restored: list[dict[str, Any]] | None = None
        self._sums: Sums = {}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names that ``take_sums`` may hold."""
        return (*self.panel.metric_names, *_OWN, *(_TOOLS if self.tools else ()))

    def collation(self, data: ChatDataModule) -> Collation:
        """How the buffer's batches are laid out."""
        pad = data.renderer.tokenizer.pad_token_id
        return Collation(data.layout, pad if isinstance(pad, int) else 0, self.settings.share_prompt)

    # ---- training ----

    def has(self, batch: PromptBatch) -> bool:
        """Whether the buffer is the one that a training batch is a part of."""
        turn = batch.turn
        return turn is not None and self.buffer is not None and self.buffer.key == (turn.epoch, turn.start)

    def restore(self, batch: PromptBatch) -> bool:
        """Takes the rollout out of the checkpoint that was loaded, if it is the one that the batch is a part of."""
        states, turn = self._restored, batch.turn
        self._restored = None
        if not states or turn is None or (states[0]["epoch"], states[0]["start"]) != (turn.epoch, turn.start):
            return False
        self.buffer = Buffer.restored(states, batch.positions)
        return True

    def fill(
        self, policy: nn.Module, batch: PromptBatch, *, data: ChatDataModule, strategy: Strategy, version: int
    ) -> Buffer:
        """Samples and judges answers to the prompts of a training batch; all ranks together.

        Raises:
            RewardError: rewards failed too often.
            RuntimeError: another rank failed.
        """
        turn = batch.turn
        assert turn is not None
        groups: list[Group] = []
        self._sums = {}
        began = time.perf_counter()
        with self.engine.session(policy, strategy, version) as draw:
            agreed(strategy, lambda: groups.extend(self._filled(draw, batch, data, version)))
        self._add({"rollout_s": (time.perf_counter() - began, 1.0)})
        buffer = Buffer(turn.epoch, turn.start, turn.count, groups)
        for group in groups:
            for answer in group.answers:
                left_out = not np.isfinite(answer.reward) or (self.settings.mask_truncated and not answer.finished)
                answer.trained &= not left_out
        self.buffer = buffer
        return buffer

    def _filled(self, draw: Draw, batch: PromptBatch, data: ChatDataModule, version: int) -> list[Group]:
        turn, settings = batch.turn, self.settings
        assert turn is not None
        stop = stops(data)
        done: dict[int, Group] = {}
        windows = dict(zip(batch.positions.tolist(), turn.windows.tolist()))
        rows, positions, refilled = batch.rows, batch.positions, 0
        for round_ in range(settings.refill + 1):
            if not len(positions):
                break
            seed = numbered(settings.seed, turn.epoch, round_)
            draws = Draws(settings.group_size, settings.temperature, 1.0, stop, seed)
            limit = settings.max_new_tokens
            groups = self._answered(draw, "train", rows, positions, draws, limit, data=data, version=version)
            for group in groups:
                group.window = windows[group.position]
            done |= {group.position: group for group in groups}
            flat = [group for group in groups if not _signal(group)]
            positions = np.array([group.position for group in flat], np.int64)
            if round_ < settings.refill and len(positions):
                rows, refilled = data.substitutes(turn.epoch, positions, round_ + 1), refilled + len(positions)
        groups = list(done.values())
        flat = sum(not _signal(group) for group in groups)
        self._add({"zero_signal": (flat, len(groups)), "refilled": (refilled, len(groups))})
        return groups

    def take_sums(self) -> Sums:
        """What there is to log of the latest rollout on this rank, name -> (sum, weight); once."""
        sums, self._sums = self._sums, {}
        return sums

    # ---- evaluation ----

    def evaluate(
        self,
        policy: nn.Module,
        batch: PromptBatch,
        how: Evaluation,
        *,
        data: ChatDataModule,
        strategy: Strategy,
        version: int,
    ) -> dict[str, Sums]:
        """Measures of held-out prompts, by name of the data source; all ranks together."""
        names = data.source_names("val")
        by_source: dict[str, Sums] = {}
        groups: list[Group] = []
        self._sums = {}
        with self.engine.session(policy, strategy, version) as draw:
            draws = Draws(how.samples, how.temperature, how.top_p, stops(data), numbered(how.seed, -1))
            limit = how.max_new_tokens or self.settings.max_new_tokens
            rows = batch.rows[batch.real]

            def work() -> None:
                groups.extend(self._answered(draw, "val", rows, rows, draws, limit, data=data, version=version))

            agreed(strategy, work)
        solver, self.evaluated, self.rated = self.solver(how), groups, []
        for group in groups:
            solved = [_solved(answer.outcomes[solver], how.threshold) for answer in group.answers]
            self.rated.append(Rated.of(group.row, solved))
            found = measures(solved, [said_at_last(answer) for answer in group.answers], how.ks)
            found |= {
                "length": (float(sum(len(answer.ids) for answer in group.answers)), float(len(group.answers))),
                "finished": (float(sum(answer.finished for answer in group.answers)), float(len(group.answers))),
            }
            rewards = [answer.reward for answer in group.answers if np.isfinite(answer.reward)]
            found["reward"] = (float(sum(rewards)), float(len(rewards)))
            merge(by_source.setdefault(names[group.source], {}), found)
        return by_source

    def solver(self, how: Evaluation) -> str:
        """The name of the reward that says whether an answer is right.

        Raises:
            ValueError: there is no reward of that name.
        """
        known = [reward.name for reward in self.panel.rewards]
        if how.solved_by is None:
            return max(self.panel.rewards, key=lambda reward: reward.weight).name
        if how.solved_by not in known:
            raise ValueError(f"model.evaluation.solved_by is {how.solved_by!r}; the rewards are {', '.join(known)}")
        return how.solved_by

    # ---- both ----

    def _answered(
        self,
        draw: Draw,
        part: str,
        rows: np.ndarray,
        positions: np.ndarray,
        draws: Draws,
        most: int,
        *,
        data: ChatDataModule,
        version: int,
    ) -> list[Group]:
        """Groups with their rewards, in the order of the rows."""
        examples = data.rows(part, rows.tolist()) if len(rows) else []
        asked = [
            Asked(example["ids"].tolist(), position, min(most, data.max_length - len(example["ids"])))
            for example, position in zip(examples, positions.tolist())
        ]
        began = time.perf_counter()
        records = [record_of(example["prompt"]) for example in examples]
        drawn = self._drawn(draw, asked, draws, records, data) if asked else []
        self._add({"generate_s": (time.perf_counter() - began, 1.0)})
        groups = []
        for example, record, position, answers in zip(examples, records, positions.tolist(), drawn):
            prompt = np.asarray(example["ids"], np.int32)
            end = data.renderer.tokenizer.decode(prompt[-PROMPT_END:].tolist())
            kept = [_answer(written, version) for written in answers]
            for answer, written in zip(kept, answers):
                answer.said = Completion(
                    prompt=record,
                    prompt_text=str(end),
                    text=written.text,
                    ids=written.ids,
                    finished=written.finished,
                    results=tuple(result.text for result in written.results),
                )
            groups.append(Group(position, 0, example["row"], int(example["source"]), prompt, kept))
        flat = [answer for group in groups for answer in group.answers]
        began = time.perf_counter()
        judged = self.panel.score([answer.said for answer in flat if answer.said is not None])
        self._add({"reward_s": (time.perf_counter() - began, 1.0), **judged.metrics})
        for place, (answer, total) in enumerate(zip(flat, judged.totals)):
            answer.reward = total
            answer.outcomes = {name: outcomes[place] for name, outcomes in judged.outcomes.items()}
        self._add(
            {
                "length": (float(sum(len(answer.ids) for answer in flat)), float(len(flat))),
                "finished": (float(sum(answer.finished for answer in flat)), float(len(flat))),
            }
        )
        return groups

    def _drawn(
        self, draw: Draw, asked: Sequence[Asked], draws: Draws, records: Sequence[Prompt], data: ChatDataModule
    ) -> list[list[Written]]:
        """K answers to each prompt, with tools where there are some."""
        renderer = data.renderer
        if self._box is None or self.tools is None:
            drawn = draw(asked, draws)
            return [[one_turn(sampled, renderer, draws.stop) for sampled in answers] for answers in drawn]
        written = answered_with_tools(draw, draws, asked, records, renderer, self._box, self.tools.rounds)
        flat = [answer for answers in written for answer in answers]
        results = [result for answer in flat for result in answer.results]
        self._add(
            {
                "tool_calls": (float(len(results)), float(len(flat))),
                "tool_failures": (float(sum(result.problem is not None for result in results)), float(len(results))),
                "tool_tokens": (float(sum(answer.own.count(False) for answer in flat)), float(len(flat))),
            }
        )
        return written

    def _add(self, sums: Sums) -> None:
        merge(self._sums, sums)

    # ---- checkpoints ----

    def state(self, unfinished: bool) -> list[dict[str, Any]]:
        """The buffers of all ranks, the same on each, where their rollout is ``unfinished``; collective then."""
        if not unfinished or self.buffer is None:
            return []
        return of_all_ranks(self.buffer.state())

    def load(self, states: list[dict[str, Any]]) -> None:
        """Keeps what a checkpoint holds until the first batch asks for it."""
        self._restored, self.buffer = states, None

    def close(self) -> None:
        """Ends the engine, the tools and the rewards."""
        self.engine.close()
        if self._box is not None:
            self._box.close()
        self.panel.close()


_OWN = ("length", "finished", "zero_signal", "refilled", "generate_s", "reward_s", "rollout_s")
_TOOLS = ("tool_calls", "tool_failures", "tool_tokens")


def stops(data: ChatDataModule) -> tuple[int, ...]:
    """Ids that end an answer.

    Raises:
        ValueError: none does.
    """
    found = tuple(stop_token_ids(data.renderer))
    if not found:
        raise ValueError(
            "no token ends an answer: the chat template prints no end of turn and the tokenizer has no EOS, so every "
            "answer would run to its limit. Set data.template to a template that ends turns (chatml), or give the "
            "tokenizer an eos_token"
        )
    return found


def _answer(written: Written, version: int) -> Answer:
    known = {"behaviour": np.asarray(written.logprobs, np.float32)} if written.logprobs else {}
    ids, own = np.asarray(written.ids, np.int32), np.asarray(written.own, bool)
    return Answer(ids, own, written.finished, version, tokens=known)


def _signal(group: Group) -> bool:
    """Whether two answers have rewards that differ."""
    return bool(tells_apart(group.rewards(), torch.zeros(len(group.answers), dtype=torch.int64)).any())


def _solved(outcome: Outcome, threshold: float) -> bool | None:
    return outcome >= threshold if isinstance(outcome, float) else None


def merge(into: Sums, more: Sums) -> None:
    """Adds sums and weights by name."""
    for name, (total, weight) in more.items():
        had = into.get(name, (0.0, 0.0))
        into[name] = (had[0] + total, had[1] + weight)
