"""Every YAML of the repository parses, layers keep to their key, and every recipe trains a tiny model."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.objectives import law, ranking, rl
from tests.ranks import run_ranks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
LAYERS = {"objective": "model", "model": "model", "overlay": None, "data": "data", "trainer": "trainer"}
OBJECTIVES, TRAINERS = (sorted((CONFIGS / kind).glob("*.yaml")) for kind in ("objective", "trainer"))
STACKS = [
    pair for shift in range(2) for pair in zip(OBJECTIVES, itertools.islice(itertools.cycle(TRAINERS), shift, None))
]
"""Every objective with two trainers, and every trainer: a layer sets only its own key, so that no pair is special."""
TRAINED = [path for path in RECIPES if not path.stem.startswith("story_")]
"""Those of ``make story`` are trained where it is tested."""


LAYER_FILES = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in ("cluster", "sweep"))
"""The profiles of clusters are for the scripts in ``slurm/`` and sweeps for ``wandb sweep``, no layers."""


@pytest.mark.parametrize("path", LAYER_FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_layer_sets_only_its_own_key(path):
    keys = set(yaml.safe_load(path.read_text()))
    if path.parent.name == "recipes":
        assert {"seed_everything", "model", "data", "trainer"} <= keys
    else:
        own = LAYERS[path.parent.name]
        assert keys == {own} if own else len(keys) == 1


@cache
def parser():
    """The command line of ``ptl fit`` without what comes after parsing; it takes as long to build as to use."""
    from ptl.trainer_cli import PTLCLI

    class ParseOnly(PTLCLI):
        def instantiate_classes(self) -> None:
            pass

        def after_instantiate_classes(self) -> None:
            pass

    return ParseOnly(["-c", str(CONFIGS / "recipes/lora.yaml")], run=False)


def parse(*paths: Path, more: Sequence[str] = ()):
    command = parser()
    command.parse_arguments(command.parser, [*(word for path in paths for word in ("-c", str(path))), *more])
    return command.config


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_parses(path):
    config = parse(path)
    written = yaml.safe_load(path.read_text())["model"]["init_args"]
    assert config.model.init_args.policy.name == written["policy"]["name"]


@pytest.mark.parametrize(("objective", "trainer"), STACKS, ids=lambda p: p.stem)
def test_every_stack_of_layers_parses(objective, trainer):
    layers = (CONFIGS / "base.yaml", objective, CONFIGS / "model/qwen2.5-1.5b.yaml", CONFIGS / "data/chat.yaml")
    if objective.stem == "qlora":
        layers = (*layers, CONFIGS / "overlay/qlora.yaml")
    config = parse(*layers, trainer)
    assert config.model.init_args.policy.name == "Qwen/Qwen2.5-1.5B-Instruct" and config.trainer.max_epochs == 1


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweep").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_sweep_is_a_command_that_parses_with_each_of_its_parameters(path):
    sweep = yaml.safe_load(path.read_text())
    words = sweep["command"]
    assert words[:2] == ["ptl", "fit"] and words[-1] == "${args}"
    layers = [CONFIGS.parent / after for word, after in itertools.pairwise(words) if word == "-c"]
    plain = words[2 + 2 * len(layers) : -1]
    tried = [f"--{key}={given.get('values', [given.get('min')])[0]}" for key, given in sweep["parameters"].items()]
    config = parse(*layers, more=[*plain, *tried])
    assert "WandbRun" in config.trainer.logger.class_path and tried
    for word in tried:
        key, _, value = word.removeprefix("--").partition("=")
        assert str(parsed(config, key)) == value


def test_the_sweep_of_the_docs_is_the_example():
    text = (CONFIGS.parent / "docs/wandb.md").read_text()
    [shown] = re.findall(r"```yaml\n(method:.*?)```", text, re.DOTALL)
    assert yaml.safe_load(shown) == yaml.safe_load((CONFIGS / "sweep/example.yaml").read_text())


def parsed(config, key: str):
    """A value as the command line names it: ``init_args`` is left out."""
    for part in key.split("."):
        config = config.init_args if "init_args" in config else config
        config = config[part]
    return config


def save_scored(folder: Path) -> None:
    """A reward model of the tiny model's vocabulary."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    scored = AutoModelForSequenceClassification.from_pretrained(folder.parent / "model", num_labels=1)
    scored.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    # 128 columns: what 4-bit weights need on the CPU.
    tiny.save_folder(folder / "model", tiny.make_tokenizer(), hidden=128)
    tiny.make_tokenizer().save_pretrained(folder / "tokenizer")  # what pre-training starts from
    rows = law.write_rows(folder / "rows.jsonl", count=40)
    text = (json.dumps({"text": " ".join(m["content"] for m in row["messages"])}) + "\n" for row in rows)
    (folder / "text.jsonl").write_text("".join(text))
    ranking.write_rows(folder / "rankings.jsonl", count=40)
    prompts = [{**row, "tests": ["assert f(1) == 2"]} for row in rl.write_rows(folder / "prompts.jsonl", count=16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    save_scored(folder / "scored")
    names = [str(path) for path in TRAINED]
    result = run_ranks("tests.cli.recipes:run", 1, {"folder": str(folder), "recipes": names}, timeout=560)[0]
    return folder, result


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", [path.stem for path in TRAINED])
def test_every_recipe_runs_two_steps_and_exports_a_plain_folder(name, ran):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder, result = ran
    assert result[name]["code"] == 0
    run = folder / "runs" / name
    auto = AutoModelForSequenceClassification if name.startswith("reward") else AutoModelForCausalLM
    auto.from_pretrained(run / "export")
    for file in ("config.yaml", "command.txt", "versions.json", "audit.json", "metrics.jsonl", "summary.json"):
        assert (run / file).stat().st_size > 0, file
    assert list((run / "checkpoints").iterdir())
