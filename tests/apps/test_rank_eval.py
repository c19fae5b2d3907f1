"""``ptl rank eval``: RewardBench's formats from small files, one model and several, and what is refused."""

import argparse
import json

import numpy as np
import pytest
import torch

from ptl.apps.ranking import evaluate
from ptl.data.render import Renderer, RenderPolicy
from ptl.data.reward_facts import FILE, reward_facts
from ptl.models.export import export
from ptl.models.scoring import document_scores
from ptl.types import Message
from tests import reward_parts, tiny
from tests.objectives.law import WORDS

BENCH = [
    {"prompt": WORDS[i % 9], "chosen": f"{WORDS[i % 12]} fox", "rejected": f"{WORDS[(5 * i + 1) % 12]} dog lazy",
     "subset": ["alpacaeval-easy", "math-prm", "math-prm"][i % 3], "id": i, "chosen_model": "x", "rejected_model": "y"}
    for i in range(9)
]  # fmt: skip
BENCH_2 = [
    {"id": str(i), "prompt": WORDS[i % 9], "chosen": [f"{WORDS[i]} fox"], "subset": "Focus", "num_correct": 1,
     "rejected": [f"{WORDS[(i + k) % 12]} dog" for k in (1, 2, 3)], "num_incorrect": 3, "total_completions": 4}
    for i in range(6)
]  # fmt: skip


def facts_text(renderer, mean=0.0, std=1.0) -> str:
    facts = reward_facts(renderer, {"reward_mean": mean, "reward_std": std, "answers": 9, "accuracy": 1.0}, "val")
    return json.dumps(facts)


def save_model(folder, base, seed, facts=None):
    """A run folder with an export, and its objective."""
    objective = reward_parts.reward_policy(base, seed=seed)
    tokenizer = tiny.make_tokenizer()
    renderer = Renderer(tokenizer)
    files = {} if facts is None else {FILE: facts_text(renderer, *facts)}
    export(objective.policy, tokenizer, folder / "export", generation_eos=renderer.terminators, files=files)
    return objective


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("rank-eval")
    base = reward_parts.save_base(root / "base")
    save_model(root / "one", base, 1, (0.25, 2.0))
    save_model(root / "two", base, 2)
    save_model(root / "three", base, 3, (0.0, 0.5))
    return root


def run(*words) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    evaluate.add_eval(parser.add_subparsers())
    return evaluate.evaluate(parser.parse_args(["eval", *map(str, words)]))


def scores_by_hand(objective_folder, rows) -> list[list[float]]:
    """Each answer rendered and scored alone, with none of the code under test but the score of a document."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(objective_folder)
    model = AutoModelForSequenceClassification.from_pretrained(objective_folder)
    out = []
    for row in rows:
        sides = [[row[key]] if isinstance(row[key], str) else row[key] for key in ("chosen", "rejected")]
        texts = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
            for answer in [*sides[0], *sides[1]]
        ]
        ids = [tokenizer.apply_chat_template(text, tokenize=True, return_dict=False) for text in texts]
        out.append(document_scores(model, ids).tolist())
    return out


# ---- one model ----


def test_rewardbench_rows_give_accuracy_by_subset_and_both_averages(models, tmp_path, capsys):
    file = reward_parts.write_jsonl(tmp_path / "bench.jsonl", BENCH)
    assert run(file, "--model", models / "one", "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    by_hand = scores_by_hand(models / "one" / "export", BENCH)
    right = np.array([float(a > b) for a, b in by_hand])
    assert 0 < right.mean() < 1
    (entry,) = report["models"]
    assert entry["overall"]["pairs"] == 9 and entry["overall"]["accuracy"] == pytest.approx(right.mean())
    assert entry["overall"]["margin"] == pytest.approx(np.mean([a - b for a, b in by_hand]), abs=1e-5)
    assert entry["overall"]["reward_std"] == pytest.approx(np.std(by_hand), abs=1e-5)
    easy, maths = right[::3].mean(), np.delete(right, range(0, 9, 3)).mean()
    assert entry["subsets"]["alpacaeval-easy"]["accuracy"] == pytest.approx(easy)
    assert entry["subsets"]["math-prm"]["accuracy"] == pytest.approx(maths) and maths != easy
    assert entry["subset_average"]["accuracy"] == pytest.approx((easy + maths) / 2) != right.mean()
    out = capsys.readouterr().out
    assert "average of subsets" in out and "| one | 9 |" in out
    page = (tmp_path / "out" / "report.md").read_text()
    assert page in out and "## Accuracy by length" in page
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert report["ensemble"] is None


def test_rewardbench_2_rows_give_the_best_of_four(models, tmp_path):
    file = reward_parts.write_jsonl(tmp_path / "bench2.jsonl", BENCH_2)
    report = evaluate.evaluation(str(file), [str(models / "one" / "export")])
    by_hand = scores_by_hand(models / "one" / "export", BENCH_2)
    overall = report["models"][0]["overall"]
    assert overall["best_of_k"] == pytest.approx(np.mean([row[0] == max(row) for row in by_hand]))
    assert 0 < overall["best_of_k"] < 1 and overall["best_of_k_prompts"] == 6 and overall["pairs"] == 18
    assert overall["accuracy"] == pytest.approx(np.mean([row[0] > other for row in by_hand for other in row[1:]]))


def test_law_8_rows_that_cannot_be_scored_are_named(models, tmp_path, capsys):
    rows = [*BENCH, {**BENCH[0], "rejected": "fox " * 900}, {**BENCH[0], "chosen": None}]
    file = reward_parts.write_jsonl(tmp_path / "bench.jsonl", rows)
    report = evaluate.evaluation(str(file), [str(models / "one"), str(models / "two")])
    assert report["rows"]["read"] == 11 and report["rows"]["scored"] == 9
    told = {(entry["reason"], entry["model"]): entry for entry in report["rows"]["left_out"]}
    assert told[("too_long", "one")]["rows"] == told[("too_long", "two")]["rows"] == 1
    assert told[("null_content", None)]["examples"][0].startswith(f"{file}:11")
    assert f"- 1 rows left out, for one: too_long (first: {file}:10" in "\n".join(evaluate.page(report))


# ---- several ----


def test_members_are_put_on_one_scale_and_the_mean_and_the_least_are_measured(models, tmp_path):
    file = reward_parts.write_jsonl(tmp_path / "bench.jsonl", BENCH)
    names = ["one", "two", "three"]
    report = evaluate.evaluation(str(file), [str(models / name) for name in names])
    scores = [np.array(scores_by_hand(models / name / "export", BENCH)) for name in names]
    scales = {"one": (0.25, 2.0), "two": (scores[1].mean(), scores[1].std()), "three": (0.0, 0.5)}
    sources = [entry["scale"]["source"] for entry in report["models"]]
    assert sources == ["ptl_reward.json", "the rows of this file", "ptl_reward.json"]
    scaled = np.stack([(own - scales[name][0]) / scales[name][1] for name, own in zip(names, scores)])
    for kind, expected in (("mean", scaled.mean(0)), ("worst", scaled.min(0))):
        found = report["ensemble"][kind]["overall"]
        assert found["accuracy"] == pytest.approx(np.mean(expected[:, 0] > expected[:, 1]))
        assert found["margin"] == pytest.approx(np.mean(expected[:, 0] - expected[:, 1]), abs=1e-4)
        assert found["ece"] is None and report["models"][0]["overall"]["ece"] is not None
    differences = scaled[:, :, 0] - scaled[:, :, 1]
    wrong = differences.mean(0) < 0
    assert 0 < wrong.sum() < 9
    spread = report["ensemble"]["disagreement"]
    assert spread["answers"] == pytest.approx(scaled.std(0).mean(), abs=1e-4)
    assert spread["wrong_pairs"] == pytest.approx(differences.std(0)[wrong].mean(), abs=1e-4)
    assert spread["right_pairs"] == pytest.approx(differences.std(0)[~wrong].mean(), abs=1e-4)
    page = "\n".join(evaluate.page(report))
    assert "mean of 3" in page and "two: mean" in page and "from the rows of this file" in page


# ---- refusals ----


def test_a_changed_tokenizer_or_template_is_refused_with_both_hashes(models, tmp_path, capsys):
    import shutil

    file = reward_parts.write_jsonl(tmp_path / "bench.jsonl", BENCH)
    shutil.copytree(models / "one" / "export", tmp_path / "rm")
    facts = json.loads((tmp_path / "rm" / FILE).read_text())
    template = tmp_path / "rm" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert run(file, "--model", tmp_path / "rm") == 2
    error = capsys.readouterr().err
    assert facts["template"][:12] in error and "trained with the template" in error and "this one is" in error
    (tmp_path / "rm" / FILE).write_text(json.dumps({**facts, "tokenizer": "0" * 64}))
    shutil.copy(models / "one" / "export" / "chat_template.jinja", template)
    assert run(file, "--model", tmp_path / "rm") == 2
    error = capsys.readouterr().err
    assert "000000000000" in error and facts["tokenizer"][:12] in error


def test_mistakes_are_told_in_a_line(models, tmp_path, capsys):
    file = reward_parts.write_jsonl(tmp_path / "bench.jsonl", BENCH)
    for words, told in (
        ((file, "--model", models / "base"), "is no reward model"),
        ((file, "--model", models / "nowhere"), "no folder"),
        ((tmp_path / "no.jsonl", "--model", models / "one"), "no such file"),
        ((file, "--model", models / "one", "--model", models / "one"), "twice"),
        ((file, "--model", models / "one", "--subset-column", "part"), "no row has a column 'part'"),
        ((file, "--model", models / "one", "--batch-tokens", "0"), "--batch-tokens is 0"),
        ((file, "--model", models / "one", "--out", file), "is a file"),
    ):
        assert run(*words) == 2, words
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error and error.startswith("ptl rank eval: error: ")


def test_the_command_is_parsed_without_torch():
    import subprocess
    import sys

    program = (
        "import sys, argparse\nfrom ptl.apps.ranking.evaluate import add_eval\n"
        "add_eval(argparse.ArgumentParser().add_subparsers())\nassert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


# ---- how it prints ----


def test_conversations_are_printed_as_in_training(models, tmp_path):
    """A template with today's date, or with a variable, prints other tokens: the facts say which were used."""
    import shutil

    from ptl.data.reward_models import reward_renderer

    shutil.copytree(models / "one" / "export", tmp_path / "rm")
    template = "{{ date_string }}{% if loud %}LOUD{% endif %}" + tiny.CHATML
    (tmp_path / "rm" / "chat_template.jinja").write_text(template)
    policy = RenderPolicy(template_kwargs={"loud": True}, date="1999-12-31")
    tokenizer = tiny.make_tokenizer(template=template)
    trained = Renderer(tokenizer, policy=policy)
    (tmp_path / "rm" / FILE).write_text(facts_text(trained))
    renderer, facts = reward_renderer(str(tmp_path / "rm"))
    turns = (Message(role="user", content="hello"),)
    assert renderer.prompt(turns) == trained.prompt(turns) != Renderer(tokenizer).prompt(turns)
    assert facts["render"]["template_kwargs"] == {"loud": True}


def test_the_head_of_a_bf16_model_is_not_rounded(models, tmp_path):
    from ptl.data.reward_models import load_reward_model
    from ptl.models.names import resolve_model

    objective = reward_parts.reward_policy(models / "base", seed=5)
    export(objective.policy, tiny.make_tokenizer(), tmp_path / "rm", dtype="bf16")
    model = load_reward_model(resolve_model(str(tmp_path / "rm")))
    assert model.dtype == torch.bfloat16 and torch.equal(model.score.weight, objective.policy.score.weight)
    assert document_scores(model, [[5, 9, 7]]).dtype == torch.float32
