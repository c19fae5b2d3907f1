"""How long a save holds training up, written to the run folder at once and through a disk of the node.

``python -m benchmarks.checkpoint_stall --run-dir FOLDER --local-dir FOLDER`` trains a model of a given size with AdamW
and saves it every few steps, plainly and with ``checkpoint.local_dir`` in turn, and appends a line to
``benchmarks/results/checkpoint_stall.json``. What is measured is the time that the training loop spends in a save, the
median over all saves but the first and the last of each run; beside it, what the whole runs took.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record

EVERY, SAVES, PAUSE = 4, 5, 0.5


def measure(parameters: int, run_dir: Path, local_dir: Path | None) -> dict[str, Any]:
    """Seconds of each save in the training loop, and bytes of a checkpoint."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    from ptl.callbacks.checkpoint import Checkpoint

    class Model(L.LightningModule):
        """A vector of the given size; a step takes half a second, so that a copy has something to go on beside."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(parameters))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            time.sleep(PAUSE)
            return (self.weight * batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Timed(Checkpoint):
        """Keeps how long each hook that saved has taken."""

        seconds: list[float]

        def on_train_batch_end(self, *arguments: Any) -> None:
            before, started = self._saved_step, time.monotonic()
            super().on_train_batch_end(*arguments)
            if self._saved_step != before:
                self.seconds.append(time.monotonic() - started)

    saver = Timed(str(run_dir), every_n_train_steps=EVERY, local_dir=str(local_dir) if local_dir else None)
    saver.seconds = []
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=EVERY * SAVES,
        logger=False,
        callbacks=[saver],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.monotonic()
    trainer.fit(Model(), DataLoader(torch.ones(EVERY * SAVES, 1)))  # pyright: ignore[reportArgumentType]
    size = sum(path.stat().st_size for path in run_dir.glob("*.ckpt"))
    return {"seconds": saver.seconds, "bytes": size, "whole": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_stall", description=__doc__)
    parser.add_argument("--run-dir", required=True, help="a folder on the disk that runs are kept on")
    parser.add_argument("--local-dir", required=True, help="a folder on a fast disk of the node")
    parser.add_argument("--parameters", type=int, default=30_000_000, help="default 30 million: 360 MB a checkpoint")
    parser.add_argument("--runs", type=int, default=2, help="runs of each side, in turn (default 2)")
    options = parser.parse_args()
    sides: dict[str, list[dict[str, Any]]] = {"plain": [], "staged": []}
    for _ in range(options.runs):
        for side, runs in sides.items():
            folder = Path(tempfile.mkdtemp(dir=options.run_dir))
            local = Path(tempfile.mkdtemp(dir=options.local_dir))
            try:
                runs.append(measure(options.parameters, folder, local if side == "staged" else None))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(local, ignore_errors=True)
    # The last save waits for its copy: the training is over. The first finds the folder empty.
    stall = {side: statistics.median(s for run in runs for s in run["seconds"][1:-1]) for side, runs in sides.items()}
    line = record.append(
        "checkpoint_stall",
        {
            "stage": "sft",
            "variant": "full-fp32",
            "peer": "the same save without checkpoint.local_dir",
            "pairs": options.runs,
            "bytes": sides["plain"][0]["bytes"],
            "seconds": round(stall["staged"], 3),
            "peer_seconds": round(stall["plain"], 3),
            "ratio": round(stall["plain"] / stall["staged"], 2),
            "run_seconds": round(statistics.median(run["whole"] for run in sides["staged"]), 1),
            "peer_run_seconds": round(statistics.median(run["whole"] for run in sides["plain"]), 1),
        },
    )
    print(
        f"{line['bytes'] / 1e6:.0f} MB: a save holds training up for {line['seconds']} s through {options.local_dir}, "
        f"for {line['peer_seconds']} s without"
    )


if __name__ == "__main__":
    main()
