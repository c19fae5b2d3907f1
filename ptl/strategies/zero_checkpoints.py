"""Saving and resuming under ZeRO: which rank does what to a checkpoint folder, and what DeepSpeed is asked to load."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from ptl.strategies import checkpoints
from ptl.strategies.checkpoints import TAG, UNIVERSAL, CheckpointError, CheckpointRecord
from ptl.strategies.partition import full_shape, is_partitioned
from ptl.strategies.staging import Staging, copy_durably

if TYPE_CHECKING:
    import deepspeed

T = TypeVar("T")
_PATIENCE = timedelta(hours=12)
"""How long ranks wait while rank 0 converts a checkpoint, and copying threads for each other; a collective's own limit
is too short for a large model."""
RUN_KEY = "ptl_run"
"""Key of a checkpoint under which its run's id stands."""
_ENGINE_KEYS = {"module", "optimizer", "lr_scheduler"}


class CheckpointedZeRO(DeepSpeedStrategy):
    """The part of ``ZeROStrategy`` that writes and reads checkpoint folders."""

    trust_checkpoint: bool = False
    staging: Staging | None = None
    """Where a rank's part of a checkpoint goes first, where a callback has asked for it."""

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self._settings["zero_optimization"]["stage"]

    @property
    def engine(self) -> deepspeed.DeepSpeedEngine | None:
        """DeepSpeed's engine around the module, from ``setup`` on."""
        return self.deepspeed_engine if hasattr(self.model, "get_global_grad_norm") else None

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Nothing: DeepSpeed writes each rank's part itself, and a copy here would only cost memory."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint folder under a hidden name on all ranks, and gives it its name when it is whole.

        With ``staging`` each rank writes its part into its folder on the node, and a thread does the rest. Call it
        between optimizer steps: gradients of a window that is under way are not saved.
        """
        final = Path(self.broadcast(filepath))
        partial = checkpoints.partial_path(final)
        if self.staging is not None:
            self.staging.wait()
        self._on_rank_zero(lambda: checkpoints.clear(partial))
        # The conversion for another number of ranks asks for this key, which Lightning does not write.
        checkpoint = {**checkpoint, "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        if self.staging is not None:
            self._save_staged(self.staging, checkpoint, final)
            return
        with _without_frozen(self._module):
            super().save_checkpoint(checkpoint, str(partial), storage_options)
        record = self._record(checkpoint.get(RUN_KEY))

        def finish() -> None:
            checkpoints.seal(partial, record)
            checkpoints.publish(partial, final)

        self._on_rank_zero(finish)

    def _save_staged(self, staging: Staging, checkpoint: dict[str, Any], final: Path) -> None:
        """Every rank has its own folder, also on one node, so that each copies what it has written."""
        local, partial = staging.folder / final.name, checkpoints.partial_path(final)
        checkpoints.clear(local)
        state = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        with _without_frozen(self._module):
            self.deepspeed_engine.save_checkpoint(
                str(local), tag=TAG, client_state=state, exclude_frozen_parameters=self.exclude_frozen_parameters
            )
        record = self._record(checkpoint.get(RUN_KEY))
        if staging.group is None and self.world_size > 1:
            staging.group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)

        def copy() -> None:
            problem = None
            try:
                copy_durably(local, partial)
            except OSError as error:
                problem = f"rank {self.global_rank}: {error}"
            staging.own_part_done()
            problems = [text for text in self._told_to_rank_zero(problem, staging.group) if text]
            shutil.rmtree(local, ignore_errors=True)
            if problems:
                shutil.rmtree(partial, ignore_errors=True)
                raise CheckpointError(checkpoints.cannot_copy(final, problems[0]))
            if self.is_global_zero:
                try:
                    checkpoints.seal(partial, record)
                    checkpoints.publish(partial, final)
                except OSError as error:
                    raise CheckpointError(checkpoints.cannot_copy(final, error)) from error

        staging.start(copy, final)

    def _told_to_rank_zero(self, problem: str | None, group: Any) -> list[str | None]:
        """Every rank's ``problem`` on rank 0, nothing on the others; waits for all."""
        if group is None:
            return [problem]
        found: list[str | None] = [None] * self.world_size
        torch.distributed.gather_object(problem, found if self.is_global_zero else None, dst=0, group=group)
        return found if self.is_global_zero else []

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Restores module and optimizer from a whole checkpoint of this run, of any number of ranks.

        Raises:
            CheckpointError: it is missing, unfinished, outside the run's folders and not vouched for, or of another
                stage, precision or set of trained parameters; or ``weights_only`` is asked, which DeepSpeed cannot do.
        """
        path = Path(self.broadcast(checkpoint_path))
        record = self._on_rank_zero(lambda: self._inspect(path, weights_only))
        if self._trainer.state.fn != TrainerFn.FITTING:
            return load_weights(self.deepspeed_engine, path, stage=self.stage)
        universal = self.stage > 0 and record.world_size != self.world_size
        if universal:
            self._on_rank_zero(lambda: checkpoints.convert_to_universal(path), wait=_PATIENCE)
        return load_training_state(self.deepspeed_engine, path, universal=universal)

    def remove_checkpoint(self, filepath: Any) -> None:
        if not self.is_global_zero:
            return
        if self.staging is not None:
            self.staging.behind(lambda: checkpoints.discard(Path(filepath)))
        else:
            checkpoints.discard(Path(filepath))

    @property
    def _settings(self) -> dict[str, Any]:
        assert isinstance(self.config, dict)
        return self.config

    @property
    def _module(self) -> L.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trainer(self) -> L.Trainer:
        return self._module.trainer

    def _inspect(self, path: Path, weights_only: bool | None) -> CheckpointRecord:
        if weights_only:
            raise CheckpointError(f"{path}: DeepSpeed's files are pickles, which weights_only does not load")
        folders = [getattr(callback, "dirpath", None) for callback in self._trainer.checkpoint_callbacks]
        roots = [self._trainer.default_root_dir, *filter(None, folders)]
        checkpoints.check_trusted(path, roots, trust=self.trust_checkpoint)
        record = checkpoints.read_record(path)
        precision = str(self.precision_plugin.precision)
        trainable = trainable_shapes(self._module)
        checkpoints.check_resumable(record, stage=self.stage, precision=precision, trainable=trainable)
        return record

    def _record(self, run: str | None) -> CheckpointRecord:
        import deepspeed
        import lightning

        optimizer = self.deepspeed_engine.basic_optimizer
        state = next(iter(optimizer.state.values()), {}) if optimizer is not None else {}
        return CheckpointRecord(
            world_size=self.world_size,
            stage=self.stage,
            precision=str(self.precision_plugin.precision),
            global_step=self._trainer.global_step,
            epoch=self._trainer.current_epoch,
            run=run,
            trainable=trainable_shapes(self._module),
            optimizer_state=sorted(key for key, value in state.items() if torch.is_tensor(value)),
            versions={
                "deepspeed": deepspeed.__version__,
                "lightning": lightning.__version__,
                "torch": str(torch.__version__),
            },
        )

    def _on_rank_zero(self, action: Callable[[], T], wait: timedelta | None = None) -> T:
        """What ``action`` returns on rank 0, or the mistake it found, on every rank: none waits for one that has left.

        Arguments:
            wait: how long the other ranks wait; None for the process group's own limit.
        """
        outcome: list[Any] = [None, None]
        if self.is_global_zero:
            try:
                outcome[0] = action()
            except (ValueError, OSError) as error:
                outcome[1] = error
        if wait is None:
            outcome = self.broadcast(outcome)
        elif self.world_size > 1:
            group: Any = torch.distributed.new_group(backend="gloo", timeout=wait)
            torch.distributed.broadcast_object_list(outcome, src=0, group=group)
            torch.distributed.destroy_process_group(group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def trainable_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Name and whole shape of every trained parameter."""
    return {name: list(full_shape(p)) for name, p in module.named_parameters() if p.requires_grad}


def load_training_state(engine: deepspeed.DeepSpeedEngine, path: Path, *, universal: bool) -> dict[str, Any]:
    """Loads weights, optimizer and counters of every rank; returns what Lightning saved beside them.

    Missing keys are let pass: frozen parameters are not in a checkpoint, and the trained ones were compared before.
    """
    with _universal_loading(engine, universal):
        _, client_state = engine.load_checkpoint(
            str(path),
            tag=UNIVERSAL if universal else TAG,
            load_module_strict=False,
            load_lr_scheduler_states=False,
        )
    return _loaded(client_state, path)


def load_weights(engine: deepspeed.DeepSpeedEngine, path: Path, *, stage: int) -> dict[str, Any]:
    """Loads the trained weights alone, for evaluation, whatever the number of ranks that saved them.

    At stage 3 DeepSpeed would have every rank hold the whole fp32 model in host memory, and needs the frozen
    parameters; here rank 0 reads the shards and hands out one parameter at a time.
    """
    if stage < 3:
        _, client_state = engine.load_checkpoint(
            str(path), tag=TAG, load_module_strict=False, load_optimizer_states=False, load_lr_scheduler_states=False
        )
        return _loaded(client_state, path)
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    shard = torch.load(path / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    module: nn.Module = engine.module  # pyright: ignore[reportAssignmentType]
    weights: Mapping[str, Tensor] = {}
    if torch.distributed.get_rank() == 0:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(path), TAG, exclude_frozen_parameters=True) or {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and is_partitioned(parameter):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if weights:
                    parameter.data.copy_(weights[name])
    buffers = {name: shard["module"][name] for name in shard["buffer_names"]}
    module.load_state_dict(buffers, strict=False)
    return {key: value for key, value in shard.items() if key not in _ENGINE_KEYS}


def _loaded(client_state: dict[str, Any] | None, path: Path) -> dict[str, Any]:
    if client_state is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {path}")
    return client_state


@contextmanager
def _without_frozen(module: nn.Module) -> Iterator[None]:
    """Frozen parameters are not in the module's state dict, under any name, nor a quantiser's statistics of them.

    DeepSpeed leaves out a frozen parameter under its first name only, so that a tied embedding would come along with
    every adapter.
    """
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}

    def drop(_module: nn.Module, state: dict[str, Any], _prefix: str, _metadata: dict[str, Any]) -> None:
        for key in list(state):
            parts = key.split(".")
            if any(".".join(parts[:i]) in frozen for i in range(1, len(parts) + 1)):
                del state[key]

    handle = module.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _universal_loading(engine: deepspeed.DeepSpeedEngine, universal: bool) -> Iterator[None]:
    """Has the engine read the converted form, for one load.

    DeepSpeed takes this from the config when the engine is made, before the checkpoint is known, and has no argument
    for it at loading (DeepSpeed issue #6470): the flag of the engine's parsed config is set and put back.
    """
    config: Any = engine._config
    before = config.load_universal_checkpoint
    config.load_universal_checkpoint = universal
    try:
        yield
    finally:
        config.load_universal_checkpoint = before
