"""A run in bf16 on a CPU without bf16 instructions: it says how it computes, and leaves the process as it was."""

from __future__ import annotations

import json

import pytest
from torch.utils import _python_dispatch

from ptl import cli
from ptl.callbacks.jsonl import read_metrics
from ptl.strategies.cpu_products import SLOW_BF16, bf16_slowdown


@pytest.mark.parametrize("keys", [("--model.policy.dtype", "bf16"), ("--trainer.precision", "bf16-mixed"), ()])
def test_a_run_in_bf16_says_how_it_computes(keys, tmp_path, model_folder, monkeypatch, capsys):
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    chats = [
        {"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "world"}]}
        for i in range(8)
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    slow = bf16_slowdown() > SLOW_BF16
    code = cli.main(
        [
            *("fit", "-c", "configs/objective/sft.yaml", "--model.policy.name", str(model_folder), *keys),
            *("--data.train", f"[{{path: {rows}}}]", "--data.max_length", "128", "--data.preparation.num_proc", "1"),
            *("--run.dir", f"{tmp_path}/run", "--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1"),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
            *("--data.micro_batch_size", "1", "--data.pack_to", "128"),
        ]
    )
    said = capsys.readouterr().err
    assert code == 0
    assert ("matrix products are made in fp32 and rounded to bf16" in said) == (slow and bool(keys))
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert losses and all(0 < loss < 10 for loss in losses)
    assert not _python_dispatch.is_in_torch_dispatch_mode()
