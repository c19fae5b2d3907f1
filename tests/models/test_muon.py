"""Muon beside AdamW in one optimizer: the same steps as the two by hand, an exact resume, and what it refuses."""

import copy
import io

import pytest
import torch
from torch import nn

from ptl.models.muon import hidden_matrices
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import LoRA, ModelSpec
from tests import tiny
from tests.objectives import law
from tests.ranks import run_ranks

SPEC = Optimizer(kind="muon", lr=1e-2, weight_decay=0.1)
IDS = torch.randint(0, 400, (4, 16), generator=torch.Generator().manual_seed(0))


def step(model, *optimizers, ids=IDS):
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("tie", [True, False])
def test_hidden_matrices_are_those_of_the_layers(tie):
    model = tiny.make_model(tie=tie)
    chosen = hidden_matrices(model)
    names = {name for name, p in model.named_parameters() if id(p) in chosen}
    assert names == {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    }


def test_it_steps_as_muon_and_adamw_by_hand():
    model = tiny.make_model()
    other = copy.deepcopy(model)
    combined = SPEC.build(model)
    matrices = [p for name, p in other.named_parameters() if "layers" in name and p.ndim == 2]
    embedding = [other.get_input_embeddings().weight]
    norms = [p for p in other.parameters() if p.ndim == 1]
    assert len(matrices) + len(embedding) + len(norms) == len(list(other.parameters()))
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95)
    )
    start, total = Schedule(kind="linear", warmup=2, floor=0.1), 6
    schedules = [start.build(optimizer, total) for optimizer in (combined, muon, adamw)]
    losses = []
    for _ in range(total):
        losses.append(step(model, combined))
        assert losses[-1] == step(other, muon, adamw)
        for schedule in schedules:
            schedule.step()
        assert same(model, other)
    assert losses[-1] < losses[0] - 0.1


def test_a_resume_is_exact():
    model = tiny.make_model()
    optimizer = SPEC.build(model)
    for _ in range(3):
        step(model, optimizer)
    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    resumed = tiny.make_model(seed=1)
    resumed.load_state_dict(weights)
    again = SPEC.build(resumed)
    again.load_state_dict(state)
    for _ in range(3):
        assert step(model, optimizer) == step(resumed, again)
        assert same(model, resumed)


def test_the_closure_runs_once_with_gradients():
    model = tiny.make_model()
    optimizer, calls = SPEC.build(model), []

    def closure():
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        calls.append(loss)
        return loss

    before = copy.deepcopy(model)
    assert optimizer.step(closure) is calls[0] and len(calls) == 1
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_what_is_frozen_is_in_no_group():
    model = tiny.make_model()
    model.model.layers[0].requires_grad_(False)
    grouped = {id(p) for group in SPEC.build(model).param_groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_an_adapter_leaves_nothing_for_muon(tmp_path):
    folder = tiny.save_folder(tmp_path / "model", tiny.make_tokenizer())
    model = ModelSpec(name=str(folder), adapter=LoRA(rank=2)).build()
    with pytest.raises(
        ValueError, match=r"model\.init_args\.optimizer\.kind muon has no hidden matrix.*set it to adamw"
    ):
        SPEC.build(model)


def test_a_run_with_muon_resumes_exactly_and_zero_is_refused(tmp_path):
    """``ptl fit`` with a recipe: four steps in one go and two and two; then under each of ZeRO's stages that cut."""
    folder = law.make_folder(tmp_path)
    result = run_ranks("tests.models.muon_fit:run", 1, {"folder": str(folder)}, timeout=280)[0]
    assert result["codes"] == {"whole": 0, "first": 0, "second": 0, "zero1": 2, "zero2": 2, "zero3": 2}
    assert result["largest_difference"] == 0.0 and result["moved"] > 1e-3
    for name in ("zero1", "zero2", "zero3"):
        assert "model.init_args.optimizer.kind muon needs whole matrices" in result["errors"][name]
