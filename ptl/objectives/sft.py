"""Supervised fine-tuning: next-token cross-entropy over the trained tokens of conversations or of plain text."""

from __future__ import annotations

from ptl.models.heads import lm_loss
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import ModelSpec
from ptl.objectives.base import Objective
from ptl.types import LossOutput, TokenBatch


class SFT(Objective):
    """Supervised fine-tuning of a causal language model, whole or with an adapter (``policy.adapter``).

    The loss of a window is ``sum_t w_t * -log p(token_t | tokens before it in its document) / sum_t w_t`` over every
    trained token t of the window and all ranks, w being the loss mask. Continued pre-training is the same objective on
    plain text, where every token is trained.

    Arguments:
        policy: the model that is trained.
        optimizer: its optimizer.
        schedule: its learning rate over the run.
        label_smoothing: mass in [0, 1) spread evenly over the vocabulary.
        z_loss: weight of the squared log-partition (PaLM, arXiv:2204.02311, section 5); 0 for none.
        neftune_alpha: scale of uniform noise on the embeddings while training (arXiv:2310.05914); None for none.
    """

    metric_names = ("accuracy", "entropy")

    def __init__(
        self,
        policy: ModelSpec,
        *,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        neftune_alpha: float | None = None,
    ) -> None:
        super().__init__(policy, optimizer=optimizer, schedule=schedule)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        if z_loss < 0:
            raise ValueError(f"model.z_loss must be 0 or more, got {z_loss}")
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.neftune_alpha = neftune_alpha

    def loss(self, batch: TokenBatch) -> LossOutput:
        fused, documents = lm_loss(
            self.policy,
            batch,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            neftune_alpha=self.neftune_alpha,
            metrics=self.wants_details,
        )
        metrics = {"loss": (fused.nll, fused.weight), "accuracy": (fused.correct, fused.weight)}
        if fused.entropy is not None:
            metrics["entropy"] = (fused.entropy, fused.weight)
        weights = batch.loss_mask[batch.loss_mask != 0]
        metrics |= self.loss_by_source(batch.sources[documents], fused.token_nll, weights)
        return LossOutput(fused.total, fused.weight, metrics)
