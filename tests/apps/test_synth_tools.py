"""``ptl synth tools`` and ``tools-report`` from the command line."""

import json

import pytest

from ptl.apps.synth import main
from tests import tiny


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "docs.jsonl").write_text(json.dumps({"title": "tower", "text": "The tower was built in 1889."}))
    asked = [{"question": "When was the tower built?", "answer": "1889"}, {"question": "no answer"}]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    chats = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "ho"}]} for i in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return tmp_path


def made(files, *more, out="out.jsonl"):
    arguments = ["tools", "--out", str(files / out), "--sums", "12", "--language", "en", "--held-out", "0.3", *more]
    return main(arguments)


def test_rows_held_out_questions_and_manifest(files, capsys):
    more = ["--questions", str(files / "asked.jsonl"), "--documents", str(files / "docs.jsonl")]
    more += ["--mix", str(files / "chats.jsonl")]
    assert made(files, *more) == 0
    said = capsys.readouterr().out
    assert "--tag '<SEARCH-TOOL>'" in said
    train, held = rows(files / "out.jsonl"), rows(files / "out.held_out.jsonl")
    manifest = json.loads((files / "out.manifest.json").read_text())
    assert manifest["rows"] == len(train) and manifest["held_out"] == len(held) > 0
    assert manifest["left_out"] == {"no_answer": 1} and manifest["without_tools"]["rows"] > 0
    assert {row["meta"].get("tool") for row in train} >= {"calculator", None}
    first = (files / "out.jsonl").read_bytes()
    assert made(files, *more) == 0 and (files / "out.jsonl").read_bytes() == first


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--questions", "x.jsonl"], "--questions and --documents go together"),
        (["--mix-share", "1"], "--mix-share must be 0 or more and below 1, got 1"),
        (["--held-out", "1"], "--held-out must be 0 or more and below 1, got 1"),
        (["--programs", "-1"], "--programs must be 0 or more, got -1"),
        (["--documents", "nowhere", "--questions", "nowhere.jsonl"], "nowhere"),
        (["--mix", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--out", "rows.txt"], "expected a .jsonl file"),
    ],
)
def test_mistakes_are_one_line(files, capsys, more, said):
    assert made(files, *more) == 2
    line = capsys.readouterr().err.strip()
    assert said in line and line.startswith("ptl synth: error:") and "\n" not in line
    assert not (files / "out.jsonl").exists()


def test_a_file_of_somebody_elses_stays(files, capsys):
    (files / "out.jsonl").write_text("mine")
    assert made(files) == 2 and (files / "out.jsonl").read_text() == "mine"


def test_models_are_measured(files, capsys):
    assert made(files) == 0
    model = tiny.save_folder(files / "model", tiny.make_tokenizer())
    out = files / "report"
    arguments = [str(model), "--held-out", str(files / "out.held_out.jsonl"), "--ordinary", str(files / "chats.jsonl")]
    assert main(["tools-report", *arguments, "--limit", "2", "--out", str(out)]) == 0
    found = json.loads((out / "report.json").read_text())[str(model)]
    assert found["all"]["questions"] == 2 and found["ordinary"]["questions"] == 2
    assert found["all"]["right_tool"]["share"] == 0.0
    assert len(rows(out / "answers.jsonl")) == 6 and "right tool" in (out / "report.md").read_text()
