"""``ptl data preview | audit | prepare``: see what would be trained, count it, and tokenise it ahead of a run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptl.data.render import Renderer
    from ptl.data.sources import Source

TRUNCATION = ("drop", "error", "keep_start", "drop_oldest_turns", "split")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(prog="ptl data", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    preview = commands.add_parser(
        "preview", help="show the first rows token by token, the trained ones marked", allow_abbrev=False
    )
    _add_sources(preview)
    preview.add_argument("--rows", type=int, default=3, help="rows of each source to show (default %(default)s)")

    audit = commands.add_parser("audit", help="count rows, tokens, refusals and their reasons", allow_abbrev=False)
    _add_sources(audit)
    audit.add_argument("--json", metavar="FILE", help="write the audit as JSON; - writes it to stdout, without a table")
    audit.add_argument("--num-proc", type=int, help="processes (default: the cores of this machine, at most 16)")
    audit.add_argument("--max-bad-fraction", type=float, default=1.0, help="exit with 1 above this share of bad rows")

    prepare = commands.add_parser(
        "prepare", help="tokenise into the cache what `ptl fit` with the same files would", allow_abbrev=False
    )
    prepare.add_argument("-c", "--config", action="append", required=True, help="YAML as for ptl fit; later ones win")
    prepare.epilog = "--data.KEY VALUE overrides a key, as for ptl fit"
    return top


def _add_sources(command: argparse.ArgumentParser) -> None:
    command.add_argument("sources", nargs="+", metavar="SOURCE", help="file, folder, zip://inner::outer or hub name")
    command.add_argument("--tokenizer", required=True, help="folder, .gguf file or hub name")
    command.add_argument("--template", help="packaged name, .jinja file or Jinja text (default: the tokenizer's own)")
    command.add_argument("--format", default="auto", help="format of the rows (default: told from the first rows)")
    command.add_argument("--split", default="train", help="split of hub data sets (default %(default)s)")
    command.add_argument("--column", action="append", default=[], metavar="FIELD=COLUMN", help="rename a column")
    command.add_argument("--role", action="append", default=[], metavar="NAME=ROLE", help="map a role")
    command.add_argument("--limit", type=int, help="read the first rows only")
    command.add_argument("--train-roles", default="assistant", help="roles that are trained, with commas between")
    command.add_argument("--last-turn-only", action="store_true", help="train the last turn of these roles only")
    command.add_argument("--max-length", type=int, default=2048, help="most tokens of a document (default %(default)s)")
    command.add_argument("--truncation", choices=TRUNCATION, default="drop", help="longer ones (default %(default)s)")
    command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")


def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns 0, 1 where the audit's limit is passed, or 2 after a user's mistake."""
    try:
        top = parser()
        args, args.overrides = top.parse_known_args(list(argv))
        if args.overrides and args.command != "prepare":
            top.error(f"unknown option {args.overrides[0]}")
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return {"preview": preview, "audit": audit, "prepare": prepare}[args.command](args)
    except (ValueError, OSError) as mistake:
        if os.environ.get("PTL_TRACEBACK"):
            raise
        print(f"ptl data: error: {mistake}", file=sys.stderr)
        return 2


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """``["a=b"]`` as ``{"a": "b"}``.

    Raises:
        ValueError: a value has no ``=``.
    """
    out = {}
    for value in values:
        name, separator, other = value.partition("=")
        if not separator or not name or not other:
            raise ValueError(f"{option} is {value!r}; expected NAME=VALUE")
        out[name] = other
    return out


def sources_of(args: argparse.Namespace) -> list[Source]:
    """The sources that the arguments name."""
    from ptl.data.sources import Source

    columns, roles = pairs(args.column, "--column"), pairs(args.role, "--role")
    options: dict[str, Any] = {"format": args.format, "split": args.split, "limit": args.limit}
    return [Source(path=path, columns=columns, roles=roles, **options) for path in args.sources]


def renderer_of(args: argparse.Namespace) -> Renderer:
    """The renderer that the arguments name."""
    from ptl.data.render import Renderer, RenderPolicy
    from ptl.data.tokenizer import load_tokenizer

    roles = tuple(role.strip() for role in args.train_roles.split(",") if role.strip())
    policy = RenderPolicy(train_roles=roles, last_turn_only=args.last_turn_only)
    tokenizer = load_tokenizer(args.tokenizer, template=args.template, trust_remote_code=args.trust_remote_code)
    return Renderer(tokenizer, policy=policy)


def _console(file: Any = None) -> Any:
    """A console that has no colour where NO_COLOR is set or the output is no terminal."""
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR"))
    return Console(file=file, no_color=plain, highlight=False, soft_wrap=False)


def preview(args: argparse.Namespace) -> int:
    """Shows the first rows of each source."""
    sources = sources_of(args)
    if args.rows < 1:
        raise ValueError(f"--rows is {args.rows}; expected 1 or more")
    from ptl.data.preview import headline, painted, preview_rows, segments, view_of

    renderer, console = renderer_of(args), _console()
    colour = console.color_system is not None and not console.no_color
    tokenizer, wrap = renderer.tokenizer, not console.is_terminal
    how: dict[str, Any] = {"max_length": args.max_length, "truncation": args.truncation, "rows": args.rows}
    for source in sources:
        for origin, documents, problem in preview_rows(source, view=view_of([source]), renderer=renderer, **how):
            if problem is not None:
                console.print(f"── {origin}: not trained: {problem}", style="red", markup=False, soft_wrap=wrap)
            for number, example in enumerate(documents, 1):
                title = headline(origin, example, number, len(documents))
                console.print(f"── {title}", style="bold", markup=False, soft_wrap=wrap)
                console.print(painted(segments(example, tokenizer), colour=colour), end="\n\n", soft_wrap=wrap)
    legend = "green: trained · dim: not trained · bold: special token" if colour else "⟦ ⟧: trained"
    console.print(f"{legend} · ⏎: line feed · ×n: loss weight n", markup=False, soft_wrap=wrap)
    return 0


def audit(args: argparse.Namespace) -> int:
    """Counts every row of every source."""
    sources = sources_of(args)
    from ptl.data.audit import Thresholds
    from ptl.data.prepare import audit_sources
    from ptl.data.preview import view_of

    limits = Thresholds(max_bad_fraction=args.max_bad_fraction)
    found = audit_sources(
        sources,
        view=view_of(sources),
        renderer=renderer_of(args),
        max_length=args.max_length,
        truncation=args.truncation,
        num_proc=args.num_proc,
    )
    text = json.dumps(found.as_dict(), indent=1, ensure_ascii=False)
    if args.json == "-":
        print(text)
    else:
        console = _console()
        console.print(found.table())
        for line in found.examples():
            console.print(f"  {line}", markup=False, soft_wrap=True)
        if args.json:
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    if any(source.refused_rows > limits.max_bad_fraction * source.rows for source in found.sources):
        told = f"a source has more bad rows than --max-bad-fraction {args.max_bad_fraction:g}"
        print(f"ptl data: {told}", file=sys.stderr)
        return 1
    return 0


def prepare(args: argparse.Namespace) -> int:
    """Tokenises what ``ptl fit`` with the same files would read, with its tokenizer, template and view."""
    module = data_module(args.config, args.overrides)
    module.prepare()
    console = _console()
    for name, found in module.audits.items():
        console.print(f"{name}:")
        console.print(found.table())
    return 0


def data_module(configs: Sequence[str], overrides: Sequence[str]) -> Any:
    """The data module of a run's configuration, bound to the run's model; keys other than data and model are left.

    Args:
        configs: YAML files, later ones win.
        overrides: ``--data.key value``.

    Raises:
        ValueError: a file or a key is wrong.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from ptl.data.module import ChatDataModule
    from ptl.data.views import ChatView

    if foreign := [word for word in overrides if word.startswith("-") and not word.startswith("--data.")]:
        raise ValueError(f"unknown option {foreign[0]}; expected -c FILE and --data.KEY VALUE")
    merged = layered(configs)
    data, model = _init_args(merged.get("data")), merged.get("model") or {}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(ChatDataModule, "data")
    try:
        given = parser.parse_args(["--config", json.dumps({"data": data}), *overrides])
        module = parser.instantiate(given).data
    except ArgumentError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{', '.join(configs)}: {' '.join(lines)}") from error
    policy = _init_args(model).get("policy") or {}
    module.bind(view=_view_of(model) or ChatView(), tokenizer=_init_args(policy).get("name"))
    return module


def layered(configs: Sequence[str]) -> dict[str, Any]:
    """YAML files as one mapping: mappings are merged key by key, anything else is replaced by the later file.

    Raises:
        ValueError: a file is not there, is no YAML, or is no mapping.
    """
    import yaml

    merged: dict[str, Any] = {}
    for name in configs:
        try:
            value = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"config {name}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"config {name}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(value, dict):
            raise ValueError(f"config {name}: expected a mapping with the key data")
        merged = _merge(merged, value)
    return merged


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return above
    both = {key: _merge(below[key], above[key]) for key in above if _are_mappings(below.get(key), above[key])}
    return {**below, **above, **both}


def _are_mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _init_args(value: Any) -> dict[str, Any]:
    """The arguments of a section, written plainly or beside a ``class_path``."""
    if not isinstance(value, dict):
        return {}
    return value.get("init_args") or {} if "class_path" in value else value


def _view_of(model: Any) -> Any:
    """The view of the objective that the configuration names; None where it names none."""
    import importlib

    path = model.get("class_path") if isinstance(model, dict) else None
    if path is None:
        return None
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name).view_of(_init_args(model))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model.class_path is {path!r}; expected the full path of an objective ({error})") from error
