"""Distillation: one update for every split, strategy and kind of teacher; a teacher that nothing trains or saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests import tiny
from tests.objectives import kd, law
from tests.ranks import run_ranks

ONE = [
    {"name": "1x1x8", "strategy": "auto", "world_size": 1, "accumulate": 1, "micro": 8},
    {"name": "1x4x2", "strategy": "auto", "world_size": 1, "accumulate": 4, "micro": 2},
    {"name": "padded-1x4x2", "strategy": "auto", "world_size": 1, "accumulate": 4, "micro": 2, "layout": "padded"},
]
ADAPTED = {"name": "lora-1x1x8", "strategy": "auto", "world_size": 1, "accumulate": 1, "micro": 8, "lora": True}
HIDDEN = {"name": "hidden-1x1x8", "strategy": "auto", "world_size": 1, "accumulate": 1, "micro": 8, "hidden": True}
OWN = {"name": "own-1x1x8", "strategy": "auto", "world_size": 1, "accumulate": 1, "micro": 8, "on_policy": 1.0}
TWO: list[dict[str, Any]] = [
    {"name": f"{strategy}-{placement}", "strategy": strategy, "world_size": 2, "accumulate": k, "micro": m,
     "placement": placement}
    for strategy, placement, k, m in (
        ("ddp", "replica", 2, 2), ("ddp", "sharded", 1, 4),
        ("zero1", "replica", 1, 4), ("zero1", "sharded", 2, 2),
        ("zero2", "replica", 2, 2), ("zero2", "sharded", 1, 4),
        ("zero3", "replica", 1, 4), ("zero3", "sharded", 2, 2),
    )
]  # fmt: skip
CACHED = {"name": "cached-1x1x8", "strategy": "auto", "world_size": 1, "accumulate": 1, "micro": 8}
TWO_OTHERS: list[dict[str, Any]] = [
    {"name": "lora-zero3", "of": "lora-1x1x8", "strategy": "zero3", "world_size": 2, "accumulate": 2, "micro": 2,
     "lora": True, "placement": "sharded"},
    {"name": "hidden-zero3", "of": "hidden-1x1x8", "strategy": "zero3", "world_size": 2, "accumulate": 1, "micro": 4,
     "hidden": True, "placement": "sharded"},
    {"name": "hidden-ddp", "of": "hidden-1x1x8", "strategy": "ddp", "world_size": 2, "accumulate": 2, "micro": 2,
     "hidden": True},
    {"name": "own-zero3", "of": "own-1x1x8", "strategy": "zero3", "world_size": 2, "accumulate": 2, "micro": 2,
     "on_policy": 1.0},
    {"name": "own-ddp", "of": "own-1x1x8", "strategy": "ddp", "world_size": 2, "accumulate": 1, "micro": 4,
     "on_policy": 1.0},
    {"name": "cached-ddp", "of": "cached-1x1x8", "strategy": "ddp", "world_size": 2, "accumulate": 2, "micro": 2,
     "layout": "padded", "cache": True},
    {"name": "cached-zero3", "of": "cached-1x1x8", "strategy": "zero3", "world_size": 2, "accumulate": 1, "micro": 4,
     "cache": True},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return kd.make_folder(tmp_path_factory.mktemp("kd"))


@pytest.fixture(scope="module")
def start(folder) -> np.ndarray:
    objective, _ = kd.build(str(folder))
    objective.configure_model()
    return law.flat({k: v.detach() for k, v in objective.policy.state_dict(keep_vars=True).items() if v.requires_grad})


@pytest.fixture(scope="module")
def reference(folder) -> np.ndarray:
    """The obvious loop in fp64: both sides' whole logits, one row at a time, sum over the window over its weight."""
    from transformers import AutoModelForCausalLM

    _, data = kd.build(str(folder))
    data.prepare()
    load = {"attn_implementation": "eager"}
    student = AutoModelForCausalLM.from_pretrained(folder / "model", **load).double()
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", **load).double().eval()
    vocabulary = len(data.renderer.tokenizer)
    batches = list(data.train_dataloader())
    for step in range(law.STEPS):
        total, weight = 0.0, 0.0
        for batch in batches[8 * step : 8 * step + 8]:
            with torch.no_grad():
                p = teacher(batch.input_ids).logits[0, :-1, :vocabulary].log_softmax(-1)
            q = student(batch.input_ids).logits[0, :-1, :vocabulary].log_softmax(-1)
            total = total + ((p.exp() * (p - q)).sum(-1) * batch.loss_mask[0, 1:]).sum()
            weight += float(batch.loss_mask[0, 1:].sum())
        (total / weight).backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= kd.LR * parameter.grad
                parameter.grad = None
    return law.flat({k: v.detach() for k, v in student.state_dict(keep_vars=True).items() if v.requires_grad})


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("weights")
    common, cache = {"folder": str(folder), "out": str(out)}, str(write_cache(folder))
    one = [*ONE, ADAPTED, HIDDEN, OWN, {**CACHED, "cache": cache}]
    run_ranks("tests.objectives.kd:run", 1, {**common, "cases": one}, timeout=240)
    two = [{k: v for k, v in case.items() if k != "of"} for case in [*TWO, *TWO_OTHERS]]
    two = [{**case, "cache": cache} if case.get("cache") else case for case in two]
    run_ranks("tests.objectives.kd:run", 2, {**common, "cases": two}, timeout=280)
    return out


def write_cache(folder: Path, name: str = "kept", *options: str) -> Path:
    """Everything that the teacher says about the rows, by the command that users run."""
    from ptl import cli

    recipe = {
        "model": {
            "class_path": "ptl.objectives.distillation.Distillation",
            "init_args": {
                "policy": {"name": f"{folder}/model"},
                "teacher": {"model": {"name": f"{folder}/teacher"}},
            },
        },
        "data": {
            "train": [{"path": f"{folder}/rows.jsonl"}],
            "max_length": 256,
            "preparation": {"cache_dir": f"{folder}/cache", "num_proc": 1},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert (
        cli.main(["synth", "teacher", "-c", str(path), "--out", str(folder / name), *(options or ("--k", "100000"))])
        == 0
    )
    return folder / name


def error(update: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(update - expected) / np.linalg.norm(expected))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [case["name"] for case in ONE + TWO])
def test_law_1_the_update_of_a_student_equals_the_obvious_loop(name, results, reference, start):
    """Also trap 9 of the distillation page: denominators, with SGD."""
    assert error(np.load(results / f"{name}.npy") - start, reference - start) < 1e-5


@pytest.mark.timeout(600)
def test_a_cache_that_keeps_every_id_teaches_as_the_live_teacher_does(results, reference, start):
    """Up to the half-precision log-probabilities that are kept."""
    assert error(np.load(results / "cached-1x1x8.npy") - start, reference - start) < 2e-3


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", TWO_OTHERS, ids=lambda case: case["name"])
def test_law_1_adapters_hidden_states_and_own_answers_on_two_ranks(case, results, start):
    one, other = np.load(results / f"{case['of']}.npy"), np.load(results / f"{case['name']}.npy")
    assert one.shape == other.shape
    if one.shape == start.shape:
        assert error(other - start, one - start) < 1e-5
    else:
        assert error(other, one) < 1e-5


def fit(folder: Path, *, steps: int = 3, callbacks=(), **options: Any):
    """A short fit in this process; the objective and its trainer."""
    objective, data = kd.build(str(folder), **options)
    trainer = law.trainer_of(str(folder), "auto", 1, 1, max_epochs=-1, max_steps=steps, callbacks=list(callbacks))
    trainer.fit(objective, datamodule=data)
    return objective, trainer, data


def first_batch(folder: Path, **options: Any):
    _, data = kd.build(str(folder), **options)
    data.prepare()
    return next(iter(data.train_dataloader()))


def test_trap_rm_kd_10_the_teacher_is_frozen_in_eval_mode_and_in_no_checkpoint(folder, tmp_path):
    """Law 5. A teacher with dropout, so that training mode would show."""
    dropped = tmp_path / "kd"
    kd.make_folder(dropped)
    tokenizer = tiny.make_tokenizer()
    tiny.make_model(len(tokenizer), layers=2, hidden=48, seed=5, attention_dropout=0.5).save_pretrained(
        dropped / "teacher"
    )
    objective, trainer, _ = fit(dropped, val_fraction=0.2)
    teacher = objective.teacher_model()
    assert teacher is not None
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    objective.train()
    objective.policy.train()
    batch = first_batch(dropped)
    with torch.no_grad():
        a, b = (objective._taught_by.states(batch, torch.arange(4))[0] for _ in range(2))  # pyright: ignore
    assert torch.equal(a, b)
    assert not any(m.training for m in teacher.modules())
    mine = {id(p) for p in teacher.parameters()}
    assert not mine & {id(p) for p in objective.parameters()}
    assert not mine & {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert saved and not any("teacher" in key for key in saved)
    assert set(saved) == set(objective.state_dict())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_a_student_learns_and_a_teacher_equal_to_it_teaches_nothing(folder, tmp_path):
    losses = {"before": trainer_loss(*kd.build(str(folder), val_fraction=0.2), folder)}
    objective, _, trained_on = fit(folder, steps=60, val_fraction=0.2)
    assert objective.vocabulary == len(trained_on.renderer.tokenizer)
    _, data = kd.build(str(folder), val_fraction=0.2)
    losses["after"] = trainer_loss(objective, data, folder)
    assert losses["after"] < losses["before"] - 0.05

    same, data = kd.build(str(folder), val_fraction=0.2)
    from dataclasses import replace

    from ptl.models.spec import ModelSpec

    same.teacher = replace(same.teacher, model=ModelSpec(name=str(folder / "model")))
    assert trainer_loss(same, data, folder) < 1e-6


def trainer_loss(objective, data, folder) -> float:
    trainer = law.trainer_of(str(folder), "auto", 1, 1)
    (metrics,) = trainer.validate(objective, datamodule=data, verbose=False)
    return float(metrics["val/loss"])


def test_trap_rm_kd_8_the_gradient_is_where_the_next_token_is_trained(folder):
    """Perturbing the student at t changes the loss exactly where token t + 1 is trained."""
    from ptl.models.heads import causal_lm

    objective, _, _ = fit(folder, steps=1)
    batch = first_batch(folder)

    states = []
    norm = causal_lm(objective.policy).get_decoder().norm
    handle = norm.register_forward_hook(lambda module, args, out: (out.retain_grad(), states.append(out))[0])
    out = objective.loss(batch)
    handle.remove()
    out.total.backward()
    moved = states[0].grad[0].abs().sum(-1) > 0
    expected = torch.zeros_like(moved)
    expected[:-1] = (batch.loss_mask[0, 1:] > 0) & (batch.position_ids[0, 1:] > 0)
    assert torch.equal(moved, expected)


def test_trap_rm_kd_15_every_rank_takes_the_same_steps_on_policy():
    from ptl.data.on_policy import OnPolicy

    settings = OnPolicy(share=0.3, seed=3)
    taken = [settings.takes(step) for step in range(4000)]
    assert taken == [settings.takes(step) for step in range(4000)]
    assert 0.27 < sum(taken) / len(taken) < 0.33
    assert taken != [OnPolicy(share=0.3, seed=4).takes(step) for step in range(4000)]


def test_own_answers_follow_the_prompt_and_keep_the_weight_of_the_window(folder):
    """Law 2: what is trained is what was sampled; the prompt is token for token the data's."""
    objective, _, _ = fit(folder, steps=1, on_policy=1.0, micro=4)
    batch = first_batch(folder, micro=4)
    objective.train()
    fresh = objective.prepare(batch)
    assert float(fresh.window_weight) == float(batch.window_weight)
    assert float(fresh.loss_mask.sum()) == pytest.approx(float(batch.loss_mask.sum()), rel=1e-5)
    changed = 0
    for document in range(len(batch.sources)):
        old = batch.input_ids[0][batch.document_ids[0] == document]
        new = fresh.input_ids[0][fresh.document_ids[0] == document]
        mask = fresh.loss_mask[0][fresh.document_ids[0] == document]
        first = int(mask.nonzero()[0])
        assert torch.equal(old[:first], new[:first]) and bool((mask[first:] > 0).all())
        changed += not torch.equal(old, new)
    assert changed == len(batch.sources)
    again = objective.prepare(batch)
    assert torch.equal(again.input_ids, fresh.input_ids)


def test_law_9_the_student_is_exported_and_reads_back(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    from ptl.models.export import export

    objective, _, data = fit(folder, steps=2)
    out = export(objective.policy, data.renderer.tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(5, 25)[None]
    objective.policy.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, objective.policy(ids).logits, rtol=1e-5, atol=1e-6)


def test_users_mistakes_are_named(folder):
    from ptl.models.spec import LoRA, ModelSpec
    from ptl.models.teachers import Teacher
    from ptl.objectives.distillation import Distillation, HiddenMatch

    model = ModelSpec(name=str(folder / "teacher"))
    for make, message in (
        (lambda: Teacher(), "set teacher.model.name, or teacher.cache"),
        (lambda: Teacher(model=ModelSpec(name="x", adapter=LoRA())), "merge it with `ptl export`"),
        (lambda: Teacher(model=model, placement="sharded", device="cpu"), "needs teacher.placement replica"),
        (lambda: Teacher(model=model, device="gpu"), "expected cpu, cuda or cuda:N"),
        (lambda: Distillation(model, Teacher(model=model), ce=1.0), "model.ce must be at least 0 and below 1"),
        (lambda: Distillation(model, Teacher(model=model), source_weights={"a": -1.0}), "model.source_weights.a"),
        (lambda: Distillation(model, Teacher(cache="c"), hidden=HiddenMatch(layers=[1])), "needs a live teacher"),
        (lambda: HiddenMatch(layers=[]), "hidden.layers needs blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_trap_rm_kd_11_another_tokenizer_is_refused_before_training(tmp_path):
    kd.make_folder(tmp_path)
    other = tiny.make_tokenizer(special=("<|im_end|>", "<|im_start|>"))
    other.save_pretrained(tmp_path / "teacher")
    objective, data = kd.build(str(tmp_path))
    with pytest.raises(ValueError, match=r"id 0 is '<\|im_start\|>' for the student and '<\|im_end\|>'"):
        law.trainer_of(str(tmp_path), "auto", 1, 1).fit(objective, datamodule=data)


def test_a_sharded_teacher_needs_ranks(folder):
    objective, data = kd.build(str(folder), placement="sharded")
    with pytest.raises(ValueError, match="teacher.placement sharded needs several ranks"):
        law.trainer_of(str(folder), "auto", 1, 1).fit(objective, datamodule=data)


def other_tokenizer(folder: Path) -> Path:
    """The teacher's folder with another tokenizer, and a model of its size."""
    kd.make_folder(folder)
    other = tiny.make_tokenizer(special=("<pad>", "<|im_end|>", "<|im_start|>"))
    other.save_pretrained(folder / "teacher")
    tiny.make_model(len(other) + 8, layers=2, hidden=48, seed=5, initializer_range=0.3).save_pretrained(
        folder / "teacher"
    )
    return folder


@pytest.mark.parametrize("kind", ["uld", "hybrid"])
def test_a_teacher_of_another_tokenizer_teaches_when_asked(kind, tmp_path):
    folder = other_tokenizer(tmp_path)
    before = trainer_loss(*kd.build(str(folder), val_fraction=0.2, cross_tokenizer=kind), folder)
    objective, _, _ = fit(folder, steps=40, val_fraction=0.2, cross_tokenizer=kind)
    _, data = kd.build(str(folder), val_fraction=0.2)
    assert trainer_loss(objective, data, folder) < before
    one, other = (
        kd.trained(str(folder), "auto", 1, 8 // micro, micro, cross_tokenizer=kind, layout=layout)
        for micro, layout in ((8, "packed"), (2, "padded"))
    )
    objective, _ = kd.build(str(folder))
    objective.configure_model()
    begin = law.flat({k: v.detach() for k, v in objective.policy.state_dict(keep_vars=True).items()})
    assert error(other - begin, one - begin) < 1e-5  # law 1


def test_cross_tokenizer_refuses_what_speaks_in_the_students_tokens(folder):
    from ptl.models.spec import ModelSpec
    from ptl.models.teachers import Teacher
    from ptl.objectives.distillation import Distillation

    with pytest.raises(ValueError, match=r"neither model.teacher.cache nor model.hidden"):
        Distillation(ModelSpec(name=str(folder / "model")), Teacher(cache="c"), cross_tokenizer="uld")


def test_a_sample_of_the_teacher_is_refused_for_what_it_is_biased_for(folder):
    """The loss of another divergence would be finite and mean nothing."""
    cache = str(write_cache(folder, "drawn", "--mode", "sample", "--k", "16"))
    objective, data = kd.build(str(folder), cache=cache, kind="reverse_kl")
    with pytest.raises(ValueError, match=r"model.divergence.kind is reverse_kl.*set it to forward_kl"):
        law.trainer_of(str(folder), "auto", 1, 1).fit(objective, datamodule=data)
    fit(folder, steps=2, cache=cache)


def test_a_quantised_teacher_teaches_and_a_policy_needs_an_adapter(tmp_path):
    from dataclasses import replace

    from ptl.models.quantize import is_quantized
    from ptl.models.spec import ModelSpec
    from ptl.objectives.sft import SFT

    law.make_folder(tmp_path)
    tokenizer = tiny.make_tokenizer()
    teacher = tiny.make_model(len(tokenizer), hidden=128, seed=5, initializer_range=0.3)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    losses = {}
    for quantize in (None, "nf4", "int8"):
        objective, data = kd.build(str(tmp_path), val_fraction=0.2)
        spec = ModelSpec(name=str(tmp_path / "teacher"), quantize=quantize)  # pyright: ignore[reportArgumentType]
        objective.teacher = replace(objective.teacher, model=spec)
        losses[quantize] = trainer_loss(objective, data, tmp_path)
        assert is_quantized(objective.teacher_model()) == (quantize is not None)
    assert losses["nf4"] != losses[None] and losses["nf4"] == pytest.approx(losses[None], rel=0.2)
    assert losses["int8"] == pytest.approx(losses[None], rel=0.05)
    with pytest.raises(ValueError, match=r"model.policy.quantize nf4 without an adapter trains nothing"):
        SFT(ModelSpec(name="x", quantize="nf4"))


def test_law_6_a_resumed_distillation_ends_with_the_same_weights(folder, tmp_path):
    def run(steps: int, resume: Path | None = None):
        import lightning as L

        L.seed_everything(3, verbose=False)
        objective, data = kd.build(str(folder), on_policy=0.5, hidden=True)
        trainer = law.trainer_of(str(folder), "auto", 1, 1, max_epochs=-1, max_steps=steps)
        trainer.fit(objective, datamodule=data, ckpt_path=resume)
        return objective, trainer

    whole, _ = run(6)
    _, trainer = run(3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    again, _ = run(6, tmp_path / "three.ckpt")
    for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_source_that_is_not_there_is_named_also_beside_a_cache(folder):
    objective, data = kd.build(str(folder), cache=str(folder / "nowhere"))
    objective.source_weights = {"elsewhere": 2.0}
    with pytest.raises(ValueError, match="model.source_weights names 'elsewhere'; the sources are"):
        law.trainer_of(str(folder), "auto", 1, 1).fit(objective, datamodule=data)
