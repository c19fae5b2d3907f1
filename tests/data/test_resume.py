"""Killed is not lost (law 6): real Lightning runs that stop and go on give each optimizer step the same rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from ptl.data.module import ChatDataModule
from tests.data.chats import Recorder, data_module, documents_of, fit, make_trainer, write_chats
from tests.ranks import rank, run_ranks, world_size

ROWS = 23
MICRO = 2  # 12 optimizer steps an epoch without accumulation, 6 with two micro-batches, the last one partial


class SaveAndStop(Callback):
    """Saves after an optimizer step and asks the trainer to stop, as preemption does."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not trainer.should_stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("resume") / "chats.jsonl", ROWS)


@pytest.fixture
def make(chats, model_folder) -> Callable[..., ChatDataModule]:
    def module(**settings: Any) -> ChatDataModule:
        return data_module(chats, model_folder, **{"micro_batch_size": MICRO, "seed": 3, **settings})

    return module


def run(folder: Path, data: ChatDataModule, model: Recorder | None = None, resume: Path | None = None, **trainer: Any):
    model = model or Recorder()
    made = make_trainer(folder, **trainer)
    fit(made, model, data, resume)
    return model, made


def every_step(folder: Path, step: int) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, every_n_train_steps=step, save_top_k=-1, filename="{step}")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("accumulate", "stop"), [(1, 5), (1, 12), (1, 17), (2, 4), (2, 6)])
def test_law_6_a_killed_run_goes_on_exactly(tmp_path, make, accumulate, stop, workers):
    """Two epochs, killed in the first, at its end or in the second, in the middle of the next step."""
    common = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    whole, _ = run(tmp_path, make(), **common)
    killed = Recorder(crash_at=(stop + 1) * accumulate + accumulate - 1)
    first, _ = run(tmp_path, make(num_workers=workers), killed, callbacks=[every_step(tmp_path, stop)], **common)
    second, trainer = run(tmp_path, make(num_workers=workers), resume=tmp_path / f"step={stop}.ckpt", **common)
    assert first.steps[:stop] + second.steps == whole.steps
    assert trainer.global_step == len(whole.steps) and trainer.current_epoch == 2


@pytest.mark.parametrize("settings", [{"pack_to": 64, "max_length": 64}, {"val_fraction": 0.2}, {"shuffle": False}])
def test_law_6_with_packs_validation_and_in_order(tmp_path, make, settings):
    common = {"max_epochs": 2}
    whole, _ = run(tmp_path, make(**settings), **common)
    path = tmp_path / "stop.ckpt"
    first, _ = run(tmp_path, make(**settings), callbacks=[SaveAndStop(4, path)], **common)
    second, _ = run(tmp_path, make(**settings), resume=path, **common)
    assert len(first.steps) == 4 and first.steps + second.steps == whole.steps


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 20}])
@pytest.mark.parametrize("stop", [5, 12])
def test_law_6_saved_after_fit_has_returned(tmp_path, make, limit, stop):
    """Lightning takes an epoch that was stopped halfway as done; the data, and the number of epochs, do not."""
    whole, _ = run(tmp_path, make(), **limit)
    first, trainer = run(tmp_path, make(), callbacks=[SaveAndStop(stop, tmp_path / "unused.ckpt")], **limit)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    second, trainer = run(tmp_path, make(), resume=tmp_path / "after.ckpt", **limit)
    assert first.steps + second.steps == whole.steps
    assert trainer.global_step == len(whole.steps)


@pytest.mark.parametrize(("epochs", "first_stop"), [(-1, 7), (1, 3), (2, 7)])
def test_law_6_max_steps_raised(tmp_path, make, epochs, first_stop):
    """Also under ``max_epochs``, where an epoch that was stopped halfway once passed for the last one."""
    whole, _ = run(tmp_path, make(), max_epochs=epochs, max_steps=20)
    first, trainer = run(tmp_path, make(), max_epochs=epochs, max_steps=first_stop)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second, _ = run(tmp_path, make(), resume=tmp_path / "first.ckpt", max_epochs=epochs, max_steps=20)
    assert first.steps + second.steps == whole.steps and len(first.steps) == first_stop < len(whole.steps)


@pytest.mark.parametrize("at_epoch_end", [True, False])
@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 28}])
def test_law_6_saved_at_the_end_of_an_epoch(tmp_path, make, at_epoch_end, limit):
    """Saved when the epoch ends, or when the validation that follows it ends."""
    settings = {"val_fraction": 0.2}
    whole, _ = run(tmp_path, make(**settings), **limit)
    saver = ModelCheckpoint(
        dirpath=tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=at_epoch_end
    )
    first, _ = run(tmp_path, make(**settings), callbacks=[saver], max_epochs=1)
    second, _ = run(tmp_path, make(**settings), resume=tmp_path / "epoch=0.ckpt", **limit)
    assert first.steps + second.steps == whole.steps


@pytest.mark.parametrize(("accumulate", "crash"), [(1, 5), (2, 9), (2, 13)])
def test_law_6_saved_in_the_middle_of_a_step(tmp_path, make, accumulate, crash):
    """Micro-batches whose gradients were not applied are trained again, and their step is whole."""
    common = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    whole, _ = run(tmp_path, make(), **common)
    saver = OnExceptionCheckpoint(str(tmp_path), "died")
    first, _ = run(tmp_path, make(), Recorder(crash_at=crash), callbacks=[saver], **common)
    second, trainer = run(tmp_path, make(), resume=tmp_path / "died.ckpt", **common)
    assert first.steps + second.steps == whole.steps
    assert trainer.global_step == len(whole.steps)


def test_law_6_killed_twice_in_one_epoch(tmp_path, make):
    whole, _ = run(tmp_path, make(), max_epochs=1)
    parts = []
    resume = None
    for stop in (3, 8, None):
        callbacks = [] if stop is None else [SaveAndStop(stop, tmp_path / f"{stop}.ckpt")]
        part, _ = run(tmp_path, make(), resume=resume, max_epochs=1, callbacks=callbacks)
        parts += part.steps
        resume = tmp_path / f"{stop}.ckpt"
    assert parts == whole.steps


@pytest.mark.parametrize(
    ("before", "after", "micro", "stop"), [(1, 2, 2, 5), (2, 1, 2, 4), (2, 3, 1, 3), (1, 4, 3, 3), (2, 1, 1, 2)]
)
def test_law_6_on_other_sizes(tmp_path, make, before, after, micro, stop):
    """Another accumulation and micro-batch: no row repeated or lost, whole steps, the right number of epochs."""
    one, _ = run(tmp_path, make(micro_batch_size=1), max_epochs=2)
    order = list(itertools.chain(*one.steps))
    path = tmp_path / "stop.ckpt"
    common = {"max_epochs": 2}
    first, _ = run(tmp_path, make(), callbacks=[SaveAndStop(stop, path)], accumulate_grad_batches=before, **common)
    second, trainer = run(tmp_path, make(micro_batch_size=micro), resume=path, accumulate_grad_batches=after, **common)
    done = before * MICRO * stop
    assert sorted(itertools.chain(*first.steps)) == sorted(order[:done])
    window, rest, expected = after * micro, ROWS - done, []
    for begin, count in ((done, rest), (ROWS, ROWS)):
        expected += [sorted(order[begin + i : begin + min(i + window, count)]) for i in range(0, count, window)]
    assert second.steps == expected
    assert trainer.current_epoch == 2 and trainer.global_step == stop + len(expected)


def test_trap_scale_7_estimated_stepping_batches_does_not_lose_the_position(tmp_path, make):
    """An optimizer that asks for ``estimated_stepping_batches`` makes Lightning load the data before the checkpoint."""
    whole, _ = run(tmp_path, make(), max_epochs=2)
    first, _ = run(tmp_path, make(), callbacks=[SaveAndStop(5, tmp_path / "stop.ckpt")], max_epochs=2)
    resumed = Recorder(early=True)
    run(tmp_path, make(num_workers=2), resumed, resume=tmp_path / "stop.ckpt", max_epochs=2)
    assert first.steps + resumed.steps == whole.steps


def test_trap_scale_7_refuses_what_it_cannot_mend(tmp_path, make):
    """With other sizes as well, Lightning has already counted the batches that would end the epoch too early."""
    run(tmp_path, make(), callbacks=[SaveAndStop(5, tmp_path / "stop.ckpt")], max_epochs=2)
    with pytest.raises(RuntimeError, match="steps_per_epoch"):
        run(
            tmp_path,
            make(),
            Recorder(early=True),
            resume=tmp_path / "stop.ckpt",
            max_epochs=2,
            accumulate_grad_batches=4,
        )


def test_loaders_that_are_made_anew_each_epoch(tmp_path, make):
    whole, _ = run(tmp_path, make(), max_epochs=3)
    path = tmp_path / "stop.ckpt"
    common = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    first, _ = run(tmp_path, make(num_workers=1), callbacks=[SaveAndStop(14, path)], **common)
    second, _ = run(tmp_path, make(num_workers=1), resume=path, **common)
    assert first.steps + second.steps == whole.steps


def test_law_6_with_validation_by_steps(tmp_path, make):
    """Validation every few batches whatever the epoch."""
    common = {"max_steps": 20, "val_check_interval": 4, "check_val_every_n_epoch": None}
    whole, _ = run(tmp_path, make(val_fraction=0.2), **common)
    killed = Recorder(crash_at=10)
    first, _ = run(tmp_path, make(val_fraction=0.2), killed, callbacks=[every_step(tmp_path, 8)], **common)
    second, _ = run(tmp_path, make(val_fraction=0.2), resume=tmp_path / "step=8.ckpt", **common)
    assert first.steps[:8] + second.steps == whole.steps


def test_limit_train_batches_ends_the_epoch(tmp_path, make):
    common = {"max_epochs": 3, "limit_train_batches": 4}
    whole, _ = run(tmp_path, make(), **common)
    assert len(whole.steps) == 12
    for stop in (2, 4, 6):
        path = tmp_path / f"{stop}.ckpt"
        first, _ = run(tmp_path, make(), callbacks=[SaveAndStop(stop, path)], **common)
        second, _ = run(tmp_path, make(), resume=path, **common)
        assert first.steps + second.steps == whole.steps


def test_a_checkpoint_of_other_data_is_refused_inside_an_epoch(tmp_path, make, chats):
    path = tmp_path / "inside.ckpt"
    run(tmp_path, make(), callbacks=[SaveAndStop(5, path)], max_epochs=2)
    with pytest.raises(ValueError, match=r"10 of 23 units into epoch 0.*seed 3 -> 4.*data\.seed"):
        run(tmp_path, make(seed=4), resume=path, max_epochs=2)
    with pytest.raises(ValueError, match=r"units into epoch 0.*of 23 -> \d+, tokens"):
        run(tmp_path, make(val_fraction=0.2), resume=path, max_epochs=2)


def test_a_checkpoint_at_the_end_of_an_epoch_goes_on_with_other_data(tmp_path, make):
    path = tmp_path / "end.ckpt"
    run(tmp_path, make(), callbacks=[SaveAndStop(12, path)], max_epochs=2)
    fresh, _ = run(tmp_path, make(val_fraction=0.2), max_epochs=2)
    second, _ = run(tmp_path, make(val_fraction=0.2), resume=path, max_epochs=2)
    assert second.steps == fresh.steps[len(fresh.steps) // 2 :]


def test_the_state_is_one_small_dict(tmp_path, make):
    path = tmp_path / "stop.ckpt"
    run(tmp_path, make(), callbacks=[SaveAndStop(5, path)], max_epochs=2)
    state = torch.load(path, weights_only=True)["ChatDataModule"]
    place = {"epoch": 0, "units": 10, "inner": 0, "window": 0, "of": 23}
    assert state == {**place, "tokens": state["tokens"], "seed": 3, "shuffle": True, "easy_first": None}


def test_a_checkpoint_without_a_position_follows_lightning(tmp_path, make):
    whole, _ = run(tmp_path, make(), max_epochs=2)
    path = tmp_path / "stop.ckpt"
    first, _ = run(tmp_path, make(), callbacks=[SaveAndStop(5, path)], max_epochs=2)
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["ChatDataModule"], checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    torch.save(checkpoint, path)
    second, _ = run(tmp_path, make(), resume=path, max_epochs=2)
    assert first.steps + second.steps == whole.steps


# ---- on real ranks ----


class Gather(Recorder):
    """A recorder whose window may lie on several ranks."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        return self.weight * batch.loss_mask.sum() / batch.window_weight


def train_on_ranks(chats: str, model: str, folder: str, stop: int, epochs: int) -> dict[str, Any]:
    """Runs in each rank process: trains to a stop, and tells what it saw."""
    data = data_module(Path(chats), Path(model), micro_batch_size=MICRO, seed=3)
    data.prepare()
    recorder = Gather()
    trainer = make_trainer(
        Path(folder),
        max_epochs=epochs,
        devices=world_size(),
        strategy="ddp",
        callbacks=[SaveAndStop(stop, Path(folder) / "ranks.ckpt")],
    )
    fit(trainer, recorder, data)
    return {"rank": rank(), "steps": recorder.steps, "batches": recorder.batches, "total": len(data.train_dataloader())}


def test_law_6_and_7_two_ranks_then_one(tmp_path, chats, model_folder, make):
    """Two gloo ranks share each step and stop together; one process goes on where they stopped."""
    order = list(itertools.chain(*run(tmp_path, make(micro_batch_size=1), max_epochs=2)[0].steps))
    stop = 4
    args = {"chats": str(chats), "model": str(model_folder), "folder": str(tmp_path), "stop": stop, "epochs": 2}
    ranks = run_ranks("tests.data.test_resume:train_on_ranks", 2, args, timeout=120)
    assert [one["batches"] for one in ranks] == [stop, stop] and len({one["total"] for one in ranks}) == 1
    for step in range(stop):
        seen = sorted(tuple(document) for one in ranks for document in one["steps"][step])
        assert seen == sorted(order[step * 4 : (step + 1) * 4])
    second, _ = run(tmp_path, make(), resume=tmp_path / "ranks.ckpt", max_epochs=2)
    assert second.steps[0] == sorted(order[16:18])
    assert sorted(itertools.chain(*second.steps)) == sorted(order[16:])


def test_loader_batches_match_the_trainers(make):
    """The same batches without a trainer: what a benchmark or a preview iterates is what is trained."""
    data = make()
    data.setup("fit")
    by_hand = [sorted(documents_of(batch)) for batch in data.train_dataloader()]
    model, _ = run(Path(data.preparation.folder).parent, make(), max_epochs=1)
    assert by_hand == model.steps
