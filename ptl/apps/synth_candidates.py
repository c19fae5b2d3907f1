"""``ptl synth candidates``: several answers of a model to each prompt, for people to rank."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptl.models.names import Found
    from ptl.synth.candidates import Written


def add_parser(commands: Any) -> None:
    """Adds the command's arguments to those of ``ptl synth``."""
    command = commands.add_parser(
        "candidates", help="sample several answers to each prompt, for people to rank", allow_abbrev=False
    )
    command.add_argument("sources", nargs="+", metavar="PROMPTS", help="file, folder, zip://inner::outer or hub name")
    command.add_argument("--model", required=True, help="run folder, model folder, adapter folder or hub name")
    command.add_argument("--out", required=True, metavar="FILE.jsonl", help="file to write, a row a prompt")
    command.add_argument("--k", type=int, default=4, help="answers to draw for a prompt (default %(default)s)")
    command.add_argument("--temperature", type=float, default=1.0, help="above 0 (default %(default)s)")
    command.add_argument("--top-p", type=float, default=1.0, help="share of the probability that is drawn from")
    command.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of what is drawn (default %(default)s)")
    command.add_argument("--batch-tokens", type=int, default=8192, help="most tokens of a batch (default %(default)s)")
    command.add_argument("--keep-unfinished", action="store_true", help="keep answers that were cut at their length")
    command.add_argument("--system", help="system message for prompts that have none")
    command.add_argument("--template", help="packaged name, .jinja file or Jinja text (default: the model's own)")
    command.add_argument("--format", default="auto", help="format of the rows (default: told from the first rows)")
    command.add_argument("--split", default="train", help="split of hub data sets (default %(default)s)")
    command.add_argument("--column", action="append", default=[], metavar="FIELD=COLUMN", help="rename a column")
    command.add_argument("--role", action="append", default=[], metavar="NAME=ROLE", help="map a role")
    command.add_argument("--limit", type=int, help="read the first rows only")
    command.epilog = (
        "A conversation is asked up to its last answer. Processes that a launcher starts (RANK, WORLD_SIZE) share the "
        "work; a command that was stopped goes on when it is run again. What is done stands in FILE.jsonl.part-*, "
        "which may be deleted once FILE.jsonl is there."
    )


def candidates(args: argparse.Namespace, rank: int, world_size: int) -> int:
    """Writes the file, or this process's share of it."""
    from dataclasses import replace

    from ptl.apps.data import sources_of
    from ptl.synth.candidates import Sampling, write_candidates

    path = Path(args.out).expanduser()
    if path.suffix != ".jsonl":
        raise ValueError(f"--out {args.out}: expected a .jsonl file")
    options = ("k", "temperature", "top_p", "max_new_tokens", "seed", "system", "keep_unfinished", "batch_tokens")
    sampling = Sampling(model="", renderer="", **{name: getattr(args, name) for name in options})
    sources = sources_of(args)

    from ptl.apps.runs import load_model, quiet_libraries
    from ptl.data.files import resolve
    from ptl.data.readers import first_rows
    from ptl.data.render import Renderer
    from ptl.data.sources import detect_format
    from ptl.data.tokenizer import load_tokenizer
    from ptl.models.names import base_spec, resolve_model
    from ptl.synth.progress import Progress

    formats = [
        detect_format(source, () if source.format != "auto" else first_rows(source, files=resolve(source)))
        for source in sources
    ]
    quiet_libraries()
    found = resolve_model(args.model)
    renderer = Renderer(load_tokenizer(found.name, template=args.template))
    digest = model_digest(found, base_spec(found))
    sampling = replace(sampling, model=digest, renderer=renderer.fingerprint())
    model = load_model(found, device=device())
    with Progress(f"{args.model} answers", "prompts", None) as progress:
        how: dict[str, Any] = {"name": args.model, "rank": rank, "world_size": world_size, "report": progress.add}
        written = write_candidates(model, sources, formats, renderer, path, sampling, **how)
    print(summary(path, written))
    if written.rows == 0:
        raise ValueError(
            f"{path} has no row: no prompt got two answers that differ; raise --max-new-tokens or --temperature, or "
            "give --keep-unfinished"
        )
    return 0


def summary(path: Path, written: Written) -> str:
    """What came of the prompts, in one line."""
    if written.rows is None:
        return f"{path} waits for other processes, or for this command to be run again; its parts are beside it"
    left_out = ", ".join(f"{n:,} {r} (first {written.first[r]})" for r, n in sorted(written.left_out.items()))
    return (
        f"{path}: {written.answers:,} answers to {written.rows:,} prompts; prompts left out: {left_out or 'none'}; "
        f"answers dropped: {_told(written.dropped)}"
    )


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())) or "none"


def model_digest(found: Found, spec: Any) -> str:
    """Digest of a model's content, and of its adapter's where it is one."""
    import hashlib

    from ptl.data.fingerprints import teacher_digest

    base = teacher_digest(spec)[0]
    if not found.adapter:
        return base
    digest = hashlib.sha256(base.encode())
    for path in sorted(Path(found.name).iterdir()):
        if path.name.startswith("adapter_"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def device() -> str:
    """Where this process's models are: its GPU where there are some."""
    import torch

    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}" if torch.cuda.is_available() else "cpu"
