"""The validation metrics of the model as it is before training."""

from __future__ import annotations

import lightning as L

from ptl.callbacks.throughput import log_metrics


class Baseline(L.Callback):
    """Logs the validation before the first step, so that a curve begins where the model began.

    It takes the numbers of Lightning's sanity check, which runs before training and whose numbers Lightning drops;
    ``trainer.num_sanity_val_steps: -1`` makes it run over all validation rows. A resumed run logs none.

    Raises:
        ValueError: at the start, ``trainer.num_sanity_val_steps`` is not -1.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.num_sanity_val_steps != float("inf"):
            raise ValueError(
                f"Baseline needs all validation rows, got trainer.num_sanity_val_steps {trainer.num_sanity_val_steps}: "
                "set it to -1, or remove ptl.callbacks.baseline.Baseline"
            )

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Already reduced over ranks. Logged later: the loggers' file has not yet noted that the run starts.
        self._metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log_metrics(trainer, self._metrics)
        self._metrics = {}
