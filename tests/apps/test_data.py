"""``ptl data``: what a person sees, and one clear line for every mistake."""

import json
import subprocess
import sys

import pytest
import yaml

from ptl.apps.data import data_module, layered, main, pairs
from ptl.data.preview import segments
from ptl.data.render import Renderer
from ptl.data.sources import Source
from ptl.data.views import ChatView

ROWS = [
    {"messages": [{"role": "user", "content": "hello\nworld"}, {"role": "assistant", "content": "the fox"}]},
    {
        "messages": [
            {"role": "user", "content": "What is 2+2?"},
            {"role": "assistant", "content": "half", "train": 0.5},
            {"role": "assistant", "content": "none", "train": False},
            {"role": "assistant", "content": "Où est Shanghai"},
        ]
    },
]


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):
    """A folder with a tokenizer, two rows and a bad one, which is also the working directory."""
    tokenizer.save_pretrained(tmp_path / "tok")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n{bad\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_preview_marks_what_is_trained_without_colour(folder, capsys):
    assert main(["preview", "rows.jsonl", "--tokenizer", "tok"]) == 0
    out = capsys.readouterr().out
    assert "<|im_start|>user⏎\nhello⏎\nworld<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦the fox<|im_end|>⟧⏎\n" in out
    assert (
        "⟦×0.5 half<|im_end|>⟧⏎\n<|im_start|>assistant⏎\nnone<|im_end|>⏎\n" in out
        and "⟦Où est Shanghai<|im_end|>⟧" in out
    )
    assert "rows.jsonl:1: " in out and "rows.jsonl:3: not trained: broken_json" in out and "\x1b[" not in out


def test_preview_in_colour(folder, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["preview", "rows.jsonl", "--tokenizer", "tok", "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[32mthe fox" in out and "\x1b[1;32m<|im_end|>" in out and "⟦" not in out and "\x1b[2m" in out


def test_preview_shows_the_cut(folder, capsys):
    options = ["--max-length", "16", "--truncation", "keep_start", "--rows", "1"]
    assert main(["preview", "rows.jsonl", "--tokenizer", "tok", *options]) == 0
    assert "16 tokens" in (out := capsys.readouterr().out) and "truncated, lost its end-of-turn" in out


def test_the_preview_shows_all_tokens_and_marks_as_the_loss_does(tokenizer):
    from ptl.data.batches import mask_of
    from ptl.data.records import parse_row
    from ptl.types import Origin

    record = parse_row(ROWS[1], "messages", Source(path="x"), Origin("x", 1))
    (example,) = ChatView().encode([record], Renderer(tokenizer), 512, "drop")[0]
    parts = segments(example, tokenizer)
    assert "".join(part.text for part in parts) == tokenizer.decode(example["ids"])
    trained = tokenizer.decode(
        example["ids"][mask_of(len(example["ids"]), example["spans"], example["span_weights"]) > 0]
    )
    assert "".join(part.text for part in parts if part.weight) == trained
    assert {part.text for part in parts if part.special} == {"<|im_start|>", "<|im_end|>"}


def test_audit_prints_a_table_and_writes_json(folder, capsys):
    assert main(["audit", "rows.jsonl", "--tokenizer", "tok", "--json", "audit.json"]) == 0
    out = capsys.readouterr().out
    assert "refused: broken_json" in out and "rows.jsonl:3: broken_json" in out
    (entry,) = json.loads((folder / "audit.json").read_text())["sources"]
    assert (entry["rows"], entry["kept"], entry["refused"]["broken_json"]["count"]) == (3, 2, 1)
    assert main(["audit", "rows.jsonl", "rows.jsonl", "--tokenizer", "tok", "--json", "-"]) == 0
    both = json.loads(capsys.readouterr().out)["sources"]
    assert both[0] == entry and both[1]["duplicates"] == 2


def test_audit_exits_with_1_above_its_limit(folder, capsys):
    assert main(["audit", "rows.jsonl", "--tokenizer", "tok", "--max-bad-fraction", "0.2"]) == 1
    assert "--max-bad-fraction 0.2" in capsys.readouterr().err


def test_options_reach_the_rows(folder, capsys):
    (folder / "qa.csv").write_text("q,a\nhello,world\n")
    options = ["--column", "prompt=q", "--column", "completion=a", "--train-roles", "user,assistant"]
    assert main(["preview", "qa.csv", "--tokenizer", "tok", *options]) == 0
    out = capsys.readouterr().out
    assert "⟦hello<|im_end|>⟧" in out and "⟦world<|im_end|>⟧" in out and "qa.csv:2" in out


CONFIG = {
    "model": {"class_path": "ptl.objectives.sft.SFT", "init_args": {"policy": {"name": "tok"}}},
    "data": {"train": [{"path": "rows.jsonl"}], "max_length": 64, "thresholds": {"max_bad_fraction": 0.5}},
    "trainer": {"devices": 1},
}


def test_prepare_fills_the_cache_that_the_run_reads(folder, capsys, monkeypatch):
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "more.yaml").write_text("data: {max_length: 100, seed: 3}")
    assert main(["prepare", "-c", "run.yaml", "-c", "more.yaml", "--data.max_length", "128"]) == 0
    assert "kept rows" in capsys.readouterr().out
    module = data_module(["run.yaml", "more.yaml"], ["--data.max_length", "128"])
    assert (module.max_length, module.seed, module.tokenizer) == (128, 3, "tok")
    monkeypatch.setattr("ptl.data.prepare.encoder_of", lambda *a, **k: pytest.fail("it was prepared again"))
    module.prepare()
    assert module.audits["train"].sources[0].kept == 2


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["preview", "nowhere.jsonl", "--tokenizer", "tok"], "nowhere.jsonl: no such file"),
        (["preview", "rows.jsonl", "--tokenizer", "./nowhere"], "tokenizer"),
        (["preview", "rows.jsonl", "--tokenizer", "tok", "--format", "chat"], "format"),
        (["preview", "rows.jsonl", "--tokenizer", "tok", "--rows", "0"], "--rows"),
        (["preview", "rows.jsonl", "--tokenizer", "tok", "--column", "prompt"], "--column"),
        (["preview", "rows.jsonl", "--tokenizer", "tok", "--colour", "no"], "--colour"),
        (["preview", "rows.jsonl"], "--tokenizer"),
        (["audit", "rows.jsonl", "--tokenizer", "tok", "--template", "nope"], "template"),
        (["audit", "rows.jsonl", "--tokenizer", "tok", "--max-bad-fraction", "2"], "max_bad_fraction"),
        (["audit", "rows.jsonl", "--tokenizer", "tok", "--num-proc", "0"], "num_proc"),
        (["prepare"], "--config"),
        (["prepare", "-c", "nowhere.yaml"], "nowhere.yaml"),
        (["prepare", "-c", "broken.yaml"], "not YAML"),
        (["prepare", "-c", "list.yaml"], "mapping"),
        (["prepare", "-c", "run.yaml", "--data.max_lenth", "3"], "max_lenth"),
        (["prepare", "-c", "run.yaml", "--trainer.devices", "3"], "--trainer.devices"),
        (["prepare", "-c", "run.yaml", "--data.max_length", "none"], "max_length"),
        (["prepare", "-c", "run.yaml", "--data.train", "[]"], "data.train"),
        (["prepare", "-c", "class.yaml"], "model.class_path"),
        (["prepare", "-c", "strict.yaml"], "rows.jsonl:3: broken_json"),
        ([], "COMMAND"),
        (["show"], "show"),
    ],
)
def test_a_mistake_is_told_on_stderr_with_code_2(folder, capsys, argv, told):
    files = {
        "run": CONFIG,
        "list": [1],
        "class": {**CONFIG, "model": {"class_path": "ptl.objectives.sft.SFTT"}},
        "strict": {**CONFIG, "data": {"train": [{"path": "rows.jsonl"}]}},
    }
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (folder / "broken.yaml").write_text("a: [")
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err


def test_layers_merge_by_key_and_a_new_class_drops_the_old_arguments(tmp_path):
    a = {"data": {"train": [1, 2], "seed": 1}, "model": {"class_path": "A", "init_args": {"x": 1}}}
    b = {"data": {"train": [3]}, "model": {"class_path": "B", "init_args": {"y": 2}}}
    for name, content in (("a", a), ("b", b)):
        (tmp_path / name).write_text(yaml.safe_dump(content))
    merged = layered([str(tmp_path / "a"), str(tmp_path / "b")])
    assert merged == {"data": {"train": [3], "seed": 1}, "model": b["model"]}


def test_pairs():
    assert pairs(["a=b=c"], "--role") == {"a": "b=c"}


def test_help_does_not_load_torch():
    code = "import sys; from ptl.apps.data import main; main(['audit', '--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.rstrip().endswith("False") and "--json" in out.stdout
