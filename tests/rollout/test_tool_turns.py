"""Answers of several turns: what is the policy's own, what tools said, and when an answer ends."""

import math

import pytest

from ptl.data.render import Renderer
from ptl.rollout.engine import Asked, Draws
from ptl.rollout.sampling import Sampled
from ptl.rollout.tool_turns import ToolUse, answered_with_tools, closing_ids
from ptl.tools.load import load_tools
from ptl.tools.toolbox import Toolbox
from ptl.types import Conversation, Message, Origin, Prompt
from tests import tiny

HERE = Origin("test", 1)
PROMPT = Prompt(messages=(Message(role="user", content="6 times 7?"),), origin=HERE)
ASKS = "<CALCULATOR-TOOL>6 * 7</CALCULATOR-TOOL>"


@pytest.fixture(scope="module")
def box():
    box = Toolbox(load_tools(["calculator"]))
    yield box
    box.close()


@pytest.fixture(scope="module")
def renderer():
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<CALCULATOR-TOOL>", "</CALCULATOR-TOOL>"])
    return Renderer(tokenizer)


class Model:
    """Draws what a test has written, and remembers what it was asked."""

    def __init__(self, renderer, *rounds):
        self.renderer, self.rounds, self.asked = renderer, list(rounds), []

    def __call__(self, asked, draws):
        self.asked.append((list(asked), draws))
        texts = self.rounds.pop(0)
        per = [texts[i : i + draws.samples] for i in range(0, len(texts), draws.samples)]
        assert len(per) == len(asked)
        return [[self.drawn(text, one.limit) for text in some] for some, one in zip(per, asked)]

    def drawn(self, text, limit):
        ended = text.endswith("|")
        ids = self.renderer.tokenizer(text.rstrip("|"), add_special_tokens=False)["input_ids"]
        ids = [*ids, *([self.renderer.terminators[0]] if ended else [])][:limit]
        return Sampled(ids, [-float(i) for i in range(len(ids))])


def run(model, box, *, samples=2, limit=200, rounds=3):
    ids = model.renderer.prompt(PROMPT.messages)
    draws = Draws(samples, 1.0, 1.0, tuple(model.renderer.terminators), 5)
    [answers] = answered_with_tools(model, draws, [Asked(ids, 3, limit)], [PROMPT], model.renderer, box, rounds)
    return answers


def test_law_2_an_answer_with_a_tool_has_the_tokens_of_its_training_row(renderer, box):
    model = Model(renderer, [ASKS, "Hi.|"], ["It is 42.|"])
    used, plain = run(model, box)
    assert (plain.text, plain.finished, all(plain.own), plain.results) == ("Hi.", True, True, [])
    assert used.text == "It is 42." and used.finished and [r.text for r in used.results] == ["42"]
    [row] = renderer.render(Conversation(messages=tuple(used.messages), origin=HERE))
    whole = [*renderer.prompt(PROMPT.messages), *used.ids]
    assert row.ids.tolist()[: len(whole)] == whole
    # Its own are what a row trains, but for the end of the first turn, which the closing tag stood for.
    trained = row.loss_mask[len(whole) - len(used.ids) : len(whole)].astype(bool).tolist()
    first_end = used.ids.index(renderer.terminators[0])
    assert trained[first_end] and not used.own[first_end]
    trained[first_end] = False
    assert trained == used.own
    assert [math.isnan(value) for value in used.logprobs] == [not own for own in used.own]


def test_a_turn_that_the_model_ended_itself_trains_its_end(renderer, box):
    used = run(Model(renderer, [ASKS + "|"], ["42|"]), box, samples=1)[0]
    first_end = used.ids.index(renderer.terminators[0])
    assert used.own[first_end] and not used.own[first_end + 1]
    assert len(used.ids) == len(run(Model(renderer, [ASKS], ["42|"]), box, samples=1)[0].ids)


def test_the_next_turn_goes_on_from_what_was_drawn_with_the_room_that_is_left(renderer, box):
    model = Model(renderer, [ASKS, ASKS], ["42|", "42|"])
    run(model, box, limit=90)
    (_, first), (second, again) = model.asked
    assert set(closing_ids(renderer, box.tools)) < set(first.stop) and first.stop == again.stop
    assert [one.number for one in second] == [6, 7] and again.samples == 1 and again.seed != first.seed
    prompt = renderer.prompt(PROMPT.messages)
    for one in second:
        assert one.limit == 90 - (len(one.ids) - len(prompt))


def test_an_answer_that_only_asks_or_has_no_room_is_unfinished(renderer, box):
    asks = run(Model(renderer, [ASKS], [ASKS], [ASKS]), box, samples=1, rounds=2)[0]
    assert not asks.finished and len(asks.results) == 2 and asks.text == ASKS
    short = run(Model(renderer, [ASKS]), box, samples=1, limit=len(renderer.tokenizer(ASKS)["input_ids"]) + 2)[0]
    assert not short.finished and all(short.own)


def test_settings_are_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match="there is no tool 'fly'"):
        ToolUse(names=["fly"])
    with pytest.raises(ValueError, match="names is empty"):
        ToolUse(names=[])
    with pytest.raises(ValueError, match="rounds must be 1 or more"):
        ToolUse(names=["clock"], rounds=0)
