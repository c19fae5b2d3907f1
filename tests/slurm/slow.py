"""A callback that gives a test the time to interfere."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


class Slowly(L.Callback):
    """Some seconds more for each micro-batch."""

    def __init__(self, seconds: float = 0.5) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(self.seconds)
