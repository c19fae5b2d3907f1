"""Rows that are held out and also trained on under another line are told of before the run."""

from __future__ import annotations

import json

import pytest

from ptl.data.module import ChatDataModule
from ptl.data.parts import Preparation
from ptl.data.sources import Source
from ptl.trainer_cli import leak_warning


@pytest.fixture
def rows(tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": f"hello {i % 6}"}, {"role": "assistant", "content": "world"}]}
        for i in range(8)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


@pytest.mark.parametrize(
    "fraction, deduplicate, told", [(0.25, False, "2 of 8 rows"), (0.25, True, None), (0.0, False, None)]
)
def test_duplicates_are_told_of_where_they_leak(rows, tmp_path, model_folder, fraction, deduplicate, told):
    data = ChatDataModule(
        [Source(path=str(rows))],
        tokenizer=str(model_folder),
        val_fraction=fraction,
        preparation=Preparation(cache_dir=str(tmp_path / "cache"), num_proc=1, deduplicate=deduplicate),
    )
    data.prepare()
    warning = leak_warning(data)
    assert (warning is None) if told is None else (told in (warning or "") and "preparation.deduplicate" in warning)
