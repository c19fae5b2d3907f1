"""The trained model as a plain Hugging Face folder at the end of a run (law 9)."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from torch import Tensor, nn

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.health import EngineStrategy
from ptl.callbacks.record import run_folder
from ptl.callbacks.run_identity import run_id
from ptl.data.durable import write_text
from ptl.models.adapters import is_adapted
from ptl.models.export import export
from ptl.strategies.partition import consolidated_state_dict

if TYPE_CHECKING:
    from ptl.data.render import Renderer
    from ptl.models.spec import ModelSpec

FOLDER, ADAPTER_FOLDER = "export", "export_adapter"
MANIFEST = "stage.json"
"""In the run folder, written last: what a following stage of a pipeline starts from."""
HASHED_BYTES = 64 * 2**20
"""Larger files are named with their size alone: to read a large model again would take as long as to write it."""


class Export(L.Callback):
    """Writes ``RUN/export``, which ``from_pretrained`` reads, and with an adapter ``RUN/export_adapter`` beside it.

    ``RUN/export`` is a plain model: LoRA is merged into its base and codes are dequantised. Each folder is whole or
    absent; an earlier export is replaced. What the objective says in ``export_files`` lies beside the weights in both.
    Rank 0 writes; under ZeRO-3 the shards are gathered in its host memory.

    Arguments:
        which: the weights of the ``last`` step, or of the ``best`` checkpoint, which needs a checkpoint callback with
            ``monitor`` and a strategy other than ZeRO.
        dtype: of the weights; None keeps the model's own.
        merged: write ``RUN/export``.
        adapter: write ``RUN/export_adapter``, where there is an adapter that loads elsewhere.
        console: say where the folders are.
    """

    def __init__(
        self,
        *,
        which: Literal["last", "best"] = "last",
        dtype: Literal["bf16", "fp16", "fp32"] | None = None,
        merged: bool = True,
        adapter: bool = True,
        console: bool = True,
    ) -> None:
        if which not in ("last", "best"):
            raise ValueError(f"Export.which must be last or best, got {which!r}")
        self.which = which
        self.dtype = dtype
        self.merged = merged
        self.adapter = adapter
        self.console = console
        self._files: dict[int, dict[str, str]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.which == "last":
            return
        if isinstance(trainer.strategy, EngineStrategy):
            raise ValueError("Export.which best cannot read ZeRO's checkpoints: set it to last")
        if _best_keeper(trainer) is None:
            raise ValueError(
                "Export.which best needs a Checkpoint with monitor among trainer.callbacks: add one, or last"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.which == "best" and not trainer.sanity_checking:
            self._files[trainer.global_step] = _files_of(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What the objective said of its weights at each validation, of which one may be the best."""
        return {"files": dict(self._files)} if self._files else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._files = {int(step): dict(files) for step, files in state_dict.get("files", {}).items()}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        policy: Any = pl_module.policy
        renderer: Renderer = trainer.datamodule.renderer  # pyright: ignore[reportAttributeAccessIssue]
        state, files = self._state(trainer, policy, _files_of(pl_module))
        written: list[Path] = []
        problem: Exception | None = None
        if trainer.is_global_zero:
            try:
                spec = getattr(pl_module, "spec", None)
                written = self._write(run_folder(trainer), policy, renderer, state, spec, files)
                write_manifest(run_folder(trainer), written, type(pl_module).__name__, trainer.global_step)
            except (ValueError, OSError) as error:
                problem = error
        # Rank 0's mistake is every rank's: none waits for one that has left.
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise problem
        if self.console and trainer.is_global_zero:
            for folder in written:
                Console().print(f"exported to {shlex.quote(str(folder))}", soft_wrap=True, highlight=False)

    def _write(
        self,
        run_dir: Path,
        policy: nn.Module,
        renderer: Renderer,
        state: Mapping[str, Tensor],
        spec: ModelSpec | None,
        files: Mapping[str, str],
    ) -> list[Path]:
        written = []
        options: dict[str, Any] = {"generation_eos": renderer.terminators, "state_dict": state, "spec": spec}
        options["files"] = files
        if self.merged:
            written.append(export(policy, renderer.tokenizer, run_dir / FOLDER, dtype=self.dtype, **options))
        # The adapter of a base that exists nowhere else would be of no use.
        stands = spec is not None and not (spec.random_init or spec.config_overrides or spec.shrink is not None)
        if self.adapter and is_adapted(policy) and stands:
            folder = run_dir / ADAPTER_FOLDER
            written.append(export(policy, renderer.tokenizer, folder, dtype=None, merged=False, **options))
        return written

    def _state(
        self, trainer: L.Trainer, policy: nn.Module, files: dict[str, str]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The whole state dict on rank 0, and the files that go with it; ``files`` are the last step's. All ranks call
        it."""
        state = consolidated_state_dict(policy, trainable_only=not self.merged)
        keeper = _best_keeper(trainer) if self.which == "best" else None
        if isinstance(keeper, Checkpoint):
            keeper.settle(trainer)
        if keeper is not None and keeper.best_model_path and trainer.is_global_zero:
            saved = trainer.strategy.checkpoint_io.load_checkpoint(keeper.best_model_path, weights_only=True)
            best = {k.removeprefix("policy."): v for k, v in saved["state_dict"].items() if k.startswith("policy.")}
            state |= {name: tensor for name, tensor in best.items() if name in state}
            files = self._files.get(int(saved["global_step"]), files)
        return state, files


def write_manifest(run_dir: Path, folders: Sequence[Path], objective: str, step: int) -> None:
    """Writes ``RUN/stage.json``: the objective, the run's id, and each exported folder with its files."""
    exports = {
        folder.name: {
            path.name: {"bytes": path.stat().st_size, **_digest(path)}
            for path in sorted(folder.iterdir())
            if path.is_file()
        }
        for folder in folders
    }
    manifest = {"objective": objective, "run": run_id(run_dir), "global_step": step, "exports": exports}
    write_text(run_dir / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _digest(path: Path) -> dict[str, str]:
    if path.stat().st_size > HASHED_BYTES:
        return {}
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _best_keeper(trainer: L.Trainer) -> ModelCheckpoint | None:
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor), None)


def _files_of(pl_module: L.LightningModule) -> dict[str, str]:
    """Texts that the objective puts beside its weights; none for a module that is no objective."""
    give: Any = getattr(pl_module, "export_files", dict)
    return give()
