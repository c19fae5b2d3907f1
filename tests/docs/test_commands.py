"""Every command in the pages is one that its program takes: sub-commands, options and keys of the configuration exist.

The tutorials' commands and those of docs/objective.md run for real, in test_tutorial.py and test_objective.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ptl import cli
from tests.cli.test_configs import CONFIGS, parse
from tests.ranks import ROOT

# The log says what was run on a day, with the options of that day; the status also names what is missing.
PROJECT = ("LOG.md", "STATUS.md")
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name not in PROJECT)]
KNOWN = re.compile(r"(?:[A-Z_]+=\S+ )*(ptl|make|sbatch|slurm/\S+|python -m benchmarks\S*)(?: |$)")
PLACEHOLDERS = {"run.yaml": "configs/recipes/lora.yaml"}
"""A file that a page means the reader to have."""


class Parsed(BaseException):
    """The command line was understood; what comes next is work."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A command that should be read alone, and runs, writes nothing here."""
    monkeypatch.chdir(tmp_path)


def block_commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    shell = [text for language, text in blocks if language in ("", "sh")]
    lines = [line for text in shell for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if KNOWN.match(line) and not re.match(r"ptl/", line)]


def named_commands(page: Path) -> list[str]:
    """Commands in a sentence, which may leave out what is required."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", prose)
    return [" ".join(span.split()) for span in spans if KNOWN.match(" ".join(span.split()))]


def all_of(found) -> list[str]:
    return sorted({command for page in PAGES for command in found(page)})


def words_of(command: str) -> list[str]:
    words = shlex.split(command.replace("-c ...", "-c run.yaml"), comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    return [PLACEHOLDERS.get(word, word) for word in words if word != "..."]


BLOCKS, NAMED = all_of(block_commands), all_of(named_commands)


def of(program: str, commands: list[str]) -> list[list[str]]:
    return [words for words in map(words_of, commands) if words and words[0].startswith(program)]


def test_commands_are_found():
    assert len(BLOCKS) > 60 and len(NAMED) > 40
    assert {"ptl fit", "ptl plan", "ptl synth"} <= {" ".join(words[:2]) for words in of("ptl", BLOCKS)}
    # Behind a block of another language, as in docs/slurm.md.
    assert {"slurm/pipeline.sh", "slurm/sweep.sbatch", "slurm/rollout.sbatch"} <= {words[0] for words in JOBS}


@pytest.mark.parametrize("command", sorted({*BLOCKS, *NAMED}))
def test_files_of_the_project_are_there(command):
    for word in words_of(command):
        if re.match(r"(configs|slurm|benchmarks|tests)/", word):
            assert list(ROOT.glob(word)), word


# ---- ptl ----


def understood(run, words: list[str], monkeypatch) -> str:
    """What the program says against the words; nothing where it takes them."""
    whole, known, said = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args, io.StringIO()
    inside = []

    def parse_args(self, args=None, namespace=None):
        inside.append(self)
        whole(self, args, namespace)
        raise Parsed

    def parse_known_args(self, args=None, namespace=None):
        outermost = not inside and self.add_help  # a parser without help only looks ahead
        inside.append(self)
        parsed, rest = known(self, args, namespace)
        inside.pop()
        if outermost:
            if rest and not rest[0].startswith("--data."):  # which the command hands on as keys of the configuration
                self.error(f"unrecognized arguments: {rest}")
            raise Parsed
        return parsed, rest

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with contextlib.redirect_stderr(said):
        try:
            code = run()
        except Parsed:
            return ""
        except SystemExit as stop:
            code = stop.code
    return said.getvalue() if code else ""


def stages(words: list[str]) -> list[list[str]]:
    """The words of each stage of a pipeline, with a folder for the model of an earlier one."""
    given = [word.partition("=")[2] for word in words[1:] if re.match(r"\w+(@\d+)?=", word)]
    return [shlex.split(re.sub(r"\{\w+\}", "runs/stage", stage)) for stage in given]


STAGES = [stage for words in of("slurm/pipeline.sh", BLOCKS) for stage in stages(words)]
LIGHT = [words[1:] for words in [*of("ptl", BLOCKS), *STAGES] if words[0] == "ptl" and words[1] in cli.LIGHT]
NAMED_LIGHT = [words[1:] for words in of("ptl", NAMED) if words[1:2] and words[1] in cli.LIGHT]


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_a_light_command_is_taken(words, monkeypatch):
    assert understood(lambda: cli.main(words), words, monkeypatch) == ""


@pytest.mark.parametrize("words", NAMED_LIGHT, ids=" ".join)
def test_a_command_in_a_sentence_has_options_that_exist(words, monkeypatch):
    said = understood(lambda: cli.main(words), words, monkeypatch)
    assert said == "" or re.search("(are|is) required|expected .* argument", said), said


def test_a_wrong_option_and_a_wrong_command_are_told(monkeypatch):
    for words in (
        ["plan", "--modle", "x"],
        ["synth", "idkk", "x"],
        ["tokens", "add", "MODEL", "--out", "x", "--st", "y"],
    ):
        assert "error" in understood(lambda words=words: cli.main(words), words, monkeypatch), words


def test_every_ptl_command_is_of_a_kind_that_is_tested():
    for words in of("ptl", [*BLOCKS, *NAMED]):
        assert len(words) == 1 or words[1] in {*cli.LIGHT, *cli.TRAINING} or words[1].startswith("-"), words


# ---- configurations ----


def fit_arguments() -> list[tuple[str, ...]]:
    """The arguments of ``ptl fit`` in all commands, those of jobs included."""
    found = {tuple(stage) for stage in STAGES if stage[0] != "ptl"}
    for command in [*BLOCKS, *NAMED]:
        words = words_of(command)
        if "focal.yaml" in words:  # docs/objective.md, which runs
            continue
        while words and "=" in words[0] and not words[0].startswith("slurm/"):
            words = words[1:]
        if words[:2] == ["ptl", "fit"]:
            found.add(tuple(words[2:]))
        elif words and re.match("slurm/|sbatch", words[0]) and "-c" in words:
            found.add(tuple(words[words.index("-c") :]))
    return sorted(arguments for arguments in found if arguments)


@pytest.mark.parametrize("arguments", fit_arguments(), ids=" ".join)
def test_the_arguments_of_fit_are_keys_that_exist(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = io.StringIO()
    arguments = [word for word in arguments if word != "--print_config"]
    layers = [] if "-c" in arguments else [CONFIGS / "recipes/lora.yaml", CONFIGS / "overlay/wandb.yaml"]
    with contextlib.redirect_stderr(config):
        assert parse(*layers, more=arguments).model.class_path


def test_an_unknown_key_is_told():
    with pytest.raises(SystemExit):
        parse(CONFIGS / "recipes/lora.yaml", more=["--model.optimiser.lr", "1"])


# ---- jobs, benchmarks, targets ----

JOBS = [words for words in of("slurm/", BLOCKS) if words[0] != "slurm/job.sh"]


@pytest.mark.parametrize("words", JOBS, ids=" ".join)
def test_a_job_can_be_submitted(words, tmp_path):
    for folder in ("configs", "slurm"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "rates.txt").write_text("--model.optimizer.lr 1e-4\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PTL"))}
    env |= {"PTL_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, "--dry-run"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and "sbatch --parsable" in done.stdout, (done.stdout, done.stderr)


BENCHMARKS = of("python", BLOCKS)


@pytest.mark.parametrize("words", BENCHMARKS, ids=" ".join)
def test_a_benchmark_takes_its_options(words, monkeypatch):
    name = words[2]
    package = importlib.util.find_spec(name).submodule_search_locations is not None
    module = importlib.import_module(f"{name}.__main__" if package else name)
    assert understood(module.main, words[3:], monkeypatch) == ""


@pytest.mark.parametrize("words", of("python", NAMED), ids=" ".join)
def test_a_benchmark_in_a_sentence_is_there(words):
    assert importlib.util.find_spec(words[2]) is not None


@pytest.mark.parametrize("words", of("make", [*BLOCKS, *NAMED]), ids=" ".join)
def test_a_target_is_there(words):
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words[1]
