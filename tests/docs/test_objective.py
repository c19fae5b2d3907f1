"""The example of docs/objective.md: its file, its YAML and its commands run as they stand, on a tiny model."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptl.callbacks.jsonl import read_metrics
from ptl.models.spec import ModelSpec
from tests import tiny
from tests.ranks import ROOT

PAGE = (ROOT / "docs/objective.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("focal")
    tiny.save_folder(folder / "assets/smollm2-135m-instruct", tiny.make_tokenizer())
    (folder / "configs").symlink_to(ROOT / "configs")
    for language in ("python", "yaml"):
        name = re.match(r"# (\S+)\n", block(language))
        assert name
        (folder / name[1]).write_text(block(language), encoding="utf-8")
    return folder


def test_the_commands_train_log_and_export(folder):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "PTL"))}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PTL_CACHE": str(folder / "cache")}
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block("sh")],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
    rows = [row for row in read_metrics(folder / "runs/focal/metrics.jsonl") if "train/loss" in row]
    assert len(rows) == 2 and {"train/nll", "train/probability"} <= set(rows[-1])
    assert all(0 < row["train/loss"] < row["train/nll"] and 0 < row["train/probability"] < 1 for row in rows)
    assert (folder / "runs/focal/export/config.json").is_file()


def test_its_loss_is_the_formula_over_whole_logits(folder):
    from ptl.data.batches import collate_tokens

    spec = importlib.util.spec_from_file_location("focal", folder / "focal.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    objective = module.FocalSFT(ModelSpec(name=str(folder / "assets/smollm2-135m-instruct")), gamma=2.0)
    objective.configure_model()
    documents = [([5, 9, 7, 11, 30, 8], [0, 0, 1, 1, 0.5, 1]), ([6, 20, 21, 22], [0, 1, 0, 1])]
    rows = [
        {
            "ids": ids,
            "spans": [at for place in range(len(ids)) for at in (place, place + 1)],
            "span_weights": weights,
            "source": 0,
        }
        for ids, weights in documents
    ]
    batch = collate_tokens(rows, layout="packed", pad_id=0, window_weight=1.0)
    out = objective.loss(batch)
    total, weight = torch.zeros(()), 0.0
    for ids, weights in documents:
        logits = objective.policy(torch.tensor([ids])).logits[0, :-1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        total = total + (torch.tensor(weights[1:]) * -((1 - logp.exp()) ** 2) * logp).sum()
        weight += sum(weights[1:])
    torch.testing.assert_close(out.total, total, rtol=1e-5, atol=1e-5)
    assert float(out.weight) == weight
    parameter = objective.policy.get_input_embeddings().weight
    ours, plain = (torch.autograd.grad(loss, parameter)[0] for loss in (out.total, total))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_a_gamma_out_of_its_range_is_refused(folder):
    spec = importlib.util.spec_from_file_location("focal", folder / "focal.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match=r"model\.gamma"):
        module.FocalSFT(ModelSpec(name="x"), gamma=0.5)
