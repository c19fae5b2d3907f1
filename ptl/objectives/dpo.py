"""Direct preference optimisation: the policy itself learns from rankings, with no reward model between."""

from __future__ import annotations

import torch
from torch import Tensor

from ptl.data.groups import RankingView
from ptl.functional.preference import by_prompt, pair_loss
from ptl.functional.ranking_measures import pair_metrics
from ptl.models.logprobs import answer_logprobs
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import ModelSpec
from ptl.models.teachers import Teacher
from ptl.objectives.base import Objective
from ptl.objectives.metrics import batch_sums
from ptl.objectives.reference import Reference
from ptl.types import GroupBatch, LossOutput


class DPO(Objective):
    """Preferences without a reward model (Rafailov et al., arXiv:2305.18290, equation 7), over rankings of any length.

    With the implicit reward ``b (log p(answer) - log p_ref(answer))`` the loss of a prompt is the mean over its pairs
    of ``-log sigmoid(reward of the better - reward of the worse)``, ties as half a win for either side; a window's is
    the sum over its prompts over their number. Each answer is computed once, whatever the number of its pairs.

    Arguments:
        policy: the model that is trained.
        reference: the frozen model that the policy is held to. None is the policy before training: with an adapter the
            base under it, computed with the adapter off; without one, a frozen copy.
        beta: b, above 0: the larger, the closer the policy stays to the reference.
        label_smoothing: share of pairs whose order is taken to be wrong, in [0, 0.5).
        share_prompt: as in ``RewardModeling``.
        optimizer: its optimizer; a hundredth of fine-tuning's learning rate is usual.
        schedule: its learning rate over the run.

    Raises:
        ValueError: a number out of its range.
    """

    view = RankingView()
    metric_names = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_nll")
    has_perplexity = False

    def __init__(
        self,
        policy: ModelSpec,
        *,
        reference: Teacher | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        share_prompt: bool = True,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(policy, optimizer=optimizer or Optimizer(lr=1e-6), schedule=schedule)
        if not beta > 0:
            raise ValueError(f"model.beta must be above 0, got {beta}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"model.label_smoothing must be at least 0 and below 0.5, got {label_smoothing}")
        self.beta, self.label_smoothing = beta, label_smoothing
        self.view = RankingView(share_prompt=share_prompt)
        self._reference = Reference(policy, reference)

    # ---- building ----

    def configure_model(self) -> None:
        super().configure_model()
        self._reference.build(self.policy)

    def teardown(self, stage: str) -> None:
        self._reference.close()

    # ---- the loss ----

    def logprobs(self, batch: GroupBatch) -> Tensor:
        """Log-probability of each answer under the policy, float32 [D]: a sum over its trained tokens."""
        return _summed(answer_logprobs(self.policy, batch), batch)

    def reference_logprobs(self, batch: GroupBatch) -> Tensor:
        """The same under the reference."""
        return _summed(self._reference.logprobs(self.policy, batch), batch)

    def loss(self, batch: GroupBatch) -> LossOutput:
        reference = self.reference_logprobs(batch)
        own = self.logprobs(batch)
        rewards = self.beta * (own - reference)
        better, worse = batch.pairs
        prompts, weights = len(batch.prompt_weights), batch.prompt_weights
        pairs = pair_loss(rewards[better] - rewards[worse], batch.tied, label_smoothing=self.label_smoothing)
        losses = by_prompt(pairs, batch.pair_shares, batch.pair_prompts, prompts)
        return LossOutput((losses * weights).sum(), weights.sum(), self._metrics(batch, rewards, losses, own))

    def _metrics(
        self, batch: GroupBatch, rewards: Tensor, losses: Tensor, own: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        rewards, losses, weights = rewards.detach(), losses.detach(), batch.prompt_weights
        better, worse = batch.pairs
        strict = weights[batch.pair_prompts] * (~batch.tied).float()
        tokens = torch.zeros_like(rewards).index_add_(0, batch.owners, batch.target_weights)
        pairs = pair_metrics(batch_sums(rewards, batch))
        return {
            "loss": ((losses * weights).sum(), weights.sum()),
            "accuracy": pairs["accuracy"],
            "margin": pairs["margin"],
            "chosen_reward": ((strict * rewards[better]).sum(), strict.sum()),
            "rejected_reward": ((strict * rewards[worse]).sum(), strict.sum()),
            # That the better answers become less likely too is DPO's known failure: watch it.
            "chosen_nll": (-(strict * own.detach()[better]).sum(), (strict * tokens[better]).sum()),
            **self.loss_by_source(batch.prompt_sources, losses, weights),
        }


def _summed(logprobs: Tensor, batch: GroupBatch) -> Tensor:
    """Weighted sums [D] over the answers' tokens of values [M]."""
    return logprobs.new_zeros(len(batch.last)).index_add(0, batch.owners, logprobs * batch.target_weights)
