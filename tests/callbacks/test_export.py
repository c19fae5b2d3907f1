"""Export: what is saved loads elsewhere to the same logits, from every strategy."""

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.export import Export
from ptl.callbacks.record import RunRecord
from ptl.callbacks.samples import evaluating
from ptl.models.spec import LoRA
from tests.callbacks.parts import trainer
from tests.callbacks.real import QUESTIONS, chat, make_inputs, sft
from tests.ranks import run_ranks

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def logits(module) -> torch.Tensor:
    policy = getattr(module, "policy", module)
    with evaluating(policy), torch.no_grad():
        return policy(input_ids=IDS).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def run(folder, inputs, callbacks, *, steps=6, lora=None, val=False, **options):
    model, data = inputs
    module = sft(model, lora=lora)
    trainer(folder, callbacks, max_steps=steps, **options).fit(module, chat(model, data, val=val))
    return module


def test_law_9_a_full_model_loads_to_the_same_logits(tmp_path, inputs, capsys):
    module = run(tmp_path, inputs, [RunRecord(tmp_path / "run"), Export()])
    folder = tmp_path / "run" / "export"
    assert torch.equal(logits(load(folder)), logits(module))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and load(folder).generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert not (tmp_path / "run" / "export_adapter").exists()
    assert f"exported to {folder}" in capsys.readouterr().out


def test_law_9_lora_is_merged_and_the_adapter_stands_beside_it(tmp_path, inputs):
    from peft import PeftModel

    module = run(tmp_path, inputs, [Export(console=False)], lora=LoRA(rank=4))
    merged = load(tmp_path / "export")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.allclose(logits(merged), logits(module), atol=1e-5)
    assert (logits(merged) - logits(load(inputs[0]))).abs().max() > 1e-2  # it did learn
    adapted = PeftModel.from_pretrained(load(inputs[0]), tmp_path / "export_adapter")
    assert torch.allclose(logits(adapted), logits(module), atol=1e-5)


def test_either_alone_and_another_dtype(tmp_path, inputs):
    run(tmp_path / "a", inputs, [Export(adapter=False, dtype="bf16", console=False)], lora=LoRA(rank=4), steps=1)
    assert load(tmp_path / "a" / "export").dtype == torch.bfloat16
    run(tmp_path / "b", inputs, [Export(merged=False, console=False)], lora=LoRA(rank=4), steps=1)
    assert sorted(p.name for p in (tmp_path / "b").iterdir() if p.name.startswith("export")) == ["export_adapter"]


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
def test_the_best_checkpoint_is_exported(tmp_path, inputs, lora):
    """The loss is made worse after step 2, by a jump of the weights, so that the best is not the last."""
    best = []

    class Spoil(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.global_step == 2:
                best.append(logits(pl_module))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                with torch.no_grad():
                    for parameter in pl_module.parameters():
                        if parameter.requires_grad:
                            parameter.add_(torch.randn_like(parameter))

    callbacks = [Checkpoint(monitor="val/loss"), Spoil(), Export(which="best", console=False)]
    module = run(tmp_path, inputs, callbacks, steps=4, lora=lora, val=True, val_check_interval=2)
    exported = logits(load(tmp_path / "export"))
    assert torch.allclose(exported, best[0], atol=1e-5)
    assert not torch.allclose(exported, logits(module), atol=1e-2)  # the module itself keeps its last weights


def test_best_without_a_checkpoint_to_watch_is_told_at_the_start(tmp_path, inputs):
    with pytest.raises(ValueError, match=r"Export\.which best needs a Checkpoint with monitor"):
        run(tmp_path, inputs, [Checkpoint(), Export(which="best")])


def test_a_former_export_is_replaced_and_other_files_are_not(tmp_path, inputs):
    run(tmp_path, inputs, [Export(console=False)], steps=1)
    first = logits(load(tmp_path / "export"))
    run(tmp_path, inputs, [Export(console=False)], steps=3)
    assert not torch.equal(logits(load(tmp_path / "export")), first)
    other = tmp_path / "other" / "export"
    other.mkdir(parents=True)
    (other / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no model"):
        run(tmp_path / "other", inputs, [Export()], steps=1)
    assert (other / "precious.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    model, data = make_inputs(folder)
    args = {"folder": str(folder / "run"), "model": str(model), "data": str(data)}
    return folder / "run", model, run_ranks("tests.callbacks.scenarios:zero3", 2, args, timeout=240)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_law_9_zero_3_exports_what_it_trained(zero3, kind):
    folder, _, results = zero3
    exported = logits(load(folder / kind / "export")).double()
    assert torch.allclose(exported.mean(), torch.tensor(results[0][kind]["mean"], dtype=torch.double), atol=1e-5)
    assert float(exported[0, -1].argmax()) == results[0][kind]["argmax"]
    if kind == "lora":
        assert (folder / kind / "export_adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_zero_3_answers_as_one_process_does(zero3, kind):
    from ptl.callbacks.jsonl import read_rows
    from ptl.callbacks.samples import greedy
    from ptl.data.render import Renderer
    from ptl.types import Message

    folder, model, _ = zero3
    rows = read_rows(folder / kind / "samples.jsonl")
    assert [row["step"] for row in rows] == [0] * 3 + [2] * 3 + [4] * 3
    renderer = Renderer(AutoTokenizer.from_pretrained(model))
    prompts = [renderer.prompt((Message(role="user", content=question),)) for question in QUESTIONS]
    for source, step in ((model, 0), (folder / kind / "export", 4)):
        ids = greedy(load(source), prompts, stop=renderer.terminators, max_new_tokens=6)
        text = [str(renderer.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in ids]
        assert text == [row["answer"] for row in rows if row["step"] == step]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_zero_3_trains_the_same_with_samples_and_logs_its_gradient_norm(zero3, kind):
    _, _, results = zero3
    assert results[0][kind]["losses"] == results[0][f"{kind}-silent"]["losses"]
    norms = results[0][kind]["norms"]
    assert len(norms) == 4 and all(norm > 0 for norm in norms)
    assert norms == pytest.approx(results[0][f"{kind}-alone"]["norms"], rel=1e-3)
    assert results[0][kind]["skipped"] == 0
    assert results[0][kind]["measured"] == 3 and results[0][kind]["tokens_seen"] > 0
    assert results[0][kind]["newest"] == "step=00000004.ckpt"


def test_zero_3_counts_its_shards_as_whole_parameters(zero3):
    _, model, results = zero3
    total = sum(p.numel() for p in load(model).parameters())
    assert results[0]["full"]["parameters"] == [total, total]
    assert results[0]["full"]["flops"] == pytest.approx(results[0]["full-alone"]["flops"], rel=1e-12)
    assert results[0]["lora"]["flops"] == pytest.approx(results[0]["lora-alone"]["flops"], rel=1e-12)
