"""What rank processes do for the tests of the watchdog."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ptl.callbacks.record import RunRecord
from ptl.callbacks.watchdog import Watchdog
from ptl.strategies.flight import set_flight_recorder
from tests.callbacks.parts import Toy, loader, packed, trainer
from tests.ranks import rank

SECONDS = 2.0


class Sleeper(Toy):
    """One rank falls asleep in its third step."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and rank() == 1:
            time.sleep(120)  # here it hangs
        return super().training_step(batch, batch_idx)


def hang(folder: str) -> dict[str, Any]:
    """Two ranks: first a fit whose validations take longer than the limit, then one that never gets to its end."""
    set_flight_recorder(Path(folder) / "flight", os.environ)
    batches = [packed([8, 8], trained=4, seed=i) for i in range(6)]
    watchdog = Watchdog(minutes=SECONDS / 60, slow_minutes=1, times_median=1)
    patient = trainer(Path(folder) / "patient", [watchdog], strategy="ddp", devices=2, max_steps=2, limit_val_batches=4)
    patient.fit(Toy(val_pause=0.6 * SECONDS), loader(batches[:2]), loader(batches))
    if rank() == 0:
        (Path(folder) / "patient" / "steps").write_text(str(patient.global_step))
    watchdog = Watchdog(minutes=SECONDS / 60, slow_minutes=1, times_median=1)
    fit = trainer(folder, [watchdog, RunRecord(folder)], strategy="ddp", devices=2, max_steps=6)
    fit.fit(Sleeper(), loader(batches))
    return {"steps": fit.global_step}
