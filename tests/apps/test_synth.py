"""``ptl synth``: what a person runs, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import yaml

from ptl import cli
from ptl.apps.data import data_module
from ptl.apps.synth import main
from ptl.data.fingerprints import open_cache
from ptl.models.spec import ModelSpec
from tests import tiny
from tests.synth import parts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = parts.make_folder(tmp_path_factory.mktemp("synth"))
    tiny.save_folder(folder / "student", tiny.make_tokenizer())
    tiny.save_folder(folder / "other", tiny.make_tokenizer(("<|a|>", "<|im_start|>", "<|im_end|>")))
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The working directory: links to the models and rows, and a recipe."""
    for name in ("teacher", "student", "other", "rows.jsonl"):
        (tmp_path / name).symlink_to(made / name)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def config(teacher="teacher", **more):
    return {
        "model": {
            "class_path": "ptl.objectives.distillation.Distillation",
            "init_args": {
                "policy": {"name": "student"},
                "teacher": {"model": {"name": teacher}, **more},
                "divergence": {"temperature": 2.0},
            },
        },
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": 256},
        "trainer": {"devices": 1},
    }


def opened(folder, cache="kd", temperature=2.0):
    module = data_module(["run.yaml"], [])
    return open_cache(
        cache,
        module.prepared_rows("train"),
        module.renderer,
        temperature=temperature,
        teacher=ModelSpec(name="teacher"),
    )


def test_teacher_writes_the_cache_that_the_run_opens(folder, capsys):
    assert cli.main(["synth", "teacher", "-c", "run.yaml", "--out", "kd", "--k", "16"]) == 0
    out = capsys.readouterr().out
    cache = opened(folder)
    assert cache.plan.k == 16 and cache.plan.mode == "topk" and cache.plan.vocab == len(tiny.make_tokenizer())
    assert f"{len(cache):,} tokens" in out and "bytes/token" in out and "KL lost" in out
    quality = json.loads((cache.folder / "quality.json").read_text())
    by_k = {row["k"]: row for row in quality["rows"] if "k" in row}
    assert by_k[16]["bytes"] == 16 * 4 + 8
    lost = [by_k[k]["kl"] for k in sorted(by_k)]
    assert lost == sorted(lost, reverse=True) and 0 < lost[-1] < lost[0] / 10
    assert (cache.folder / "quality.md").read_text() in out
    before = {path.name: path.read_bytes() for path in cache.folder.iterdir()}
    assert main(["teacher", "-c", "run.yaml", "--out", "kd", "--k", "16"]) == 0
    assert {path.name: path.read_bytes() for path in cache.folder.iterdir()} == before
    assert main(["teacher", "-c", "run.yaml", "--out", "kd", "--k", "8"]) == 2
    assert "k 16 against 8" in capsys.readouterr().err


def test_out_and_temperature_come_from_the_recipe_unless_given(folder, capsys):
    (folder / "more.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"teacher": {"cache": "from_recipe"}}}}))
    argv = ["teacher", "-c", "run.yaml", "-c", "more.yaml", "--mode", "sample", "--k", "12", "--temperature", "1"]
    assert main(argv) == 0
    cache = opened(folder, "from_recipe", 1.0)
    assert cache.plan.mode == "sample" and cache.plan.temperature == 1.0
    assert "12 draws" in capsys.readouterr().out


def test_validation_rows_of_their_own_are_a_part_of_the_cache(folder, capsys):
    (folder / "val.jsonl").write_text("\n".join((folder / "rows.jsonl").read_text().splitlines()[:5]))
    more = ["--data.val", "[{path: val.jsonl}]"]
    assert main(["teacher", "-c", "run.yaml", "--out", "kd", *more]) == 0
    module = data_module(["run.yaml"], more)
    for stage in ("train", "val"):
        rows = module.prepared_rows(stage)
        cache = open_cache("kd", rows, module.renderer, temperature=2.0)
        assert cache.manifest["rows"] == len(rows.rows)


def test_ranks_leave_each_other_their_shards(folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["teacher", "-c", "run.yaml", "--out", "kd"]) == 0
    assert "1 of 1 shards are left to other processes" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    assert main(["teacher", "-c", "run.yaml", "--out", "kd"]) == 0
    assert len(opened(folder)) > 0


def test_answers(folder, capsys):
    argv = ["teacher", "-c", "run.yaml", "--answers", "a.jsonl", "--max-new-tokens", "6", "--keep-unfinished"]
    assert main(argv) == 0
    assert "answers; left out:" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    assert rows and all(row["messages"][-1]["role"] == "assistant" for row in rows)


@pytest.mark.parametrize("keep", ["uniform", "first", "last", "ends", "importance"])
def test_student(folder, capsys, keep):
    from transformers import AutoModelForCausalLM

    tiny.save_folder(folder / "deep", tiny.make_tokenizer(), layers=5)
    data = ["--data", "rows.jsonl"] if keep == "importance" else []
    argv = ["student", "deep", "--layers", "3", "--keep", keep, *data, "--intermediate-size", "48", "--out", "small"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder / "small")
    assert model.config.num_hidden_layers == 3 and model.config.intermediate_size == 48
    expected = {"uniform": "[0, 2, 4]", "first": "[0, 1, 2]", "last": "[2, 3, 4]", "ends": "[0, 1, 4]"}
    assert expected.get(keep, "importance of layers: 0:") in out
    assert main(argv) == 2
    assert "small is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["teacher", "-c", "run.yaml"], "--out"),
        (["teacher", "-c", "nowhere.yaml", "--out", "kd"], "nowhere.yaml"),
        (["teacher", "-c", "run.yaml", "--out", "kd", "--k", "0"], "--k"),
        (["teacher", "-c", "run.yaml", "--out", "kd", "--mode", "sample", "--k", "70000"], "--k"),
        (["teacher", "-c", "run.yaml", "--out", "kd", "--temperature", "0"], "--temperature"),
        (["teacher", "-c", "run.yaml", "--out", "kd", "--batch-tokens", "0"], "--batch-tokens"),
        (["teacher", "-c", "run.yaml", "--out", "kd", "--seed", "-1"], "--seed"),
        (["teacher", "-c", "run.yaml", "--out", "kd", "--mode", "most"], "--mode"),
        (["teacher", "-c", "run.yaml", "--out", "kd", "--trainer.devices", "3"], "--trainer.devices"),
        (["teacher", "-c", "run.yaml", "--out", "kd", "--data.max_length", "8"], "max_length"),
        (["teacher", "-c", "sft.yaml", "--out", "kd"], "model.init_args.teacher.model"),
        (["teacher", "-c", "typo.yaml", "--out", "kd"], "dtpye"),
        (["teacher", "-c", "other.yaml", "--out", "kd"], "same tokenizer"),
        (["teacher", "-c", "gone.yaml", "--out", "kd"], "./gone"),
        (["teacher", "-c", "hot.yaml", "--out", "kd"], "divergence.temperature"),
        (["teacher", "-c", "run.yaml", "--answers", "a.txt"], ".jsonl"),
        (["teacher", "-c", "run.yaml", "--answers", "a.jsonl", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["teacher", "-c", "run.yaml", "--answers", "a.jsonl", "--temperature", "-1"], "--temperature"),
        (["student", "student", "--layers", "1", "--keep", "importance", "--out", "x"], "--data"),
        (["student", "student", "--layers", "9", "--out", "x"], "9"),
        (["student", "./gone", "--layers", "1", "--out", "x"], "./gone"),
        (["student", "student", "--out", "x"], "--layers"),
        (["student", "student", "--layers", "1", "--out", "x", "--deep"], "--deep"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_is_told_on_stderr_with_code_2(folder, capsys, argv, told):
    others = {
        "sft": {
            **config(),
            "model": {"class_path": "ptl.objectives.sft.SFT", "init_args": {"policy": {"name": "student"}}},
        },
        "other": config("other"),
        "gone": config("./gone"),
        "typo": config(),
        "hot": config(),
    }
    others["typo"]["model"]["init_args"]["teacher"]["model"]["dtpye"] = "fp32"
    others["hot"]["model"]["init_args"]["divergence"]["temperature"] = "hot"
    for name, content in others.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    assert main(argv) == 2
    err = capsys.readouterr().err
    mistake = [line for line in err.splitlines() if "error:" in line]
    assert len(mistake) == 1 and "Traceback" not in err
    assert told in err[err.index(mistake[0]) :]
    assert not (folder / "kd").exists() and not (folder / "x").exists()


@pytest.mark.parametrize("argv", [["--help"], ["teacher", "--help"], ["student", "--help"]])
def test_help_is_quick_and_does_not_load_torch(argv):
    code = f"import sys; from ptl.cli import main; main(['synth', *{argv!r}]); print('torch' in sys.modules)"
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert time.monotonic() - began < 1.0
    assert out.stdout.rstrip().endswith("False")
