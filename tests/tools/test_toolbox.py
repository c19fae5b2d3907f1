"""Tools that work, fail, hang, die and say too much: there is always an answer."""

import re

import pytest

from ptl.tools.base import Call
from ptl.tools.calls import calls_in
from ptl.tools.load import load_tools
from ptl.tools.toolbox import Toolbox

PARTS = "tests.tools.parts"


@pytest.fixture(scope="module")
def box():
    names = [f"{PARTS}:{name}" for name in ("shout", "hang", "fail", "die", "megabyte")]
    box = Toolbox(load_tools([*names, "python", "calculator", "clock"]), seconds=3.0, characters=200)
    yield box
    box.close()


def one(box, name, **arguments):
    [result] = box.run([Call(name=name, arguments=arguments)])
    return result


def test_what_a_function_says_of_itself_is_what_the_model_is_told(box):
    schema = box.schemas[0]["function"]
    assert schema["name"] == "shout" and schema["description"] == "Says a text loudly."
    assert schema["parameters"]["required"] == ["text"]
    assert schema["parameters"]["properties"]["times"]["type"] == "integer"


def test_a_tool_answers(box):
    assert one(box, "shout", text="hé", times=2).text == "HÉ HÉ"
    assert one(box, "calculator", expression="6*7").text == "42"
    assert re.search(r"day \d{4}-\d\d-\d\d ", one(box, "clock", zone="Europe/Paris").text)


def test_a_tool_that_fails_hangs_or_dies_is_reported_and_the_others_go_on(box):
    calls = [Call(name=name, arguments={"text": "x"}) for name in ("fail", "hang", "die", "shout")]
    failed, hung, died, fine = box.run(calls)
    assert failed.text == "Error: KeyError: 'x'" and failed.problem
    assert "longer than 3 s" in hung.text and "its process ended" in died.text
    assert fine.text == "X" and fine.problem is None


def test_a_megabyte_is_cut_for_the_model_and_said_to_the_person(box):
    result = one(box, "megabyte", text="m")
    assert len(result.text) < 300 and "[cut here: 1,048,576 characters]" in result.text
    assert result.problem is not None and "1,048,576 characters" in result.problem


def test_what_cannot_be_run_is_an_answer_too(box):
    [result] = box.run(calls_in("<FETCH-TOOL>x</FETCH-TOOL>", box.tools))
    assert result.text.startswith("Error: there is no tool fetch")


def test_python_gives_what_is_printed_the_last_value_and_the_error(box):
    assert one(box, "python", code="print('a')\nx = 6\nx * 7").text == "a\n42"
    assert one(box, "python", code="```python\nsum(range(5))\n```").text == "10"
    assert one(box, "python", code="print(1)\n1/0").text == "1\nZeroDivisionError: division by zero"
    assert "SyntaxError" in one(box, "python", code="def (").text
    assert one(box, "python", code="x = 1").text == "(nothing was printed)"
    assert "Error" in one(box, "python", code="open('/etc/passwd').read()").text
    assert one(box, "python", code="while True: pass").text.startswith("Error")
    assert one(box, "python", code="import os; os._exit(0)").text.startswith("Error")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fly", "there is no tool 'fly'"),
        ("search", "search needs documents"),
        ("nowhere:f", "no module 'nowhere'"),
        (f"{PARTS}:absent", "has no absent"),
        (f"{PARTS}:bare", "expected type hints"),
    ],
)
def test_tools_that_are_none_are_refused(name, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load_tools([name])


def test_limits_are_checked():
    clock = load_tools(["clock"])
    with pytest.raises(ValueError, match="two tools named clock"):
        Toolbox([*clock, *clock])
    with pytest.raises(ValueError, match="characters"):
        Toolbox(clock, characters=5)
    with pytest.raises(ValueError, match="time limit"):
        Toolbox(clock, seconds=0)
