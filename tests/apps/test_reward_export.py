"""``ptl export`` of reward models: the head kept, the facts copied, codes that order answers as the floats did."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ptl.apps import export
from ptl.data.render import Renderer
from ptl.data.reward_facts import FILE, reward_facts
from ptl.data.reward_models import is_reward_model, load_reward_model
from ptl.models.export import export as write
from ptl.models.export import largest_logit_change
from ptl.models.names import resolve_model
from ptl.models.quantize import is_quantized, keep_codes_in_place, quantization_config
from ptl.models.quantized_export import export_quantized
from ptl.models.scoring import document_scores
from tests import reward_parts, tiny

ROWS = reward_parts.ranking_rows(8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a LoRA reward model: its merged export and its adapter, each with its facts."""
    root = tmp_path_factory.mktemp("reward-run")
    tokenizer = tiny.make_tokenizer()
    reward_parts.save_base(root / "base", tokenizer, hidden=128)
    objective = reward_parts.reward_policy(root / "base", **reward_parts.LORA)
    renderer = Renderer(tokenizer)
    files = {FILE: json.dumps(reward_facts(renderer, {"reward_mean": 0.5, "reward_std": 2.0}, "val"))}
    how = {"generation_eos": renderer.terminators, "files": files}
    write(objective.policy, tokenizer, root / "run" / "export", **how)
    write(objective.policy, tokenizer, root / "run" / "export_adapter", merged=False, spec=objective.spec, **how)
    reward_parts.write_jsonl(root / "rows.jsonl", ROWS)
    return root, objective, reward_parts.documents(reward_parts.examples(renderer, ROWS))


def test_a_reward_models_adapter_is_merged_with_its_head_and_facts(run, tmp_path, capsys):
    root, objective, documents = run
    assert export.main([str(root / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "largest score change against the live model" in capsys.readouterr().out
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.allclose(document_scores(plain, documents), document_scores(objective.policy, documents), atol=1e-5)
    facts = [(folder / FILE).read_text() for folder in (tmp_path / "out", root / "run" / "export")]
    assert facts[0] == facts[1] and json.loads(facts[0])["std"] == 2.0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["pad_token_id"] != 1
    assert is_reward_model(resolve_model(str(tmp_path / "out")))
    assert export.main([str(root / "run"), "--out", str(tmp_path / "alone"), "--adapter-only"]) == 0
    again = load_reward_model(resolve_model(str(tmp_path / "alone")))
    assert torch.allclose(document_scores(again, documents), document_scores(objective.policy, documents), atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trap_rm_kd_15_codes_leave_the_head_in_fp32_and_load_to_the_same_scores(kind, run, tmp_path, capsys):
    root, objective, documents = run
    out = tmp_path / kind
    words = [str(root / "run"), "--out", str(out), "--quantize", kind, "--rows", str(root / "rows.jsonl")]
    assert export.main(words) == 0
    told = capsys.readouterr().out
    stored = load_file(out / "model.safetensors")
    trained = dict(objective.policy.named_parameters())["base_model.model.score.modules_to_save.default.weight"]
    assert torch.equal(stored["score.weight"], trained) and stored["score.weight"].dtype == torch.float32
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == {"nf4": torch.uint8, "int8": torch.int8}[kind]
    config = json.loads((out / "config.json").read_text())
    assert "score" in config["quantization_config"]["llm_int8_skip_modules"]
    assert (out / FILE).read_text() == (root / "run" / "export" / FILE).read_text()

    plain = AutoModelForSequenceClassification.from_pretrained(out)
    assert is_quantized(plain) and plain.score.weight.dtype == torch.float32
    keep_codes_in_place(plain)
    own = load_reward_model(resolve_model(str(out)))
    scores, before = document_scores(own, documents), document_scores(objective.policy, documents)
    assert torch.allclose(document_scores(plain, documents), scores, atol=1e-5)
    assert 0 < (scores - before).abs().max() < 1.0

    found = json.loads((out / "reward_agreement.json").read_text())
    assert found["largest_change"] == pytest.approx(float((scores - before).abs().max()), abs=1e-4)
    assert found["mean_shift"] == pytest.approx(float((scores - before).mean()), abs=1e-4)
    assert found["prompts"] == len(ROWS) and found["kendall_tau_b"] > 0.5 and found["pair_agreement"] > 0.8
    assert {"accuracy_before", "accuracy_after", "new_ties"} <= set(found) and found["left_out"] == []
    assert f"Kendall tau-b {found['kendall_tau_b']:.4g}" in told and f"wrote {out}" in told


def test_the_adapter_is_merged_in_fp32_before_the_codes_are_made(run, tmp_path):
    """The same codes as of the merged fp32 model; merging into codes would have rounded the adapter away."""
    root, objective, _ = run
    export_quantized(objective.policy, tiny.make_tokenizer(), tmp_path / "out", "nf4")
    config = quantization_config("nf4", torch.float32)
    merged = AutoModelForSequenceClassification.from_pretrained(root / "run" / "export", quantization_config=config)
    expected, found = merged.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_trap_rm_kd_4_the_rest_in_bf16_leaves_the_head_in_fp32(run, tmp_path):
    root, _, documents = run
    words = [str(root / "run"), "--out", str(tmp_path / "out"), "--quantize", "nf4", "--dtype", "bf16"]
    assert export.main(words) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["score.weight"].dtype == torch.float32
    model = load_reward_model(resolve_model(str(tmp_path / "out")))
    assert torch.equal(model.score.weight, stored["score.weight"])
    assert document_scores(model, documents).dtype == torch.float32


def test_a_language_model_is_quantised_by_the_same_option(model_folder, tokenizer, tmp_path, capsys):
    base = tiny.save_folder(tmp_path / "base", tokenizer, hidden=128)
    assert export.main([str(base), "--out", str(tmp_path / "out"), "--quantize", "nf4"]) == 0
    assert "largest logit change" in capsys.readouterr().out
    again, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", base))
    assert is_quantized(again) and not is_quantized(before)
    keep_codes_in_place(again)
    assert 0 < largest_logit_change(again, before, [[5, 9, 20, 33]]) < 0.5
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_mistakes_are_told_before_anything_is_written(run, model_folder, tmp_path, capsys):
    root, _, _ = run
    rows, out = str(root / "rows.jsonl"), str(tmp_path / "out")
    bad = str(reward_parts.write_jsonl(tmp_path / "bad.jsonl", [{"text": "no ranking"}]))
    for words, told in (
        ((str(model_folder), "--rows", rows), "a language model is compared on conversations or texts"),
        ((str(root / "run"), "--adapter-only", "--quantize", "nf4"), "leave out --adapter-only, or --quantize"),
        ((str(root / "run" / "export"), "--adapter-only"), "has no adapter"),
        ((str(root / "run"), "--rows", bad), "no rankings"),
        ((str(root / "run"), "--rows", str(tmp_path / "none.jsonl")), "no such file"),
    ):
        assert export.main([*words, "--out", out]) == 2, words
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error
        assert not (tmp_path / "out").exists()
