"""``ptl tokens add``: a base model with more tokens, as a plain Hugging Face folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ptl.types import Conversation, Message, Origin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ptl.data.render import Renderer
    from ptl.data.token_sets import NewToken, PlacedToken
    from ptl.models.new_tokens import NewRow

FILE = "ptl_tokens.json"
"""In the folder that is written: the tokens, their ids, and how each row was first set."""


def add(options: argparse.Namespace) -> int:
    """Runs the command; raises ValueError for a user's mistake."""
    wanted = wanted_tokens(options.set, options.token, options.tag, options.describe)
    _check_numbers(options)
    from ptl.apps.runs import quiet_libraries
    from ptl.data.render import Renderer, stop_token_ids
    from ptl.data.reward_models import is_reward_model
    from ptl.data.token_sets import TEMPLATES, place_tokens, with_tokens
    from ptl.data.tokenizer import load_tokenizer, resolve_template
    from ptl.models.build import load_base
    from ptl.models.export import export
    from ptl.models.names import base_spec, resolve_model
    from ptl.models.new_tokens import add_rows

    quiet_libraries()
    found = resolve_model(options.model)
    if found.adapter:
        raise ValueError(f"{options.model} is an adapter: merge it first (ptl export {options.model} --out FOLDER)")
    if is_reward_model(found):
        raise ValueError(f"{options.model} gives scores, not tokens: add tokens to the language model it is made of")
    old = load_tokenizer(found.name)
    template = options.template or next((TEMPLATES[name] for name in options.set if name in TEMPLATES), None)
    placed = place_tokens(old, wanted)
    tokenizer = with_tokens(old, placed)
    if template is not None:
        tokenizer.chat_template = resolve_template(template)
    renderer = Renderer(tokenizer)
    stream = dialogue(renderer, placed) if tokenizer.chat_template else None
    rows = [_row(each, old, options) for each in placed if each.state != "kept"]
    model: Any = load_base(base_spec(found))
    before = model.get_input_embeddings().weight.shape[0]
    add_rows(
        model,
        rows,
        list(old.get_vocab().values()),
        noise=options.noise,
        seed=options.seed,
        multiple=options.multiple,
    )
    facts = [_facts(each, rows, options) for each in placed]
    export(
        model,
        tokenizer,
        options.out,
        generation_eos=stop_token_ids(renderer),
        files={FILE: json.dumps(facts, indent=2, ensure_ascii=False) + "\n"},
    )
    if options.show:
        _show(facts, stream)
    kept = [each.token.text for each in placed if each.state == "kept"]
    new = [each for each in placed if each.state == "new"]
    reserved = len(placed) - len(kept) - len(new)
    note = f"; {', '.join(kept)} {'was' if len(kept) == 1 else 'were'} there already" if kept else ""
    extra = f" and {reserved} reserved" if reserved else ""
    size = model.get_input_embeddings().weight.shape[0]
    grown = f"{before:,} rows" if size == before else f"{before:,} rows became {size:,}"
    print(f"wrote {options.out}: {len(new)} new token{'s' * (len(new) != 1)}{extra}, {grown}{note}")
    if new:
        print(f"to train these rows alone: --model.policy.adapter.train_tokens '{json.dumps([t.id for t in new])}'")
    return 0


def wanted_tokens(
    sets: Sequence[str], special: Sequence[str], tags: Sequence[str], about: Sequence[str] = ()
) -> list[NewToken]:
    """The tokens that the options ask for; ``TOKEN=ID`` of one in a set gives it its id.

    Raises:
        ValueError: none, an id that is no number, or a description of a token that is not asked for.
    """
    from ptl.data.token_sets import SETS, NewToken

    wanted = {token.text: token for name in dict.fromkeys(sets) for token in SETS[name]}
    for given, is_special in (*((each, True) for each in special), *((each, False) for each in tags)):
        text, equals, number = given.rpartition("=")
        if not equals or not number.removeprefix("-").isdigit():
            text, number = given, ""
        token = wanted.get(text, NewToken(text, is_special))
        wanted[text] = replace(token, id=int(number) if number else token.id)
        if number and int(number) < 0:
            raise ValueError(f"--token {given}: an id is 0 or more")
    if not wanted:
        raise ValueError("no token is given: name a ready set (--set chat think tools), or give --token or --tag")
    for each in about:
        text, _, words = each.partition("=") if "=" in each else (each, "", "")
        if text not in wanted or not words.strip():
            raise ValueError(f"--describe {each!r}: expected TOKEN=TEXT of a token among {', '.join(wanted)}")
        wanted[text] = replace(wanted[text], about=words.strip())
    return list(wanted.values())


def _check_numbers(options: argparse.Namespace) -> None:
    if not 0 <= options.noise < float("inf"):
        raise ValueError(f"--noise must be 0 or more, got {options.noise}")
    if options.multiple < 1:
        raise ValueError(f"--multiple must be 1 or more, got {options.multiple}")


def _described(each: PlacedToken, options: argparse.Namespace) -> bool:
    named = {given.partition("=")[0] for given in options.describe}
    return each.state == "new" and (options.init == "description" or each.token.text in named)


def _row(each: PlacedToken, old: PreTrainedTokenizerFast, options: argparse.Namespace) -> NewRow:
    from ptl.models.new_tokens import NewRow

    if not _described(each, options):
        return NewRow(each.id, each.token.text)
    if not each.token.about:
        raise ValueError(
            f"--init description: {each.token.text!r} has none: give --describe '{each.token.text}=WHAT IT STANDS FOR'"
        )
    return NewRow(each.id, each.token.text, tuple(old(each.token.about, add_special_tokens=False)["input_ids"]))


def _facts(each: PlacedToken, rows: Sequence[NewRow], options: argparse.Namespace) -> dict[str, Any]:
    like = next((row.like for row in rows if row.id == each.id), ())
    start = f"mean of {each.token.about!r}" if like else "mean of all"
    how = "its row is as it was" if each.state == "kept" else f"{start}, noise {options.noise:g}"
    kind = "special" if each.token.special else "tag"
    return {"id": each.id, "token": each.token.text, "kind": kind, "state": each.state, "row": how}


# ---- a dialogue to look at ----


def dialogue(renderer: Renderer, placed: Sequence[PlacedToken]) -> list[tuple[int, str, bool]]:
    """A small dialogue as (id, text, whether it is trained); in it a user types a mark.

    Raises:
        ValueError: the template cannot print it, or a new token is not one token in the assistant's turn, or is one
            where the user typed it.
    """
    marks = [each.token.text for each in placed if each.state != "reserved"]
    tags = [each.token.text for each in placed if not each.token.special]
    said = "".join(tag if tag.startswith("</") else f"{tag}2+2" for tag in tags) + "The answer is 4"
    ids, _ = _rendered(renderer, f"what is 2+2 ? {' '.join(marks)}", said)
    plain, _ = _rendered(renderer, "what is 2+2 ?", said)
    for each in placed:
        if not each.token.special and plain.count(each.id) < said.count(each.token.text):
            raise ValueError(f"{each.token.text!r} is not one token in the assistant's turn")
        if ids.count(each.id) != plain.count(each.id):
            raise ValueError(f"{each.token.text!r} is a mark where a user types it")
    ids, trained = _rendered(renderer, f"what is 2+2 ? {marks[0]}", said)
    return [(number, str(renderer.tokenizer.decode([number])), mark) for number, mark in zip(ids, trained)]


def _rendered(renderer: Renderer, question: str, answer: str) -> tuple[list[int], list[bool]]:
    messages = (Message(role="user", content=question), Message(role="assistant", content=answer))
    (tokens,) = renderer.render(Conversation(messages=messages, origin=Origin("a small dialogue", 1)))
    return tokens.ids.tolist(), (tokens.loss_mask > 0).tolist()


def _show(facts: Sequence[dict[str, Any]], stream: list[tuple[int, str, bool]] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("id", "token", "kind", "", "row")
    shown = [each for each in facts if each["state"] != "reserved"]
    for each in shown:
        table.add_row(*(str(each[key]).replace("[", r"\[") for key in ("id", "token", "kind", "state", "row")))
    console.print(table)
    if len(shown) < len(facts):
        console.print(f"and {len(facts) - len(shown)} reserved tokens between them", highlight=False)
    if stream is None:
        console.print("no chat template: give --template to see a dialogue", highlight=False)
        return
    console.print("a dialogue, as id and text; * is trained", highlight=False)
    for number, text, trained in stream:
        console.print(f"{number:>8} {'*' if trained else ' '} {text!r}", markup=False, highlight=False)
