"""``ptl plan``: options, layers, the choice, mistakes in one line, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ptl.apps.plan import main

HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False, "vocab_size": 128256}
LLAMA_8B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, **HEADS}
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LLAMA_70B["num_attention_heads"] = 64
ONE_B = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}


@pytest.fixture
def models(tmp_path):
    for name, config in (("8b", LLAMA_8B), ("70b", LLAMA_70B), ("1b", ONE_B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def planned(capsys, *words: str, code: int = 0) -> dict:
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_choice_follows_the_size(models, capsys):
    small = planned(capsys, "--model", str(models / "1b"), "--gpus", "8", "--accumulate", "4")
    assert small["choice"]["strategy"] == "ddp"
    assert "configs/trainer/ddp.yaml" in small["layers"]
    middle = planned(capsys, "--model", str(models / "8b"), "--gpus", "8")
    assert middle["choice"]["strategy"] in ("zero1", "zero2")
    large = planned(capsys, "--model", str(models / "70b"), "--gpus", "8", "--nodes", "4")
    assert large["choice"]["strategy"] == "zero3" and large["choice"]["checkpointing"]
    assert "configs/trainer/zero3.yaml" in large["layers"] and "--trainer.num_nodes" in large["layers"]
    tight = planned(capsys, "--model", str(models / "8b"), "--gpu", "a100-40gb", "--gpus", "1")
    assert tight["choice"]["strategy"] == "zero2-offload" and "of which a node needs" in tight["reason"]
    none = planned(capsys, "--model", str(models / "70b"), "--gpu", "l4", "--host-memory", "64", code=1)
    assert none["choice"] is None and "nothing fits" in none["reason"]


def test_parts_sum_up_and_rates_are_told(models, capsys):
    found = planned(capsys, "--model", str(models / "8b"), "--gpus", "8", "--adapter", "lora:32", "--scale-to", "6")
    for option in found["strategies"]:
        assert sum(option["device_bytes"].values()) == pytest.approx(option["device_total"])
    assert found["trained"] == 2 * 41_943_040  # twice rank 16, which peft prints for this model
    assert found["rates"]["peak"] == 989.4e12 and found["rates"]["matmul"] == pytest.approx(0.68)
    assert [row["nodes"] for row in found["scaling"]] == [1, 2, 4, 6]


def test_layers_give_the_defaults_and_options_win(models, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model:\n  class_path: ptl.objectives.distillation.Distillation\n  init_args:\n"
        f"    policy: {{name: {models / '1b'}, gradient_checkpointing: true, adapter: {{rank: 8}}}}\n"
        f"    teacher: {{model: {{name: {models / '8b'}}}, placement: sharded}}\n"
        "data: {pack_to: 2048, micro_batch_size: 2}\n"
        "trainer: {devices: 4, accumulate_grad_batches: 3, precision: 32-true}\n"
    )
    more = tmp_path / "more.yaml"
    more.write_text("trainer: {devices: 2}\n")
    job = planned(capsys, "-c", str(recipe), "-c", str(more), "--micro-batch", "1")["job"]
    assert (job["world"], job["sequence"], job["micro_batch"], job["accumulate"]) == (2, 2048, 1, 3)
    assert (job["objective"], job["rank"], job["precision"], job["teacher_sharded"]) == (
        "distillation",
        8,
        "fp32",
        True,
    )
    found = planned(capsys, "-c", str(recipe))
    assert {option["checkpointing"] for option in found["strategies"]} == {True}
    assert all("frozen models" in option["device_bytes"] for option in found["strategies"])


def test_every_recipe_of_the_repository_is_read(models, capsys):
    for recipe in sorted(Path("configs/recipes").glob("*.yaml")):
        # Recipes name hub models; their sizes come from a folder here.
        model = str(models / "1b")
        assert main(["-c", str(recipe), "--model", model, "--teacher", model, "--gpus", "8", "--json"]) in (0, 1), (
            recipe
        )
        assert json.loads(capsys.readouterr().out)["strategies"]


def test_rates_are_replaced_from_a_file(models, tmp_path, capsys):
    words = ["--model", str(models / "8b"), "--gpus", "8"]
    file = tmp_path / "rates.yaml"
    file.write_text("matmul: 0.34\n")
    before, after = planned(capsys, *words), planned(capsys, *words, "--rates", str(file))
    assert after["strategies"][0]["time"]["products"] == pytest.approx(2 * before["strategies"][0]["time"]["products"])


def test_the_table_says_what_to_add(models, capsys):
    assert main(["--model", str(models / "8b"), "--gpus", "8", "--scale-to", "4"]) == 0
    out = capsys.readouterr().out
    for told in (
        "8.03B parameters",
        "zero3-offload",
        "max rows",
        "matmul 0.68",
        "ptl fit -c YOUR_RECIPE.yaml -c configs/",
    ):
        assert told in out
    assert "…" not in out  # no cell is cut off


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "got no model"),
        (["--model", "/nowhere/model"], "got a path that is not there"),
        (["--model", "8b", "--adapter", "lora:x"], "expected full, lora:RANK or qlora:RANK"),
        (["--model", "8b", "--gpu", "h1000"], "got device 'h1000'"),
        (["--model", "8b", "--precision", "fp7"], "got precision 'fp7'"),
        (["--model", "8b", "-c", "missing.yaml"], "got -c missing.yaml"),
        (["--model", "empty"], "without config.json"),
        (["--model", "8b", "--rates", "bad.yaml"], "got the rate 'speed'"),
    ],
)
def test_mistakes_are_one_line(words, told, models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    (models / "empty").mkdir()
    (models / "bad.yaml").write_text("speed: 3\n")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("ptl plan: error: ") and told in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [["--gpus", "0"], ["--margin", "1.5"], ["--memory", "-3"], ["--sequence", "long"]])
def test_numbers_out_of_range_are_refused(words, capsys):
    assert main(["--model", "x", *words]) == 2
    assert "expected" in capsys.readouterr().err


def test_no_torch_is_imported(models):
    code = (
        "import sys; from ptl.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'lightning', 'transformers', 'wandb', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    words = ["plan", "--model", str(models / "8b"), "--gpus", "8"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_model_from_scratch_is_planned_from_its_recipe_and_its_tokenizer(tmp_path, capsys):
    state = {"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 99, "content": "<x>"}]}
    recipe = str(Path(__file__).parents[2] / "configs" / "recipes" / "pretrain.yaml")
    sizes = []
    for last in (99, 128):
        state["added_tokens"][0]["id"] = last
        (tmp_path / "tokenizer.json").write_text(json.dumps(state))
        assert main(["-c", recipe, "--model", str(tmp_path), "--gpus", "1", "--json"]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["parameters"])
    assert sizes[1] - sizes[0] == 64 * 384  # a multiple of 64 rows more
