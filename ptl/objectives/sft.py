"""Supervised fine-tuning: next-token cross-entropy over the trained tokens of conversations or of plain text."""

from __future__ import annotations

from ptl.data.views import ChatView
from ptl.models.heads import causal_lm, lm_loss
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.sequence_parallel import SequenceGroup, check_shareable, join_group
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
        sequence_parallel: ranks that share each packed row, every one a slice of its tokens, for rows whose activations
            one device cannot hold (``ptl.models.sequence_parallel``). It divides the number of ranks and the model's
            attention heads; the update is the same as with 1 on as many fewer ranks.

    Raises:
        ValueError: a number out of its range, or an attention that cannot share rows.
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
        sequence_parallel: int = 1,
    ) -> None:
        super().__init__(policy, optimizer=optimizer, schedule=schedule)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        if z_loss < 0:
            raise ValueError(f"model.z_loss must be 0 or more, got {z_loss}")
        if sequence_parallel < 1:
            raise ValueError(f"model.sequence_parallel must be 1 or more, got {sequence_parallel}")
        if sequence_parallel > 1 and policy.attention != "packed":
            raise ValueError(
                f"model.sequence_parallel {sequence_parallel} needs policy.attention packed, got {policy.attention}"
            )
        if sequence_parallel > 1 and policy.compile:
            raise ValueError(
                f"model.sequence_parallel {sequence_parallel} exchanges tokens inside each layer, which cannot be "
                "compiled: set policy.compile to false"
            )
        self.sequence_parallel = sequence_parallel
        self.view = ChatView(ranks=sequence_parallel)
        self._sequence: SequenceGroup | None = None
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.neftune_alpha = neftune_alpha

    def configure_model(self) -> None:
        """Builds the policy, and joins the ranks that share rows."""
        if self.sequence_parallel > 1 and self._sequence is None:
            self._sequence = join_group(self.sequence_parallel)
        super().configure_model()
        if self.sequence_parallel > 1:
            check_shareable(causal_lm(self.policy).config.get_text_config(), self.sequence_parallel)

    def loss(self, batch: TokenBatch) -> LossOutput:
        fused, documents, weights = lm_loss(
            self.policy,
            batch,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            neftune_alpha=self.neftune_alpha,
            metrics=self.wants_details,
            sequence=self._sequence,
        )
        metrics = {"loss": (fused.nll, fused.weight), "accuracy": (fused.correct, fused.weight)}
        if fused.entropy is not None:
            metrics["entropy"] = (fused.entropy, fused.weight)
        metrics |= self.loss_by_source(batch.sources[documents], fused.token_nll, weights)
        return LossOutput(fused.total, fused.weight, metrics)
