"""The data module: each row once, exact weights, equal ranks, settings that are refused with the key to change."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from ptl.data.audit import AuditError, Thresholds
from ptl.data.module import ChatDataModule
from ptl.data.parts import Preparation, Split, open_part
from ptl.data.prepare import prepare
from ptl.data.render import RenderPolicy
from ptl.data.sources import Source
from ptl.data.views import ChatView
from tests.data.chats import Recorder, data_module, documents_of, fit, make_trainer, write_chats

ROWS = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chats")


@pytest.fixture(scope="module")
def chats(folder):
    return write_chats(folder / "chats.jsonl", ROWS)


@pytest.fixture(scope="module")
def prepared(chats, tokenizer, model_folder):
    module = data_module(chats, model_folder)
    return prepare(
        module.train_sources,
        view=ChatView(),
        renderer=module.renderer,
        max_length=2048,
        truncation="error",
        cache_dir=module.preparation.folder,
        num_proc=1,
    )


@pytest.fixture(scope="module")
def documents(prepared):
    return [tuple(ids) for ids in prepared.rows["ids"]]


def stream(loader) -> list[list]:
    return [documents_of(batch) for batch in loader]


# ---- every row once ----


@pytest.mark.parametrize(
    "settings", [{}, {"layout": "padded"}, {"pack_to": 128, "max_length": 128}, {"shuffle": False}]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_law_8_each_epoch_sees_each_row_once(chats, model_folder, documents, settings, workers):
    data = data_module(chats, model_folder, micro_batch_size=2, num_workers=workers, **settings)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = [stream(loader) for _ in range(2)]
    data.teardown("fit")
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == sorted(documents)
        assert len(epoch) == len(loader) == data.steps_per_epoch
    assert (epochs[0] == epochs[1]) == (not settings.get("shuffle", True))


def test_workers_give_the_same_batches(chats, model_folder):
    streams = []
    for workers in (0, 2):
        data = data_module(chats, model_folder, micro_batch_size=3, num_workers=workers)
        data.setup("fit")
        streams.append(list(data.train_dataloader()))
        data.teardown("fit")
    for a, b in zip(*streams, strict=True):
        for x, y in zip((*a[:-1], *a.documents), (*b[:-1], *b.documents), strict=True):
            assert (x is None) == (y is None) and (x is None or torch.equal(torch.as_tensor(x), torch.as_tensor(y)))


def test_the_loader_leaves_the_random_state_alone_and_waits_for_its_first_batch(chats, model_folder):
    data = data_module(chats, model_folder)
    data.setup("fit")
    loader = data.train_dataloader()
    before = torch.get_rng_state()
    waiting = [iter(loader) for _ in range(3)]  # what asks for an iterator and drops it consumes nothing
    first = documents_of(next(iter(loader)))
    assert torch.equal(before, torch.get_rng_state())
    del waiting
    again = data_module(chats, model_folder)
    again.setup("fit")
    assert documents_of(next(iter(again.train_dataloader()))) == first


# ---- validation ----


def test_val_fraction_is_the_same_in_every_run_and_disjoint(chats, model_folder, documents):
    halves = []
    for seed in (0, 1):
        data = data_module(chats, model_folder, val_fraction=0.3, seed=seed)
        data.setup("fit")
        train, val = (
            list(itertools.chain(*stream(loader))) for loader in (data.train_dataloader(), data.val_dataloader())
        )
        assert sorted(train + val) == sorted(documents) and train and val
        halves.append(val)
    assert halves[0] == halves[1], "validation rows must not follow the seed, nor be shuffled"
    assert halves[0] == [document for document in documents if document in set(halves[0])]


def test_val_sources(folder, chats, model_folder):
    val = write_chats(folder / "val.jsonl", 5, start=100)
    data = data_module(chats, model_folder, val=[Source(path=str(val), name="fresh")], micro_batch_size=2)
    trainer = make_trainer(folder, max_epochs=1)
    model = fit(trainer, Recorder(), data)
    assert len(model.validated) == len(set(model.validated)) == 5
    assert data.source_names("val") == data.source_names("test") == ("fresh",)
    assert data.source_names("train") == (str(chats),)
    assert set(data.audits) == {"train", "val"}


def test_no_validation_rows(chats, model_folder):
    data = data_module(chats, model_folder)
    data.setup("fit")
    assert data.val_dataloader() == [] and data.source_names("val") == ()


# ---- units, weights, counts ----


def test_source_weights_in_an_epoch(folder, chats, model_folder):
    other = write_chats(folder / "other.jsonl", 10, start=200)
    sources = [Source(path=str(chats), name="a"), Source(path=str(other), name="b", weight=2.0)]
    data = data_module(chats, model_folder, train=sources)
    data.setup("fit")
    counts = Counter(int(batch.sources[0]) for batch in data.train_dataloader())
    assert counts == {0: ROWS, 1: 20} and data.steps_per_epoch == ROWS + 20


def test_packs_fill_their_budget(chats, model_folder):
    data = data_module(chats, model_folder, pack_to=128, max_length=128)
    data.setup("fit")
    lengths = [batch.input_ids.numel() for batch in data.train_dataloader()]
    summary = data.summary()
    assert max(lengths) <= 128 and sum(lengths) == summary["train"]["tokens"]
    assert summary["train"]["utilisation"] == pytest.approx(sum(lengths) / (128 * len(lengths)))
    assert summary["steps_per_epoch"] == len(lengths) and summary["train"]["rows"] == ROWS


def test_padded_micro_batches_are_of_similar_length(chats, model_folder):
    shares = []
    for settings in ({"micro_batch_size": 4}, {"micro_batch_size": 1}):
        data = data_module(chats, model_folder, layout="padded", **settings)
        trainer = make_trainer(chats.parent, accumulate_grad_batches=23 // settings["micro_batch_size"] + 1)
        data.trainer = trainer
        data.setup("fit")
        batches = list(data.train_dataloader())
        shares.append(sum(int(b.attention_mask.sum()) for b in batches) / sum(b.input_ids.numel() for b in batches))
    assert shares[1] == 1.0 and shares[0] > 0.95


def test_a_second_start_reads_what_is_kept(chats, model_folder, prepared):
    data_module(chats, model_folder, pack_to=64, max_length=64).prepare()
    kept = {path: path.stat().st_mtime_ns for path in prepared.path.parent.rglob("*.npy")}
    data = data_module(chats, model_folder, pack_to=64, max_length=64)
    data.prepare()
    data.prepare()
    data.prepare_data()
    data.setup("fit")
    assert {path: path.stat().st_mtime_ns for path in prepared.path.parent.rglob("*.npy")} == kept


def test_no_rank_holds_the_data(chats, model_folder, prepared):
    part = open_part(prepared, weights=(1.0,), capacity=64, seed=0, split=None)
    for array in (prepared.lengths, prepared.weights, prepared.source_ids, part.units.members.rows):
        assert isinstance(array, np.memmap)
    assert prepared.rows.cache_files


# ---- the trainer ----


def test_steps_per_epoch_follows_the_trainer(chats, folder, model_folder):
    for limit, accumulate, steps in ((1.0, 2, 6), (4, 2, 2), (0.5, 2, 3), (100, 1, 12)):
        data = data_module(chats, model_folder, micro_batch_size=2)
        trainer = make_trainer(folder, max_epochs=1, accumulate_grad_batches=accumulate, limit_train_batches=limit)
        model = fit(trainer, Recorder(), data)
        assert len(model.steps) == data.steps_per_epoch == steps == trainer.global_step


def test_a_limit_that_cuts_a_step_is_refused(chats, folder, model_folder):
    data = data_module(chats, model_folder)
    trainer = make_trainer(folder, max_epochs=1, accumulate_grad_batches=4, limit_train_batches=10)
    with pytest.raises(ValueError, match=r"limit_train_batches leaves 10 .*accumulate_grad_batches 4: set it to 8"):
        fit(trainer, Recorder(), data)


def test_fast_dev_run_is_one_batch(chats, folder, model_folder):
    model = fit(make_trainer(folder, fast_dev_run=True), Recorder(), data_module(chats, model_folder))
    assert model.batches == 1


def test_accumulation_that_changes_while_training_is_refused(chats, folder, model_folder):
    callback = GradientAccumulationScheduler(scheduling={0: 1, 1: 2})
    trainer = make_trainer(folder, max_epochs=2, callbacks=[callback], enable_checkpointing=False)
    with pytest.raises(ValueError, match="remove GradientAccumulationScheduler"):
        fit(trainer, Recorder(), data_module(chats, model_folder))


def test_a_fresh_trainer_begins_at_the_first_epoch(chats, folder, model_folder):
    data = data_module(chats, model_folder)
    first, second = (fit(make_trainer(folder, max_epochs=1), Recorder(), data).steps for _ in range(2))
    assert first == second


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train": []}, r"data\.train is empty"),
        ({"val_fraction": 1.0}, r"data\.val_fraction must be at least 0 and below 1, got 1\.0"),
        ({"val_fraction": 0.1, "val": [Source(path="x.jsonl")]}, r"data\.val and data\.val_fraction exclude"),
        ({"max_length": 1}, r"data\.max_length must be 2 or more, got 1"),
        ({"micro_batch_size": 0}, r"data\.micro_batch_size must be 1 or more, got 0"),
        ({"seed": -1}, r"data\.seed must be 0 or more, got -1"),
        ({"num_workers": -2}, r"data\.num_workers must be 0 or more"),
        ({"pack_to": 512}, r"data\.pack_to 512 is below data\.max_length 2048"),
        ({"pack_to": 4096, "layout": "padded"}, r"data\.pack_to needs data\.layout packed"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(chats, model_folder, settings, told):
    with pytest.raises(ValueError, match=told):
        data_module(chats, model_folder, **settings)


def test_a_tokenizer_must_be_known(chats, model_folder):
    data = data_module(chats, model_folder, tokenizer=None)
    with pytest.raises(ValueError, match=r"data\.tokenizer is not set"):
        data.prepare()
    data = data_module(chats, model_folder, tokenizer=None)
    data.bind(view=ChatView(), tokenizer=str(model_folder))
    data.prepare()
    named = data_module(chats, model_folder, tokenizer="mine")
    named.bind(view=ChatView(), tokenizer=str(model_folder))
    assert named.tokenizer == "mine"


def test_thresholds_stop_before_training(folder, model_folder):
    path = folder / "bad.jsonl"
    write_chats(path, 9)
    with path.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": None}]}) + "\n")
    with pytest.raises(AuditError, match=r"1 of 10 rows"):
        data_module(path, model_folder).prepare()
    data_module(path, model_folder, thresholds=Thresholds(max_bad_fraction=0.1)).prepare()
    strict = Thresholds(max_bad_fraction=0.1, min_trained_tokens=10**6)
    with pytest.raises(AuditError, match="fewer than"):
        data_module(path, model_folder, thresholds=strict).prepare()


def test_policy_and_template_reach_the_renderer(chats, model_folder):
    data = data_module(chats, model_folder, policy=RenderPolicy(train_roles=("user",)), template="im_sep")
    assert "<|im_sep|>" in data.renderer.template and data.renderer.policy.train_roles == ("user",)


def test_split_by_hand(prepared, documents):
    parts = [
        open_part(prepared, weights=(1.0,), capacity=64, seed=0, split=Split(fraction=0.3, held_out=held_out))
        for held_out in (False, True)
    ]
    rows = [part.units.members.rows.tolist() for part in parts]
    assert sorted(rows[0] + rows[1]) == list(range(ROWS)) and all(rows)


def test_the_signature_is_the_schema(chats, model_folder, tmp_path):
    """What a YAML file says reaches the module through jsonargparse, nested dataclasses too."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ChatDataModule, "data")
    config = tmp_path / "data.yaml"
    config.write_text(
        f"data:\n  train: [{{path: {chats}, weight: 0.5}}]\n  val_fraction: 0.2\n  max_length: 128\n  pack_to: 128\n"
        f"  tokenizer: {model_folder}\n  policy: {{last_turn_only: true}}\n  thresholds: {{max_bad_fraction: 0.01}}\n"
        f"  preparation: {{cache_dir: {tmp_path}, num_proc: 1}}\n"
    )
    parser.add_argument("--config", action="config")
    data = parser.instantiate_classes(parser.parse_args(["--config", str(config), "--data.layout=packed"])).data
    assert isinstance(data, ChatDataModule)
    assert data.train_sources == [Source(path=str(chats), weight=0.5)] and data.policy.last_turn_only
    assert data.preparation == Preparation(cache_dir=str(tmp_path), num_proc=1)
    assert data.thresholds.max_bad_fraction == 0.01
    data.prepare()
    assert data.summary()["train"]["units_per_epoch"] >= 1
