"""The base of every objective: builds the policy, divides the loss once, logs, optimises, keeps checkpoints small.

A subclass gives its ``view`` (which batches it eats) and its ``loss`` (a sum and a weight); RL adds ``prepare``.
Everything runs under ``Trainer.fit`` with automatic optimisation.

Normalisation (law 1): a batch carries ``window_weight``, the sum of the loss weights over the whole optimizer window
and all ranks, which the data module knows ahead. With W ranks and k micro-batches a step, ``training_step`` returns
``total * W * k / window_weight``: Lightning divides by k, the strategy averages over W, and what is left is the
window's sum over the window's weight, however the window was cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from ptl.data.views import ChatView, View
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import ModelSpec
from ptl.objectives.metrics import WeightedMeans
from ptl.strategies.deepspeed import share_parameters
from ptl.types import LossOutput

if TYPE_CHECKING:
    from ptl.data.module import ChatDataModule


_COUNTED = "ptl_counted_since_the_last_log"
"""Key of a checkpoint."""


class Objective(L.LightningModule, ABC):
    """A language model in training.

    Arguments:
        policy: the model that is trained.
        optimizer: its optimizer.
        schedule: its learning rate over the run.

    Attributes:
        spec: the ``ModelSpec`` of the policy.
        policy: the module, built in ``configure_model`` so that strategies may shard it while it loads.
        view: which batches the objective eats; the CLI hands it to the data module.
        sequence_parallel: ranks that share each micro-batch, every one a part of its tokens; 1 where each has its own.
        gradient_norm: of this step, before clipping, where a callback has taken it; forgotten once it is used.
    """

    view: View = ChatView()
    metric_names: tuple[str, ...] = ()
    """Names that ``loss`` may return in ``LossOutput.metrics`` beside ``loss``; a subclass declares them."""
    sequence_parallel: int = 1
    has_perplexity = True
    """Whether ``loss`` is nats a token, whose exponential is a perplexity."""
    policy: nn.Module

    def __init__(
        self, policy: ModelSpec, *, optimizer: Optimizer | None = None, schedule: Schedule | None = None
    ) -> None:
        super().__init__()
        if policy.quantize is not None and policy.adapter is None:
            raise ValueError(
                f"model.policy.quantize {policy.quantize} without an adapter trains nothing: set model.policy.adapter, "
                "or remove quantize"
            )
        self.spec = policy
        self.optimizer_spec = optimizer or Optimizer()
        self.schedule_spec = schedule or Schedule()
        self.strict_loading = False
        # Kept out of module registration: an engine that casts the module to bf16 must not cast running sums.
        self._means: dict[str, WeightedMeans] = {}
        self._logged_step = 0
        self.gradient_norm: Tensor | None = None
        self._restored: dict[str, list[float]] | None = None

    @classmethod
    def view_of(cls, arguments: Mapping[str, Any]) -> View:
        """The view of an objective with these arguments, as a configuration has them: to prepare its data ahead."""
        return cls.view

    @abstractmethod
    def loss(self, batch: Any) -> LossOutput:
        """The weighted sum of losses over a micro-batch, its weight, and metrics as (sum, weight) pairs."""

    def prepare(self, batch: Any) -> Any:
        """What turns the data module's batch into what ``loss`` eats; what samples from the policy overrides it.

        The data module calls it before the step, outside the engine's forward, where ZeRO-3 lets a model be gathered.
        """
        return batch

    # ---- building ----

    def configure_model(self) -> None:
        """Builds the policy once; called again by validate and test, which must not rebuild it."""
        if not hasattr(self, "policy"):
            self.policy = self.spec.build()

    def on_fit_start(self) -> None:
        """Lets ZeRO-3 gather the parameters that the loss reads outside their own module."""
        share_parameters(self, self.shared_parameters())

    def on_train_start(self) -> None:
        # Not at the start of the fit, where a checkpoint's step is not known yet.
        self._logged_step = self.trainer.global_step

    def on_validation_start(self) -> None:
        share_parameters(self, self.shared_parameters())

    def on_test_start(self) -> None:
        share_parameters(self, self.shared_parameters())

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that ``loss`` reads outside their module's forward: the output embedding."""
        head = self.policy.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        return list(head.parameters()) if isinstance(head, nn.Module) else []

    @property
    def data(self) -> ChatDataModule:
        """The data module of the running trainer."""
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    # ---- steps ----

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.loss(batch)
        self._collect("train", out)
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        # A window with no trained token at all has nothing to learn from; its loss is 0, not 0 / 0.
        weight = batch.window_weight.to(device=out.total.device, dtype=torch.float64)
        factor = torch.where(weight > 0, scale / weight.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        return out.total * factor.to(out.total.dtype)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._collect("val", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._collect("test", self.loss(batch))

    # ---- metrics ----

    @property
    def wants_details(self) -> bool:
        """Whether this step's metrics that cost a pass over the logits will be looked at."""
        if not self.training:
            return True
        return (self.trainer.global_step + 1) % max(1, self.trainer.log_every_n_steps or 1) == 0  # pyright: ignore[reportAttributeAccessIssue]

    def _collect(self, stage: str, out: LossOutput) -> None:
        if stage not in self._means:
            self._means[stage] = WeightedMeans(self.names_of(stage)).to(out.total.device)
            if stage == "train":
                self._restore_counted()
        metrics = out.metrics if "loss" in out.metrics else {"loss": (out.total, out.weight), **out.metrics}
        self._means[stage].update(metrics)

    def names_of(self, stage: str) -> tuple[str, ...]:
        """All names that ``LossOutput.metrics`` may have in a stage, the same on every rank."""
        return ("loss", *self.metric_names, *(f"loss_{name}" for name in self.source_names(stage)))

    def source_names(self, stage: str) -> tuple[str, ...]:
        """Names of the data sources of a stage, for the metrics by source; one source needs none."""
        names = self.data.source_names(stage)
        return names if len(names) > 1 else ()

    def loss_by_source(self, sources: Tensor, losses: Tensor, weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The metrics ``loss_<source>`` of a micro-batch; none where there is one source alone.

        Args:
            sources: int64 [N], index of each item's data source.
            losses: [N], unweighted and detached.
            weights: float32 [N].
        """
        names = self.source_names("train" if self.training else "val")
        if not names:
            return {}
        sums, counts = (weights.new_zeros(len(names)) for _ in range(2))
        sums.index_add_(0, sources, losses.to(weights.dtype) * weights)
        counts.index_add_(0, sources, weights)
        return {f"loss_{name}": (sums[i], counts[i]) for i, name in enumerate(names)}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if self._is_logged(step):
            self._logged_step = step
            self._log_means("train")

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _is_logged(self, step: int) -> bool:
        """Whether the means of training are logged at the end of this optimizer step."""
        every = self.trainer.log_every_n_steps or 0  # pyright: ignore[reportAttributeAccessIssue]
        return step > self._logged_step and bool(every) and step % every == 0

    def _counted(self) -> dict[str, list[float]]:
        """``name -> [sum, weight]`` of all ranks since the last log; nothing where this step's end is a log."""
        if self._is_logged(self.trainer.global_step):
            return {}
        means = self._means["train"]
        total: Any = self.trainer.strategy.reduce(means.values.clone(), reduce_op="sum")
        return dict(zip(means.names, total.tolist(), strict=True))

    def _restore_counted(self) -> None:
        """One rank takes up what all had counted."""
        if self._restored and self.trainer.is_global_zero:
            means = self._means["train"]
            for name, (total, weight) in self._restored.items():
                if name in means.names:
                    device = means.values.device
                    means.update({name: (_exact(total, device), _exact(weight, device))})
        self._restored = None

    def _log_means(self, stage: str) -> None:
        means = self._means.get(stage)
        if means is None:
            return
        values = means.compute()
        means.reset()
        logged = {f"{stage}/{name}": value.float() for name, value in values.items()}
        if "loss" in values and self.has_perplexity:
            logged[f"{stage}/perplexity"] = values["loss"].exp().float()
        # The values are already reduced over ranks, so every rank logs the same.
        self.log_dict(logged, prog_bar=False, sync_dist=False)
        if f"{stage}/loss" in logged:
            self.log(f"{stage}_loss", logged[f"{stage}/loss"], prog_bar=True, logger=False)

    # ---- optimisation ----

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, from ``max_steps`` or from the data module's count of steps an epoch.

        ``trainer.estimated_stepping_batches`` is never read: it loads the data early and loses a resumed position.
        """
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        if not self.trainer.max_epochs or self.trainer.max_epochs < 0:
            raise ValueError("the schedule needs an end: set trainer.max_steps or trainer.max_epochs")
        return self.trainer.max_epochs * self.data.steps_per_epoch

    def configure_optimizers(self) -> Any:
        ratio = self.spec.adapter.plus_ratio if self.spec.adapter else None
        # A fused optimizer unscales gradients inside its kernel, where clipping comes too late.
        scaled = _scaler(self.trainer) is not None and bool(self.trainer.gradient_clip_val)
        optimizer = self.optimizer_spec.build(self, lora_plus_ratio=ratio, fused=not scaled)
        scheduler = self.schedule_spec.build(optimizer, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the trainer would, by the norm of the gradients where a callback has just taken it.

        Under autocast in bf16, where nothing scales the loss, Lightning refuses a fused optimizer as if something did.
        """
        norm, self.gradient_norm = self.gradient_norm, None
        by_norm = str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm or "norm")) == "norm"
        autocast = isinstance(self.trainer.precision_plugin, MixedPrecision) and _scaler(self.trainer) is None
        if not gradient_clip_val or not (autocast or (norm is not None and by_norm)):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not by_norm:
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif norm is None:
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    # ---- checkpoints ----

    def export_files(self) -> dict[str, str]:
        """Texts that go beside the exported model, by file name; called on rank 0 after training."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps only what training changes when something is frozen: a frozen base is rebuilt from its name.

        Also what was counted since the last log, over all ranks: a run that goes on logs what a whole one would.
        """
        checkpoint[_COUNTED] = self._counted() if "train" in self._means else self._restored
        if "state_dict" in checkpoint and any(not p.requires_grad for p in self.parameters()):
            frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
            checkpoint["state_dict"] = {
                k: v for k, v in checkpoint["state_dict"].items() if k not in frozen and not _of_frozen(k, frozen)
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that lacks a trained parameter, which ``strict_loading = False`` would let pass."""
        self._restored = checkpoint.get(_COUNTED)
        if "state_dict" not in checkpoint or not hasattr(self, "policy"):
            return
        wanted = {name for name, p in self.named_parameters() if p.requires_grad}
        missing = sorted(wanted - set(checkpoint["state_dict"]))
        # A tied matrix is listed once by named_parameters and under every name in the state dict, so none is missing.
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} trained parameters, first {missing[0]!r}: it was made with "
                "another model.policy.adapter or model.policy.name than this run's"
            )


def _scaler(trainer: L.Trainer) -> Any:
    """What scales the loss under autocast in fp16; None in bf16 and without autocast."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _exact(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def _of_frozen(key: str, frozen: set[str]) -> bool:
    """Whether a state-dict entry is a quantiser's statistic of a frozen weight (``weight.absmax`` and its kin)."""
    return any(key.startswith(name + ".") for name in _prefixes(key) & frozen)


def _prefixes(key: str) -> set[str]:
    parts = key.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}
