"""Group relative policy optimisation: answers to a prompt, judged, each made likelier by how it compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from ptl.data.prompts import PromptView
from ptl.functional.advantages import Baseline, Scale, batch_sums_of
from ptl.functional.importance import Importance, importance_weights
from ptl.functional.policy_loss import PolicyLoss, PolicyTokens, policy_loss
from ptl.models.logprobs import answer_logprobs, answer_logprobs_and_entropy
from ptl.models.modes import evaluating
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import ModelSpec
from ptl.models.teachers import Teacher
from ptl.objectives.base import Objective
from ptl.objectives.reference import Reference
from ptl.objectives.sampled import (
    Evaluated,
    check_policy,
    evaluation_names,
    evaluation_output,
    importance_for,
    prompt_view,
    self_check,
    tensors,
)
from ptl.rewards.base import Reward
from ptl.rewards.panel import RewardPanel
from ptl.rollout.engine import Engine
from ptl.rollout.evaluation import Evaluation
from ptl.rollout.hf import HF
from ptl.rollout.ranks import added
from ptl.rollout.rollouts import Rollouts
from ptl.rollout.selfcheck import SelfCheck
from ptl.rollout.settings import Rollout
from ptl.rollout.tool_turns import ToolUse
from ptl.types import LossOutput, PromptBatch, RolloutBatch


class GRPO(Objective):
    """Reinforcement learning from rewards that can be computed (DeepSeekMath, arXiv:2402.03300; R1, arXiv:2501.12948).

    Each optimizer step takes prompts from the data as every objective does: ``world_size * accumulate_grad_batches *
    data.micro_batch_size`` of them. The policy answers each ``rollout.group_size`` times, the rewards judge the
    answers, an answer's advantage is how its reward compares with its group's, and the loss makes its tokens likelier
    or less likely by that. The loss is divided once, over the optimizer window and all ranks, as ``loss.kind`` says.

    Arguments:
        policy: the model that is trained; an instruction-tuned or fine-tuned one.
        rewards: what judges an answer; their weighted sum is its reward.
        rollout: how answers are sampled.
        engine: what draws them; None draws from the policy in this process.
        loss: which loss, with its clipping, the divergence from the reference and the entropy bonus. ``loss.constant``
            is ``rollout.max_new_tokens`` where it is left out.
        baseline, scale: what a reward is compared with and divided by, see ``advantages_of``.
        importance: weights that make up for an engine that computes otherwise than the trainer. ``auto``: none for the
            engine that draws from the policy itself, else the ratio of a token's probabilities cut at 2.
        reference: the frozen model that ``loss.kl`` holds the policy to; None is the policy before training. Nothing is
            loaded where ``loss.kl`` is 0.
        tools: what an answer may use on its way: where it calls one, the result is put behind the call and the policy
            goes on. What a tool said is in the context and never trained.
        error_limit: most answers in a hundred that rewards may fail on, see ``RewardPanel``.
        evaluation: how held-out prompts are answered and measured.
        self_check: limits of the check before the first step.
        optimizer: its optimizer; a tenth of fine-tuning's learning rate, or less, is usual.
        schedule: its learning rate over the run.

    Raises:
        ValueError: settings that exclude each other, with the keys to change.
    """

    has_perplexity = False

    def __init__(
        self,
        policy: ModelSpec,
        rewards: list[Reward],
        *,
        rollout: Rollout | None = None,
        engine: Engine | None = None,
        loss: PolicyLoss | None = None,
        baseline: Baseline = "group",
        scale: Scale = "group",
        importance: Importance | Literal["auto"] | None = "auto",
        reference: Teacher | None = None,
        tools: ToolUse | None = None,
        error_limit: float = 0.1,
        evaluation: Evaluation | None = None,
        self_check: SelfCheck | None = None,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(policy, optimizer=optimizer or Optimizer(lr=1e-6), schedule=schedule)
        rollout, engine, loss = rollout or Rollout(), engine or HF(), loss or PolicyLoss()
        check_policy(policy, engine)
        if rollout.group_size < 2 and (baseline in ("group", "leave_one_out") or scale == "group"):
            raise ValueError(
                f"model.rollout.group_size is {rollout.group_size}, and baseline {baseline} with scale {scale} "
                "compares the answers to a prompt with each other: set group_size to 2 or more, or baseline batch and "
                "scale batch or none"
            )
        if loss.constant is None:
            loss = dataclasses.replace(loss, constant=rollout.max_new_tokens)
        self.policy_loss = loss
        self.baseline: Baseline = baseline
        self.scale: Scale = scale
        self.importance = importance_for(engine, importance)
        self.evaluation, self.self_check = evaluation or Evaluation(), self_check or SelfCheck()
        self.rollouts = Rollouts(rollout, engine, RewardPanel(rewards, error_limit=error_limit), tools)
        self.rollouts.solver(self.evaluation)
        self.view = PromptView(room=rollout.max_new_tokens, windows=rollout.minibatches, passes=rollout.epochs)
        self._reference = Reference(policy, reference) if loss.kl else None
        self._fresh, self._checked = False, False

    @classmethod
    def view_of(cls, arguments: Mapping[str, Any]) -> PromptView:
        return prompt_view(arguments)

    # ---- building ----

    def configure_model(self) -> None:
        super().configure_model()
        if self._reference is not None:
            self._reference.build(self.policy)

    def teardown(self, stage: str) -> None:
        if self._reference is not None:
            self._reference.close()
        self.rollouts.close()

    def names_of(self, stage: str) -> tuple[str, ...]:
        if stage != "train":
            return ("loss", *evaluation_names(self.evaluation, self.rollouts, self.source_names(stage)))
        return ("loss", *_METRICS, *self.rollouts.metric_names)

    # ---- rollouts ----

    def prepare(self, batch: PromptBatch) -> RolloutBatch | Evaluated:
        """Answers to the batch's prompts: sampled where it is the first of its rollout, else out of the buffer."""
        how: dict[str, Any] = {
            "data": self.data,
            "strategy": self.trainer.strategy,
            "version": self.trainer.global_step,
        }
        if batch.turn is None:
            return Evaluated(self.rollouts.evaluate(self.policy, batch, self.evaluation, **how))
        if not self.rollouts.has(batch):
            self._fresh = not self.rollouts.restore(batch)
            if self._fresh:
                self._fill(batch, how)
        return self._micro_batch(batch.turn.window, batch.turn.micro)

    def _fill(self, batch: PromptBatch, how: dict[str, Any]) -> None:
        buffer, strategy = self.rollouts.fill(self.policy, batch, **how), self.trainer.strategy
        sums = None
        if "batch" in (self.baseline, self.scale):
            rewards = [group.rewards() for group in buffer.groups] or [torch.zeros(0)]
            sums = added(strategy, batch_sums_of(torch.cat(rewards)))
        buffer.set_advantages(self.baseline, self.scale, sums)
        buffer.weights = added(strategy, torch.from_numpy(buffer.own_weights(self.policy_loss))).numpy()

    def _micro_batch(self, window: int, micro: int) -> RolloutBatch:
        buffer = self.rollouts.buffer
        assert buffer is not None
        batch = buffer.batch(window, micro, self.trainer.accumulate_grad_batches, self.rollouts.collation(self.data))
        return move_data_to_device(batch, self.device)

    def _keep(self, batch: RolloutBatch, name: str, values: Tensor) -> None:
        buffer = self.rollouts.buffer
        assert buffer is not None
        buffer.keep(batch.window, batch.micro, self.trainer.accumulate_grad_batches, name, values)

    # ---- the loss ----

    def loss(self, batch: RolloutBatch) -> LossOutput:
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        if self._fresh:
            self._fresh = False
            self._check(batch)
            self._score_later_steps()
            metrics = tensors(self.rollouts.take_sums(), batch.rewards.device)
        settings, answers = self.rollouts.settings, batch.answers
        old, entropy = batch.tokens.get("old"), None
        if self.policy_loss.entropy or self.wants_details:
            logprobs, entropy = answer_logprobs_and_entropy(self.policy, answers, settings.temperature)
        else:
            foreseen = self._foreseen(batch) if old is None else None
            logprobs = answer_logprobs(self.policy, answers, settings.temperature, foreseen)
        if old is None:
            # No update has been made since these were sampled: the ratio is 1, and not nearly 1.
            old = logprobs.detach()
            if settings.epochs > 1:
                self._keep(batch, "old", old)
        mask, sequences = torch.ones_like(old, dtype=torch.bool), len(batch.rewards)
        correction = None
        if self.importance is not None:
            behaviour = batch.tokens["behaviour"]
            correction = importance_weights(old, behaviour, mask, answers.owners, sequences, self.importance)
            metrics |= correction.metrics
        reference = None
        if self._reference is not None:
            reference = self._reference.logprobs(self.policy, answers, settings.temperature)
        out = policy_loss(
            PolicyTokens(
                logprobs=logprobs,
                old=old,
                advantages=batch.tokens["advantages"],
                mask=mask,
                owners=answers.owners,
                sequences=sequences,
                reference=reference,
                correction=None if correction is None else correction.weights,
                entropy=entropy,
                group_tokens=batch.group_tokens,
            ),
            self.policy_loss,
        )
        return out._replace(metrics={"loss": (out.total.detach(), out.weight), **out.metrics, **metrics})

    def _foreseen(self, batch: RolloutBatch) -> Tensor | None:
        """What the gradient of the log-probabilities is at a ratio of 1, up to a factor; None where it is not known."""
        if self.importance is not None or self._reference is not None:
            return None
        owners, sequences = batch.answers.owners, len(batch.rewards)
        mask = torch.ones_like(owners, dtype=torch.bool)
        weights = self.policy_loss.weights(mask, owners, sequences, group_tokens=batch.group_tokens)
        return batch.tokens["advantages"] * weights.tokens

    def _check(self, batch: RolloutBatch) -> None:
        """The self-check, on the first rollout that this process has sampled."""
        if self._checked:
            return
        starts = self.trainer.global_step == 0 and self._reference is not None and self._reference.is_start
        held, strategy = self._reference if starts else None, self.trainer.strategy
        self_check(self.policy, batch, self.rollouts, self.self_check, strategy=strategy, reference=held)
        self._checked = True

    @torch.no_grad()
    def _score_later_steps(self) -> None:
        """Log-probabilities, before the first update, of the answers that later steps of the rollout train on."""
        buffer = self.rollouts.buffer
        assert buffer is not None
        for window in range(1, buffer.count):
            for micro in range(self.trainer.accumulate_grad_batches):
                batch = self._micro_batch(window, micro)
                with evaluating(self.policy):
                    old = answer_logprobs(self.policy, batch.answers, self.rollouts.settings.temperature)
                self._keep(batch, "old", old)

    # ---- evaluation ----

    def validation_step(self, batch: Evaluated, batch_idx: int) -> None:
        self._collect("val", evaluation_output(batch, self.rollouts, self.device, self.source_names("val")))

    def test_step(self, batch: Evaluated, batch_idx: int) -> None:
        self._collect("test", evaluation_output(batch, self.rollouts, self.device, self.source_names("test")))

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        unfinished = bool(self.trainer.datamodule and self.data.state_dict().get("inner"))  # pyright: ignore
        checkpoint["rollout"] = self.rollouts.state(unfinished)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.rollouts.load(checkpoint.get("rollout", []))


_METRICS = (
    *("ratio", "clip_low", "clip_high", "dual_clip", "policy_kl", "reference_kl", "entropy"),
    *("mismatch", "mismatch_kl", "weight", "weight_square", "weight_clipped"),
)
