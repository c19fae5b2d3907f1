"""Made-up answers, and functions that judge them well or badly; processes import them by name."""

from __future__ import annotations

import os
import re
import sys
import time

from ptl.rewards.base import Completion, Failure
from ptl.types import Message, Origin, Prompt


def completion(text, answer=None, *, prompt_text="<|im_start|>assistant\n", finished=True, ids=(), line=1, **meta):
    prompt = Prompt(
        messages=(Message(role="user", content="?"),), answer=answer, meta=meta, origin=Origin("questions.jsonl", line)
    )
    return Completion(prompt=prompt, prompt_text=prompt_text, text=text, ids=ids, finished=finished)


def length(answer: Completion):
    return len(answer.text)


def behaves(answer: Completion):
    """Whatever the text asks for."""
    text = answer.text
    if text == "raise":
        raise KeyError("no such thing")
    if text == "exit":
        sys.exit(0)
    if text == "die":
        os._exit(3)
    if text == "sleep":
        time.sleep(60)
    if text == "loop":
        while True:
            pass
    if text == "regex":
        re.fullmatch("(a+)+b", "a" * 40)  # holds the interpreter: no thread and no signal handler gets a turn
    if text == "power":
        return 9**9**9**9
    if text == "print":
        print('{"value": 1000}', flush=True)
        os.write(1, b'{"value": 1000}\n')
    if text == "input":
        return len(sys.stdin.read())
    if text == "fork":
        if child := os.fork():
            with open(answer.prompt.meta["file"], "w", encoding="utf-8") as file:
                file.write(str(child))
            os._exit(0)
        time.sleep(60)
    special = {"none": None, "nan": float("nan"), "text": "7", "list": [1.0], "true": True, "pid": os.getpid()}
    return special.get(text, 0.5)


NOT_CALLABLE = 3
FAILED = Failure("broken", "on purpose")
