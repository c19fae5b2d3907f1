"""Compiled layers and losses: the numbers of those that are not, under the same names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch._dynamo.utils import counters

from ptl.functional.divergence import Divergence
from ptl.functional.fused_divergence import Side, fused_divergence
from ptl.functional.head import Options, Rows, _loss_rows, fusible_rows
from ptl.models.compiled import compile_layers, is_compiled
from ptl.models.spec import LoRA, ModelSpec
from ptl.models.teachers import Teacher
from ptl.objectives.distillation import Distillation, HiddenMatch
from ptl.objectives.sft import SFT
from ptl.rollout.sampling import generate
from tests.objectives import law

PLAIN = Options(None, 1.0, 0.0, 0.0, None, False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return law.make_folder(tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_both_ways_of_a_block_of_rows_give_the_same_losses_and_gradients(dtype, biased):
    """The passes for a compiler, as written, beside the plain ones."""
    torch.manual_seed(0)
    logits, weights = torch.randn(29, 500).mul(5).to(dtype), torch.rand(29)
    targets = torch.randint(0, 500, (29,))
    targets[:9] = logits[:9].float().argmax(-1)
    results = []
    for way in ("plain", "compiler"):
        z, bias = logits.clone(), torch.zeros(500) if biased else None
        rows = Rows(torch.empty(29), torch.empty(29), torch.empty(29, dtype=torch.bool), None)
        if way == "plain":
            _loss_rows(z, targets, weights, PLAIN, [torch.empty(29, 500)], rows, True, bias)
        else:
            nll, correct = fusible_rows(z, targets, weights, True, bias)
            rows = Rows(nll, nll, correct, None)
        results.append((z.float(), rows.loss, rows.correct, bias))
    for z, loss, correct, bias in results[1:]:
        close = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}
        torch.testing.assert_close(z, results[0][0], **close)
        torch.testing.assert_close(loss, results[0][1], rtol=1e-5, atol=1e-5)
        assert torch.equal(correct, results[0][2]) and 9 <= correct.sum() < 29
        if bias is not None:
            torch.testing.assert_close(bias, results[0][3], rtol=1e-2, atol=5e-3 if dtype == torch.bfloat16 else 1e-5)


def test_what_cannot_be_compiled_is_refused(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match=r"sequence_parallel 2 .* set policy\.compile to false"):
        SFT(ModelSpec(name="m", compile=True), sequence_parallel=2)
    for student, teacher in ((True, False), (False, True)):
        with pytest.raises(ValueError, match=r"model\.hidden reads what is between layers"):
            Distillation(
                ModelSpec(name="m", compile=student),
                Teacher(model=ModelSpec(name="t", compile=teacher)),
                hidden=HiddenMatch(layers=[1]),
            )
    with pytest.raises(ValueError, match="Linear has none: set policy.compile to false"):
        compile_layers(torch.nn.Linear(2, 2))
    monkeypatch.setattr("ptl.models.compiled.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"policy\.compile does not go with ZeRO-3.*stage to 2"):
        ModelSpec(name=f"{folder}/model", compile=True).build()


def test_a_compiled_model_has_the_names_of_a_plain_one(folder):
    for head, adapter in (("lm", None), ("lm", LoRA(rank=2)), ("scalar", None), ("scalar", LoRA(rank=2))):
        spec = ModelSpec(name=f"{folder}/model", adapter=adapter, head=head)
        plain, compiled = spec.build(), dataclasses.replace(spec, compile=True).build()
        assert is_compiled(compiled) and not is_compiled(plain)
        assert list(plain.state_dict()) == list(compiled.state_dict())


class Losses(Callback):
    def __init__(self):
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def fitted(folder: Path, name: str, compiled: bool, lora: bool) -> tuple[list[float], list[list[int]]]:
    """The losses of a fit on packs of many lengths, and what the model says then, with a cache that grows."""
    torch.manual_seed(1)
    objective, data = law.build(str(folder), lora=lora, micro=2)
    objective.spec = dataclasses.replace(objective.spec, compile=compiled)
    losses = Losses()
    trainer = law.trainer_of(str(folder / name), "auto", 1, 2, callbacks=[losses])
    trainer.fit(objective, datamodule=data)
    assert is_compiled(objective.policy) == compiled
    counters.clear()
    told = {"stop": [], "limits": [12, 12], "vocab": 300, "temperature": 0.0, "seed": 0}
    said = generate(objective.policy.eval(), [[5, 9, 20], [33, 41]], [0, 1], **told)
    assert not counters["frames"]["total"]  # a growing cache compiles nothing
    return losses.seen, said


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_compiled_model_trains_and_speaks_as_a_plain_one(folder, lora):
    plain, compiled = (fitted(folder, str(on), on, lora) for on in (False, True))
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5) and len(plain[0]) > 4
    assert compiled[1] == plain[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"])
def test_a_compiled_divergence_is_the_plain_one(kind):
    torch.manual_seed(0)
    x, w, y, v = (torch.randn(rows, wide) for rows, wide in ((40, 16), (300, 16), (40, 24), (320, 24)))
    y[3, 0] = float("nan")
    targets, weights = torch.randint(0, 300, (40,)), torch.rand(40)
    results = []
    for compiled in (False, True):
        hidden, head = x.clone().requires_grad_(), w.clone().requires_grad_()
        out = fused_divergence(
            Side(hidden, head),
            Side(y, v),
            targets,
            weights,
            divergence=Divergence(kind=kind, temperature=1.5, beta=0.3),
            ce=0.2,
            chunk_tokens=16,
            compiled=compiled,
        )
        out.total.backward()
        assert out.bad == 1
        results.append((out.total.detach(), out.divergence, out.token_divergence, hidden.grad, head.grad))
    for got, expected in zip(results[1], results[0]):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
