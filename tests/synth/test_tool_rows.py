"""Rows with tools: what is asked, what is learnt, what is kept for measuring."""

import json

import pytest

from ptl.data.render import Renderer
from ptl.data.sources import Source
from ptl.rewards.matching import match
from ptl.synth.rephrase import rephrase, unlike
from ptl.synth.tool_report import ask, graded, measures, page
from ptl.synth.tool_rows import Making, make_rows, ordinary_rows
from ptl.synth.tool_tasks import Task, programs, query_of, searches, sums, times
from ptl.tools.calculator import calculate
from ptl.tools.calls import calls_in
from ptl.tools.load import load_tools
from ptl.tools.toolbox import Toolbox
from ptl.types import Origin
from tests import tiny

LANGUAGES = ("en", "fr")


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    (folder / "facts.txt").write_text("The Eiffel tower was built in 1889.\n\nRome has seven hills.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTL_CACHE", str(folder / "cache"))
        box = Toolbox(load_tools([f"search={folder / 'facts.txt'}", "calculator", "python", "clock"]), processes=2)
        yield box
        box.close()


def test_tasks_are_functions_of_seed_and_number():
    assert list(sums(20, 3, LANGUAGES)) == [*sums(10, 3, LANGUAGES), *list(sums(20, 3, LANGUAGES))[10:]]
    assert list(sums(20, 3, LANGUAGES)) != list(sums(20, 4, LANGUAGES))
    assert {task.language for task in sums(20, 3, LANGUAGES)} == {"en", "fr"}
    assert {task.language for task in sums(20, 3, ["fr"])} == {"fr"}


def test_the_expression_of_every_sum_is_its_question():
    """The call holds no number that the question does not, and has a value."""
    for task in sums(300, 0, LANGUAGES):
        numbers = {int(part) for part in task.argument.replace("(", " ").replace(")", " ").split() if part.isdigit()}
        asked = {int(part) for part in "".join(c if c.isdigit() else " " for c in task.question).split()}
        assert numbers - {100} <= asked and calculate(task.argument)


@pytest.fixture(scope="module")
def made(box):
    asked = [("When was the Eiffel tower built?", ["1889"], "facts"), ("Who rules Mars?", ["Ada"], "facts")]
    tasks = [*sums(20, 0, LANGUAGES), *programs(10, 0, LANGUAGES), *times(4, 0, LANGUAGES)]
    tasks += [*searches(asked, lambda text: "en"), tasks[0]]
    return {form: make_rows(tasks, box, Making(form=form, held_out=0.2)) for form in ("tags", "calls")}


def test_rows_call_the_tool_and_answer_from_its_result(made, box):
    for row in made["tags"].train:
        _, asks, told, said = row["messages"]
        assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant"]
        [call] = calls_in(asks["content"], box.tools)
        assert call.problem is None and call.name == row["meta"]["tool"]
        assert told["content"] in said["content"] or match(told["content"], [said["content"]])
    counts = made["tags"].counts
    assert counts["duplicate"] >= 1 and counts["not_found"] == 1 and counts["train"] == len(made["tags"].train)
    assert sum(counts.values()) == 37


def test_both_forms_have_the_same_questions_and_hold_out_the_same(made):
    def asked(rows):
        return [row["messages"][0]["content"] for row in rows]

    assert asked(made["tags"].train) == asked(made["calls"].train)
    assert made["tags"].held_out != [] and [(row["question"], row["tool"]) for row in made["tags"].held_out] == [
        (row["question"], row["tool"]) for row in made["calls"].held_out
    ]
    assert not {row["question"] for row in made["tags"].held_out} & set(asked(made["tags"].train))
    for row in made["calls"].train:
        assert row["messages"][1]["tool_calls"][0]["function"]["name"] == row["meta"]["tool"]
        assert row["messages"][2]["tool_call_id"] == row["messages"][1]["tool_calls"][0]["id"]
        assert len(row["tools"]) == 4


def test_law_2_calls_and_answers_are_trained_and_results_are_not(made, tmp_path):
    from ptl.data.readers import blocks
    from ptl.data.records import parse_row

    for form, template in (("tags", "im_sep"), ("calls", "chatml")):
        path = tmp_path / f"{form}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made[form].train))
        tokenizer = tiny.make_tokenizer(("<|im_start|>", "<|im_end|>", "<|im_sep|>"))
        renderer, source = Renderer(tokenizer, template), Source(path=str(path))
        for block in blocks(source):
            for line, row in block.rows():
                [tokens] = renderer.render(parse_row(row, "messages", source, Origin("rows", line)))
                shown = renderer.tokenizer.decode([i for i, w in zip(tokens.ids, tokens.loss_mask) if w])
                assert row["messages"][-1]["content"] in shown
                hidden = renderer.tokenizer.decode([i for i, w in zip(tokens.ids, tokens.loss_mask) if not w])
                assert row["messages"][2]["content"] in hidden and row["messages"][0]["content"] in hidden
                assert "-TOOL>" not in hidden


def test_general_rows_list_the_tools_only_where_calls_are_made_by_them(box):
    row = {"messages": [{"role": "user", "content": "hi"}]}
    assert ordinary_rows([row], box, Making()) == [row]
    assert len(ordinary_rows([row], box, Making(form="calls"))[0]["tools"]) == 4


def test_a_query_is_the_question_without_its_mark():
    assert query_of(" Who is it ? ") == "Who is it"


# ---- in other words ----


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("How much do 12 and 30 make?", None),
        ("What is 12 + 30?", "same_words"),
        ("What is 12 plus 31?", "other_numbers"),
        ("What is 12 plus 30", "no_question"),
        ("Sure!\nWhat is 12 plus 30?", "no_question"),
        ("", "no_question"),
    ],
)
def test_a_question_in_other_words_has_its_numbers(said, why):
    assert unlike("What is 12 + 30?", said, True) == why
    assert unlike("What is 12 + 30?", said, False) == "unfinished"


def test_a_question_in_other_words_has_its_names():
    question = "When did Anna move to Paris?"
    assert unlike(question, "In which year did Anna go to live in Paris?", True) is None
    assert unlike(question, "In which year did Anna go to live in Rome?", True) == "lost_names"


def test_a_model_that_cannot_put_it_in_other_words_gives_no_row(tmp_path):
    model = tiny.make_model(400, seed=1).eval()
    renderer = Renderer(tiny.make_tokenizer())
    tasks = list(sums(5, 0, ["en"]))
    found = rephrase(model, renderer, tasks, batch=2)
    assert len(found.tasks) + found.dropped.total() == 5
    assert found == rephrase(model, renderer, tasks, batch=2)


# ---- measuring ----


def test_measures_count_the_right_tool_the_right_answer_and_needless_calls(box):
    class Written:
        """What ``graded`` reads of an answer."""

        def __init__(self, text, *names, finished=True):
            from ptl.tools.base import Call, Result

            self.text, self.finished = text, finished
            self.results = [Result(Call(name=name, arguments={}), "x") for name in names]

    rows = [
        {"question": "a", "tool": "calculator", "answers": ["42"]},
        {"question": "b", "tool": "calculator", "answers": ["7"]},
        {"question": "c", "tool": "search", "answers": ["Rome"]},
        {"question": "d", "tool": "clock", "answers": []},
    ]
    using = graded(rows, [Written("It is 42.", "calculator"), Written("8", "search"), Written("Rome", "search"),
                          Written("noon", "clock", finished=False)])  # fmt: skip
    alone = graded(rows, [Written("41"), Written("7"), Written("Paris"), Written("x")])
    plain = graded([{"question": "hi"}, {"question": "ho"}], [Written("x"), Written("y", "search")])
    found = measures(using, alone, plain)
    assert found["all"]["right_tool"]["share"] == 0.75 and found["all"]["right"]["share"] == 2 / 3
    assert found["all"]["right_without"]["share"] == 1 / 3 and found["all"]["ended"]["share"] == 0.75
    assert found["by_tool"]["calculator"]["right_tool"]["share"] == 0.5
    assert found["by_tool"]["clock"]["right"]["share"] is None
    assert found["ordinary"]["calls"]["share"] == 0.5
    assert "| before | calculator | 2 | 50 % (9-91) | 50 %" in page({"before": found})


def test_a_model_is_asked_with_and_without_tools(box):
    model, renderer = tiny.make_model(400, seed=2).eval(), Renderer(tiny.make_tokenizer())
    with_tools = ask(model, renderer, ["What is 2+2?", "Hello?"], box, max_new_tokens=8)
    without = ask(model, renderer, ["What is 2+2?", "Hello?"], Toolbox([]), max_new_tokens=8)
    assert [one.ids for one in with_tools] == [one.ids for one in without]  # it calls none


def test_a_task_without_a_result_is_left_out(box):
    broken = Task(question="?", tool="calculator", argument="1/0", answer="{}")
    with_rows = make_rows([broken], box, Making(held_out=0.0))
    assert with_rows.counts == {"failed": 1} and with_rows.train == []
