"""A server of ``ptl serve`` in this process, on a free port, with a model that learnt two dialogues by heart."""

import threading
import time
from contextlib import contextmanager

import uvicorn

from ptl.apps.guard import Door, listen
from ptl.apps.reply import ModelWriter
from ptl.apps.serving.app import build_app
from ptl.apps.serving.desk import Desk
from ptl.data.render import Renderer
from ptl.tools.load import load_tools
from ptl.tools.toolbox import Toolbox
from ptl.types import Conversation, Message, Origin
from tests import tiny

HERE = Origin("test", 1)
ASKS = "<CALCULATOR-TOOL>6 * 7</CALCULATOR-TOOL>"
CALLS = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6 * 7"}}\n</tool_call>'


def dialogues(form):
    """What the model is taught: a sum by a tool, a greeting without one, and an answer in French."""
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "6 * 7"}}}
    asks = (
        Message(role="assistant", content=ASKS)
        if form == "tags"
        else Message(role="assistant", content="", tool_calls=(call,))
    )
    schemas = tuple(tool.schema for tool in load_tools(["calculator"])) if form == "calls" else ()
    said = [
        (Message(role="user", content="sum"), asks, Message(role="tool", content="42"), _said("It is 42.")),
        (Message(role="user", content="hello"), _said("hello world, it is I")),
        (Message(role="user", content="salut"), _said("Où est Shanghai ? En Chine.")),
    ]
    return [Conversation(messages=turns, tools=schemas, origin=HERE) for turns in said]


def _said(text):
    return Message(role="assistant", content=text)


def taught(form="tags"):
    """A tiny model that says what the dialogues say, and its renderer."""
    import torch

    tokenizer = tiny.make_tokenizer()
    if form == "tags":
        tokenizer.add_tokens(["<CALCULATOR-TOOL>", "</CALCULATOR-TOOL>"])
    renderer = Renderer(tokenizer, "chatml")
    model = tiny.make_model(len(tokenizer), hidden=64, seed=0)
    rows = [renderer.render(conversation)[0] for conversation in dialogues(form)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        total = torch.zeros(())
        for row in rows:
            ids, mask = torch.tensor(row.ids[None].astype("int64")), torch.tensor(row.loss_mask)
            logits = model(input_ids=ids, use_cache=False).logits[0]
            losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
            total = total + (losses * mask[1:]).sum() / mask.sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if total.item() < 0.02:
            break
    return model.eval(), renderer


@contextmanager
def serving(desk, door=None):
    """The base address of a running server."""
    listener = listen("127.0.0.1", 0)
    options = {"log_level": "error", "lifespan": "off", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(build_app(desk, "taught", door or Door()), **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def desk_of(form="tags", tools=("calculator",), model=None, **sampling):
    model, renderer = model or taught(form)
    box = Toolbox(load_tools(list(tools)))
    return Desk(ModelWriter(model), renderer, box, {"temperature": 0.0, "max_new_tokens": 120, **sampling})
