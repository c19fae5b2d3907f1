"""Rows that reasoning-gym makes: the same in every process, prepared and counted like those of a file."""

import json
import subprocess
import sys

import pytest

from ptl.data import gym
from ptl.data.audit import AuditError
from ptl.data.files import resolve
from ptl.data.gym import UNSTEADY, GymRange, check_apart, gym_data
from ptl.data.prepare import prepare
from ptl.data.prompts import PromptView
from ptl.data.readers import blocks, first_rows
from ptl.data.records import parse_row
from ptl.data.render import Renderer
from ptl.data.sources import REASONS, BadRow, Source, detect_format
from ptl.data.views import ChatView
from ptl.types import Origin
from tests import forks

SUMS = "gym://chain_sum?size=200&seed=0&min_terms=2&max_terms=2&min_digits=1&max_digits=1"


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


def rows_of(source):
    return [(block.file, line, row) for block in blocks(source) for line, row in block.rows()]


def run(sources, renderer, cache, view=None, **options):
    settings = {"max_length": 512, "truncation": "drop", "num_proc": 1, "quiet": True, **options}
    view = view or PromptView(room=64)
    sources = [Source(path=source) if isinstance(source, str) else source for source in sources]
    return prepare(sources, view=view, renderer=renderer, cache_dir=cache, **settings)


def test_rows_become_prompts_that_say_what_made_them():
    source = Source(path=SUMS, limit=3)
    assert detect_format(source, first_rows(source)) == "prompt"
    rows = rows_of(source)
    assert [(file, line) for file, line, _ in rows] == [(SUMS, 1), (SUMS, 2), (SUMS, 3)]
    file, line, row = rows[2]
    prompt = parse_row(row, "prompt", source, Origin(file, line))
    (message,) = prompt.messages
    assert message.role == "user" and message.content == row["question"] and prompt.tests == ()
    sum_of = message.content.removesuffix(" =").rpartition(": ")[2]
    assert prompt.answer == str(eval(sum_of))  # "4 - 7"
    made_from = {"seed": 0, "size": 200, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert prompt.meta == {"gym": {"dataset": "chain_sum", "config": made_from, "index": 2}}


@pytest.mark.parametrize("path", [SUMS, "gym://zebra_puzzles?size=4", "gym://group_anagrams?size=100"])
def test_every_process_makes_the_same_rows(path):
    """Also with other hash seeds, and from the middle: processes share the blocks of a data set."""
    code = (
        "import sys, hashlib; from ptl.data.gym import gym_data; data = gym_data(sys.argv[1]); "
        "rows = [row for part in reversed(list(data.parts(data.num_rows()))) for row in part.rows()]; "
        "print(hashlib.md5(repr(sorted(rows, key=lambda r: r[0])).encode()).hexdigest())"
    )
    told = [forks.begin(["-c", code, path], parity=parity).finish(timeout=120) for parity in (0, 1)]
    assert [done.returncode for done in told] == [0, 0], told
    assert told[0].stdout == told[1].stdout


def test_a_seed_is_given_where_the_path_has_none():
    assert json.loads(gym_data("gym://chain_sum").config) == {"seed": 0}
    own, other = (rows_of(Source(path=f"gym://chain_sum?size=5&seed={seed}")) for seed in (0, 1))
    assert rows_of(Source(path="gym://chain_sum?size=5"))[0][2]["question"] == own[0][2]["question"]
    assert [row["question"] for _, _, row in own] != [row["question"] for _, _, row in other]


def test_seeds_that_share_rows_are_refused():
    """Row 1 of seed 0 is row 0 of seed 1."""
    first, second = (rows_of(Source(path=f"gym://chain_sum?size=9&seed={seed}")) for seed in (0, 1))
    assert [row["question"] for _, _, row in first[1:]] == [row["question"] for _, _, row in second[:-1]]
    train = [Source(path=SUMS), Source(path="data.jsonl")]

    def near(seed, **options):
        check_apart(train, [Source(path="other.jsonl"), Source(path=SUMS.replace("seed=0", f"seed={seed}"), **options)])

    for seed in (0, 1, 199, -1, -199):
        with pytest.raises(ValueError, match="set its seed to 200 or more") as caught:
            near(seed)
        assert f"seed={seed}&" in str(caught.value)
    near(200)
    near(-200)
    near(-1, limit=1)
    check_apart(
        train, [Source(path="gym://chain_sum?seed=1"), Source(path=SUMS.replace("max_digits=1", "max_digits=2"))]
    )
    with pytest.raises(ValueError, match="1000 or more"):
        check_apart([Source(path="gym://chain_sum")], [Source(path="gym://chain_sum?seed=999&size=1")])


def test_values_are_json_or_python_or_text():
    path = 'gym://x?a=1&b=true&c=True&d=["%2B","-"]&e=(1, 2)&f=word&g=None&h=p%26q&i=a=b&j=1e-3'
    values = {"a": 1, "b": True, "c": True, "d": ["+", "-"], "e": [1, 2], "f": "word", "g": None, "h": "p&q"}
    assert json.loads(gym_data(path).config) == {"seed": 0, **values, "i": "a=b", "j": 1e-3}


def test_law_8_made_rows_are_counted_and_kept_apart_by_their_parameters(tmp_path, renderer):
    sources = [Source(path=SUMS, name="sums", limit=150), Source(path="gym://spell_backward?size=70", name="words")]
    prepared = run(sources, renderer, tmp_path, num_proc=2)
    sums, words = prepared.audit.sources
    assert (sums.rows, sums.kept, sums.beyond_limit, sums.path, sums.format) == (150, 150, 50, SUMS, "prompt")
    assert (words.rows, words.kept, prepared.sources) == (70, 70, ("sums", "words"))
    assert prepared.rows["line"][:] == [*range(1, 151), *range(1, 71)]
    assert run(sources, renderer, tmp_path / "one").rows[:] == prepared.rows[:]


def test_the_key_holds_what_the_rows_depend_on(tmp_path, renderer, monkeypatch):
    path = "gym://chain_sum?size=20&seed=0&min_terms=2&max_terms=2"
    first = run([path], renderer, tmp_path)
    assert run(["gym://chain_sum?max_terms=2&min_terms=2&size=20"], renderer, tmp_path).path == first.path
    others = [
        path.replace("seed=0", "seed=1"),
        path + "&min_digits=2",
        path.replace("20", "21"),
        "gym://basic_arithmetic",
    ]
    assert len({first.path, *(run([other], renderer, tmp_path).path for other in others)}) == 5
    before = gym_data(path).identity()
    monkeypatch.setattr("ptl.data.gym.metadata.version", lambda name: "0.0.1")
    assert gym_data(path).identity() != before


def test_equal_questions_of_a_small_task_are_dropped_where_that_is_asked_for(tmp_path, renderer):
    """There are 200 such questions, so any two seeds share most of them."""
    sources = [SUMS, SUMS.replace("seed=0", "seed=1000000")]
    prepared = run(sources, renderer, tmp_path, deduplicate=True)
    kept = [tuple(ids) for ids in prepared.rows["ids"]]
    assert len(kept) == len(set(kept)) < 200
    for entry in prepared.audit.sources:
        assert entry.kept + entry.dropped_by("duplicate") == entry.rows == 200 and entry.kept > 0
    assert f"{SUMS}:" in prepared.audit.sources[0].dropped["duplicate"].examples[0]


def test_questions_without_one_right_answer_are_prompts_too():
    source = Source(path="gym://propositional_logic?size=3")
    assert detect_format(source, first_rows(source)) == "prompt"
    file, line, row = rows_of(source)[0]
    prompt = parse_row(row, "prompt", source, Origin(file, line))
    assert prompt.answer is None and set(prompt.meta) == {"gym"}


def test_answers_can_be_learned_too(tmp_path, renderer, tokenizer):
    source = Source(
        path=SUMS, limit=5, format="prompt_completion", columns={"prompt": "question", "completion": "answer"}
    )
    prepared = run([source], renderer, tmp_path, view=ChatView())
    row = first_rows(source)[0]
    text = tokenizer.decode(prepared.rows[0]["ids"])
    assert row["question"] in text and f"assistant\n{row['answer']}" in text


def test_law_8_a_row_that_cannot_be_made_is_refused_under_its_index(tmp_path, renderer):
    path = "gym://countdown?size=2&min_target=900000&max_target=900001"
    with pytest.raises(AuditError, match="1: not_made: reasoning-gym raised ValueError: Failed to generate"):
        run([Source(path=path, format="prompt")], renderer, tmp_path)
    assert "not_made" in REASONS
    ((_, row), _) = GymRange("countdown", json.dumps({"min_target": 900000, "max_target": 900001}), 0, 2).rows()
    assert isinstance(row, BadRow)


WRONG = [
    ("gym://chain_sums", "nearest are ['chain_sum'"),
    ("gym://qqqqqqq", "it has ['ab', 'acre'"),
    ("gym://chain_sum?min_term=2", "nearest are ['min_terms'"),
    ("gym://chain_sum?min_terms=5&max_terms=2", "max_terms must be >= min_terms"),
    ("gym://chain_sum?min_terms=many", "refuses the parameters of chain_sum"),
    ("gym://chain_sum?size=2.5", "refuses the parameters of chain_sum"),
    ("gym://chain_sum?size=0", "size must be positive"),
    ("gym://chain_sum?seed=null", "seed is None; expected an integer"),
    ("gym://chain_sum?seed=true", "seed is True"),
    ("gym://chain_sum?size", "got 'size'"),
    ("gym://chain_sum?size=1&size=2", "each parameter once"),
    ("gym://chain_sum?size={1}", "no JSON value"),
    ("gym://composite", "as a source of its own"),
    ("gym://", "no data set ''"),
    *((f"gym://{name}", "differ from process to process") for name in UNSTEADY),
    ("gym://word_ladder", "differ from process to process"),
]


@pytest.mark.parametrize(("path", "told"), WRONG)
def test_a_wrong_path_is_refused_by_name(path, told):
    with pytest.raises(ValueError) as caught:
        first_rows(Source(path=path))
    assert told in str(caught.value) and str(caught.value).startswith(f"source {path}: ")


def test_a_split_or_another_scheme_is_refused():
    with pytest.raises(ValueError, match="split"):
        resolve(Source(path=SUMS, split="test"))
    with pytest.raises(ValueError, match="gym://NAME"):
        resolve(Source(path="https://example.org/a.jsonl"))


def test_without_the_package_the_line_to_install_it_is_told(monkeypatch):
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'ptl\[gym\]'"):
        resolve(Source(path=SUMS))


def test_the_package_is_imported_for_rows_alone():
    code = (
        "import sys, ptl.data.readers, ptl.data.prepare; from ptl.data.files import resolve; "
        f"from ptl.data.sources import Source; resolve(Source(path={SUMS!r}))[0].identity(); "
        "print('reasoning_gym' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert out.stdout.strip() == "False"
