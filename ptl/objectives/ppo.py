"""Proximal policy optimisation: a critic says what to expect, and tokens are made likelier by how much better it went.

The file is one class, whole, with the hooks that GRPO has too. Its arithmetic is in ``ptl.functional``, the critic in
``critic``, a rollout's targets in ``ppo_targets`` and the supervised mix in ``ptx``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from ptl.data.prompts import PromptView
from ptl.functional.gae import value_loss
from ptl.functional.importance import Importance, importance_weights
from ptl.functional.kl import AdaptiveKL, FixedKL, kl_reward
from ptl.functional.policy_loss import PolicyLoss, PolicyTokens, policy_loss
from ptl.models.modes import evaluating
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import ModelSpec
from ptl.models.teachers import Teacher
from ptl.objectives.base import Objective
from ptl.objectives.critic import Said, ValueHead, check_vocabulary, critic_of, said
from ptl.objectives.ppo_settings import check_numbers, check_settings, clipped_alike, normaliser_of
from ptl.objectives.ppo_targets import NAMES, RolloutSums, numbers, targets_of, whiten_advantages
from ptl.objectives.ptx import PTX, Mix
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
from ptl.rollout.buffer import Buffer
from ptl.rollout.engine import Engine
from ptl.rollout.evaluation import Evaluation
from ptl.rollout.hf import HF
from ptl.rollout.ranks import added
from ptl.rollout.rollouts import Rollouts, Sums
from ptl.rollout.selfcheck import SelfCheck
from ptl.rollout.settings import Rollout
from ptl.rollout.tool_turns import ToolUse
from ptl.types import LossOutput, PromptBatch, RolloutBatch


class PPO(Objective):
    """Reinforcement learning with a critic (arXiv:1707.06347; on language models InstructGPT, arXiv:2203.02155).

    Prompts, answers and rewards are as in ``GRPO``. An answer's reward is given at its last token, less what the
    divergence from the reference costs at each; the critic's values make advantages of it by GAE, which are whitened
    over all trained tokens of the rollout; returns are not. The loss is the mean over the window's trained tokens, on
    all ranks, of the clipped surrogate plus ``value_factor`` times the critic's. One optimizer trains both.

    Arguments:
        policy: the model that is trained; an instruction-tuned or fine-tuned one.
        rewards: what judges an answer; their weighted sum is its reward.
        critic: the model that values start from, with a scalar head: a reward model's run folder or export, of the
            policy's vocabulary. None puts a head on the policy's own states, which costs no second model.
        rollout: how answers are sampled; None is one answer a prompt.
        engine: what draws them; None draws from the policy in this process.
        loss: clipping (None clips at 0.2 on both sides), entropy bonus and, in place of ``kl``, the divergence in the
            loss. Its kind must be ``dapo``, whose tokens are clipped and weighed as PPO's are.
        discount, decay: gamma and lambda of GAE, in [0, 1].
        value_clip: how far a value may move from what it was at the rollout, in the rewards' unit; None for no clip.
        value_factor: of the critic's loss, half a mean square. 0.5 is that of the PPO code; 0.1 is usual where the
            critic is a head on a large policy, whose weights it moves too.
        kl: coefficient of the divergence from the reference that is taken from each token's reward; None for none.
        normalise_rewards: give rewards less their running mean and over their running deviation; a number also clips
            them there.
        missing_end_penalty: taken from the reward, once it is normalised, of an answer that did not come to its end.
        bootstrap: let what the critic expects behind an answer that was cut follow its reward, as if it had gone on.
            False takes the cut for the end: right where answers are meant to reach their limit, since values would
            otherwise grow without bound.
        warm_up: first optimizer steps that train the critic alone.
        ptx: a supervised loss beside it.
        importance, tools, error_limit, evaluation, self_check: as in ``GRPO``.
        reference: the frozen model that ``kl`` or ``loss.kl`` holds the policy to; None is the policy before training.
            Nothing is loaded without the two.
        optimizer: of policy and critic; a tenth of fine-tuning's learning rate, or less, is usual.
        schedule: its learning rate over the run.

    Raises:
        ValueError: settings that exclude each other, with the keys to change.
    """

    has_perplexity = False
    critic: nn.Module
    value_head: ValueHead

    def __init__(
        self,
        policy: ModelSpec,
        rewards: list[Reward],
        *,
        critic: ModelSpec | None = None,
        rollout: Rollout | None = None,
        engine: Engine | None = None,
        loss: PolicyLoss | None = None,
        discount: float = 1.0,
        decay: float = 0.95,
        value_clip: float | None = 0.2,
        value_factor: float = 0.5,
        kl: FixedKL | AdaptiveKL | None = None,
        normalise_rewards: bool | float = False,
        missing_end_penalty: float = 0.0,
        bootstrap: bool = True,
        warm_up: int = 0,
        ptx: PTX | None = None,
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
        rollout, engine, loss = rollout or Rollout(group_size=1), engine or HF(), loss or PolicyLoss()
        check_policy(policy, engine)
        check_numbers(
            discount=discount,
            decay=decay,
            value_clip=value_clip,
            value_factor=value_factor,
            missing_end_penalty=missing_end_penalty,
            warm_up=warm_up,
        )
        check_settings(rollout, loss, kl, missing_end_penalty, warm_up, self.optimizer_spec)
        self.critic_spec = None if critic is None else critic_of(critic)
        self.policy_loss = clipped_alike(loss)
        self.discount, self.decay = discount, decay
        self.value_clip, self.value_factor = value_clip, value_factor
        self.kl, self.missing_end_penalty, self.warm_up = kl, missing_end_penalty, warm_up
        self.bootstrap = bootstrap
        self.normaliser = normaliser_of(normalise_rewards)
        self.ptx, self.importance = ptx, importance_for(engine, importance)
        self.evaluation, self.self_check = evaluation or Evaluation(), self_check or SelfCheck()
        self.rollouts = Rollouts(rollout, engine, RewardPanel(rewards, error_limit=error_limit), tools)
        self.rollouts.solver(self.evaluation)
        self.view = PromptView(room=rollout.max_new_tokens, windows=rollout.minibatches, passes=rollout.epochs)
        self._reference = Reference(policy, reference) if loss.kl or kl is not None else None
        self._mix: Mix | None = None
        self._fresh, self._checked = False, False

    @classmethod
    def view_of(cls, arguments: Mapping[str, Any]) -> PromptView:
        return prompt_view(arguments)

    # ---- building ----

    def setup(self, stage: str) -> None:
        """Reads what can be refused before a model is loaded."""
        if stage == "fit" and self.critic_spec is not None:
            check_vocabulary(self.critic_spec, self.data.renderer.tokenizer)
        if stage == "fit" and self.ptx is not None:
            self._mix = Mix(self.ptx, self.data)

    def configure_model(self) -> None:
        super().configure_model()
        if self.critic_spec is not None and not hasattr(self, "critic"):
            self.critic = self.critic_spec.build()
        if self.critic_spec is None and not hasattr(self, "value_head"):
            self.value_head = ValueHead(self.policy)
        if self._reference is not None:
            self._reference.build(self.policy)

    def teardown(self, stage: str) -> None:
        if self._reference is not None:
            self._reference.close()
        self.rollouts.close()

    def names_of(self, stage: str) -> tuple[str, ...]:
        if stage != "train":
            return ("loss", *evaluation_names(self.evaluation, self.rollouts, self.source_names(stage)))
        return ("loss", *_METRICS, *NAMES, *self.rollouts.metric_names)

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
                buffer = self.rollouts.fill(self.policy, batch, **how)
                own = torch.from_numpy(buffer.own_weights(self.policy_loss))
                buffer.weights = added(self.trainer.strategy, own).numpy()
        return self._micro_batch(batch.turn.window, batch.turn.micro)

    @property
    def _buffer(self) -> Buffer:
        assert self.rollouts.buffer is not None
        return self.rollouts.buffer

    def _micro_batch(self, window: int, micro: int) -> RolloutBatch:
        accumulate = self.trainer.accumulate_grad_batches
        batch = self._buffer.batch(window, micro, accumulate, self.rollouts.collation(self.data))
        return move_data_to_device(batch, self.device)

    def _keep(self, batch: RolloutBatch, **values: Tensor | None) -> None:
        for name, of_tokens in values.items():
            if of_tokens is not None:
                accumulate = self.trainer.accumulate_grad_batches
                self._buffer.keep(batch.window, batch.micro, accumulate, name, of_tokens)

    # ---- before the first update on a rollout ----

    def _check(self, batch: RolloutBatch) -> None:
        """The self-check, on the first rollout that this process has sampled."""
        if self._checked:
            return
        starts = self.trainer.global_step == 0 and self._reference is not None and self._reference.is_start
        held, strategy = self._reference if starts else None, self.trainer.strategy
        self_check(self.policy, batch, self.rollouts, self.self_check, strategy=strategy, reference=held)
        self._checked = True

    @torch.no_grad()
    def _set_targets(self, first: RolloutBatch) -> Sums:
        """Asks the models about all answers of the rollout, and keeps what its steps will train on.

        All ranks run the same forward passes. ``first`` is the micro-batch at hand, which need not be laid out again.
        Returns what there is to log.
        """
        buffer, strategy, normaliser = self._buffer, self.trainer.strategy, self.normaliser
        if normaliser is not None:
            rewards = [group.rewards() for group in buffer.groups] or [torch.zeros(0)]
            normaliser.add(added(strategy, normaliser.sums(torch.cat(rewards))))
        coefficient = self.kl.value if self.kl is not None else 0.0
        parts = []
        for window in range(buffer.count):
            for micro in range(self.trainer.accumulate_grad_batches):
                same = (window, micro) == (first.window, first.micro)
                batch = first if same else self._micro_batch(window, micro)
                with evaluating(self):
                    told = self._said(batch)
                held = self._reference_logprobs(batch)
                found, sums = targets_of(
                    batch,
                    self._scores(batch),
                    told.values,
                    torch.where(batch.truncated, told.after, 0.0) if self.bootstrap else torch.zeros_like(told.after),
                    kl=None if held is None else kl_reward(told.logprobs, held),
                    coefficient=coefficient,
                    discount=self.discount,
                    decay=self.decay,
                )
                # The first step's ratio must be 1 and not nearly 1: it keeps its own log-probabilities.
                self._keep(batch, old=told.logprobs if window else None, reference=held, values=told.values)
                self._keep(batch, advantages=found.advantages, returns=found.returns)
                parts.append(torch.cat(sums))
        total = RolloutSums.split(added(strategy, torch.stack(parts).sum(0)))
        whiten_advantages(buffer.groups, total.advantages)
        if self.kl is not None and self.trainer.global_step >= self.warm_up and total.divergence[1] > 0:
            divergence, answers = total.divergence.tolist()
            self.kl.update(divergence / answers, int(answers))
        return numbers(total, held=self._reference is not None, coefficient=None if self.kl is None else coefficient)

    def _scores(self, batch: RolloutBatch) -> Tensor:
        """What the last token of each answer is given, float32 [D]."""
        scores = batch.rewards if self.normaliser is None else self.normaliser(batch.rewards)
        return scores - self.missing_end_penalty * batch.truncated.to(scores.dtype)

    def _said(self, batch: RolloutBatch, **options: bool) -> Said:
        critic = self.value_head if self.critic_spec is None else self.critic
        return said(self.policy, critic, batch.answers, self.rollouts.settings.temperature, **options)

    def _reference_logprobs(self, batch: RolloutBatch) -> Tensor | None:
        if self._reference is None:
            return None
        return self._reference.logprobs(self.policy, batch.answers, self.rollouts.settings.temperature)

    # ---- the loss ----

    def loss(self, batch: RolloutBatch) -> LossOutput:
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        if self._fresh:
            self._fresh = False
            self._check(batch)
            sums = {**self.rollouts.take_sums(), **self._set_targets(batch)}
            # Whether the answers to a prompt differ in reward is nothing to PPO, which compares with the critic.
            told_of = {name: pair for name, pair in sums.items() if name not in ("zero_signal", "refilled")}
            metrics = tensors(told_of, batch.rewards.device)
            batch = self._micro_batch(batch.window, batch.micro)
        alone = self.trainer.global_step < self.warm_up
        told = self._said(batch, entropy=bool(self.policy_loss.entropy) or self.wants_details, critic_alone=alone)
        policy, correction = self._policy_loss(batch, told)
        owners, sequences = batch.answers.owners, len(batch.rewards)
        mask = torch.ones_like(owners, dtype=torch.bool)
        weights = self.policy_loss.weights(mask, owners, sequences)
        before, returns = _known(batch, "values"), _known(batch, "returns")
        value = value_loss(told.values, before, returns, mask, weights, clip=self.value_clip)
        # Times 0, not left out: every parameter must have a gradient on every rank.
        total = policy.total * (0.0 if alone else 1.0) + self.value_factor * value.total
        metrics |= {
            "loss": (total.detach(), policy.weight),
            "policy_loss": (policy.total.detach(), policy.weight),
            "value_loss": (value.total.detach(), value.weight),
        }
        if self._mix is not None and not alone:
            run = self.trainer
            how = {"world_size": run.world_size, "accumulate": run.accumulate_grad_batches}
            rows = self._mix.batch(run.global_step, batch.micro, run.global_rank, **how)
            more, metrics["ptx_loss"] = self._mix.loss(self.policy, rows.on(self.device), batch.window_weight)
            total = total + more
        return LossOutput(total, policy.weight, {**metrics, **policy.metrics, **value.metrics, **correction})

    def _policy_loss(self, batch: RolloutBatch, told: Said) -> tuple[LossOutput, dict[str, tuple[Tensor, Tensor]]]:
        """The surrogate, and what there is to log of the importance weights."""
        owners, sequences = batch.answers.owners, len(batch.rewards)
        old = batch.tokens.get("old")
        if old is None:
            # No update has been made since these were sampled: the ratio is 1, and not nearly 1.
            old = told.logprobs.detach()
            if self.rollouts.settings.epochs > 1:
                self._keep(batch, old=old)
        mask = torch.ones_like(old, dtype=torch.bool)
        correction = None
        if self.importance is not None:
            correction = importance_weights(old, _known(batch, "behaviour"), mask, owners, sequences, self.importance)
        tokens = PolicyTokens(
            logprobs=told.logprobs,
            old=old,
            advantages=_known(batch, "advantages"),
            mask=mask,
            owners=owners,
            sequences=sequences,
            reference=_known(batch, "reference") if self.policy_loss.kl else None,
            correction=None if correction is None else correction.weights,
            entropy=told.entropy,
        )
        return policy_loss(tokens, self.policy_loss), {} if correction is None else correction.metrics

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
        parts = {"normaliser": self.normaliser, "kl": self.kl}
        checkpoint["ppo"] = {name: part.state_dict() for name, part in parts.items() if part is not None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.rollouts.load(checkpoint.get("rollout", []))
        saved = checkpoint.get("ppo", {})
        for name, part in (("normaliser", self.normaliser), ("kl", self.kl)):
            if part is not None and saved.get(name):
                part.load_state_dict(saved[name])


def _known(batch: RolloutBatch, name: str) -> Tensor:
    """What is known of each trained token, [M]; a micro-batch that only fills a place has none, of whatever name."""
    empty = len(batch.answers.targets) == 0
    return torch.zeros(0, device=batch.rewards.device) if empty else batch.tokens[name]


_METRICS = (
    *("policy_loss", "value_loss", "value_error", "value_clip", "ptx_loss"),
    *("ratio", "clip_low", "clip_high", "dual_clip", "policy_kl", "reference_kl", "entropy"),
    *("mismatch", "mismatch_kl", "weight", "weight_square", "weight_clipped"),
)
