"""``ptl export``: adapters merged onto the base they were trained on, and nothing written over."""

import json
import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ptl.apps import export
from ptl.apps.reply import ModelWriter, Reply
from ptl.apps.runs import load_model
from ptl.data.render import Renderer
from ptl.data.tokenizer import load_tokenizer
from ptl.models.export import export as write
from ptl.models.export import largest_logit_change
from ptl.models.names import Found, resolve_model
from ptl.models.quantize import is_quantized
from ptl.models.spec import LoRA, ModelSpec
from ptl.types import Message
from tests import tiny

DOCUMENTS = [[5, 9, 20, 33, 41, 7]]


@pytest.fixture(scope="module")
def qlora(tmp_path_factory, tokenizer):
    """A run folder of a QLoRA training: its adapter, its merged export, and the base that both stand on."""
    root = tmp_path_factory.mktemp("qlora")
    tiny.save_folder(root / "base", tokenizer, hidden=128)
    torch.manual_seed(1)
    spec = ModelSpec(name=str(root / "base"), quantize="nf4", adapter=LoRA(rank=4, init="gaussian"))
    model = spec.build()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    write(model, tokenizer, root / "run" / "export_adapter", merged=False, spec=spec)
    write(model, tokenizer, root / "run" / "export")
    return root


def change(text: str) -> float:
    found = re.search(r"largest logit change against the live model: (\S+)", text)
    assert found is not None
    return float(found.group(1))


def test_trap_sft_12_qlora_is_merged_onto_its_dequantised_base_and_says_what_it_cost(qlora, tmp_path, capsys):
    run = str(qlora / "run")
    assert export.main([run, "--out", str(tmp_path / "own"), "--dtype", "fp32"]) == 0
    own = change(capsys.readouterr().out)
    assert export.main([run, "--out", str(tmp_path / "original"), "--dtype", "fp32", "--base", "original"]) == 0
    original = change(capsys.readouterr().out)
    assert own < 1e-4 < 1e-2 < original
    live = load_model(resolve_model(run, adapter=True))
    assert is_quantized(live)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert not is_quantized(plain) and largest_logit_change(live, plain, DOCUMENTS) < 1e-4


def test_a_run_is_found_in_its_parts(qlora):
    run = qlora / "run"
    assert resolve_model(str(run)) == Found(str(run / "export"), False)
    assert resolve_model(str(run), adapter=True) == Found(str(run / "export_adapter"), True)
    assert resolve_model(str(run / "export_adapter")) == Found(str(run / "export_adapter"), True)
    assert resolve_model(str(qlora / "base")) == Found(str(qlora / "base"), False)
    assert resolve_model("someone/some-model") == Found("someone/some-model", False)


def test_the_adapter_alone_loads_with_peft(tokenizer, tmp_path, model_folder, capsys):
    torch.manual_seed(0)
    spec = ModelSpec(name=str(model_folder), adapter=LoRA(rank=4, init="pissa"))
    model = spec.build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    write(model, tokenizer, tmp_path / "adapter", merged=False, spec=spec)
    assert export.main([str(tmp_path / "adapter"), "--out", str(tmp_path / "again"), "--adapter-only"]) == 0
    assert change(capsys.readouterr().out) == 0.0
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "again")
    assert largest_logit_change(model, loaded, DOCUMENTS) < 1e-5


def test_a_full_model_changes_its_dtype(model_folder, tmp_path, capsys):
    assert export.main([str(model_folder), "--out", str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16" in out and 0 < change(out) < 0.1
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").parameters()} == {torch.bfloat16}


def test_nothing_is_written_over_unless_asked(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert export.main([str(model_folder), "--out", str(out)]) == 0
    assert export.main([str(model_folder), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert export.main([str(model_folder), "--out", str(out), "--overwrite", "--dtype", "bf16"]) == 0
    assert export.main([str(model_folder), "--out", str(model_folder), "--overwrite"]) == 2
    assert "is the model that is read" in capsys.readouterr().err
    (out / "config.json").unlink()
    assert export.main([str(model_folder), "--out", str(out), "--overwrite"]) == 2
    assert "holds no model" in capsys.readouterr().err
    assert export.main([str(model_folder), "--out", str(tmp_path / "a"), "--adapter-only"]) == 2
    assert "has no adapter" in capsys.readouterr().err


def test_a_models_foreign_code_is_never_run(model_folder, tmp_path, capsys):
    import json
    import shutil

    folder = tmp_path / "code"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}))
    (folder / "modeling.py").write_text("raise SystemExit('ran')\n")
    assert export.main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "its own Python code" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["--dtype", "bf16"], ["--quantize", "int8"]])
def test_what_a_format_costs_is_told_and_kept(how, qlora, tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows * 3)))
    words = [
        str(qlora / "run" / "export"),
        "--out",
        str(tmp_path / "out"),
        "--rows",
        str(tmp_path / "rows.jsonl"),
        *how,
    ]
    assert export.main(words) == 0
    found = json.loads((tmp_path / "out" / "format_report.json").read_text())
    assert found["tokens"] > 10 and 0 < found["kl"] < 0.5 and found["greedy_agreement"] > 0.5
    assert found["bytes_after"] < found["bytes_before"] and "KL" in capsys.readouterr().out


def test_questions_are_answered_by_both_models(qlora, tmp_path, capsys):
    """The original's own answer counts as right, so that it is right before, and the same after a change of nothing."""
    source = str(qlora / "run" / "export")
    questions = ["What is 2+2?", "Où est Shanghai ?"]
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": questions[0], "answers": ["no such words"]}))
    words = ["--questions", str(tmp_path / "q.jsonl")]
    assert export.main([source, "--out", str(tmp_path / "one"), *words]) == 0
    found = json.loads((tmp_path / "one" / "format_report.json").read_text())
    assert found["questions"] == 1 and found["accuracy_before"] == found["accuracy_after"] == 0.0
    model, renderer = load_model(resolve_model(source)), Renderer(load_tokenizer(source))
    said = [
        "".join(
            Reply(
                ModelWriter(model), renderer, [Message(role="user", content=text)], temperature=0.0, max_new_tokens=64
            )
        )
        for text in questions
    ]
    rows = [{"question": text, "answers": [answer or "?"]} for text, answer in zip(questions, said)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert export.main([source, "--out", str(tmp_path / "two"), *words]) == 0
    found = json.loads((tmp_path / "two" / "format_report.json").read_text())
    assert found["accuracy_before"] == sum(map(bool, said)) / 2 and found["same_verdict"] == 1.0
    assert "of 2 questions" in capsys.readouterr().out


def test_questions_without_answers_are_refused(model_folder, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "What is 2+2?"}))
    assert (
        export.main([str(model_folder), "--out", str(tmp_path / "out"), "--questions", str(tmp_path / "q.jsonl")]) == 2
    )
    said = capsys.readouterr().err
    assert "has no question with accepted answers" in said and "q.jsonl:1" in said and not (tmp_path / "out").exists()
