"""``ptl synth teacher | student | candidates | idk | tools``: make data sets with a model, or make a student of it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.apps import synth_candidates, synth_idk, synth_tools

if TYPE_CHECKING:
    from ptl.data.module import ChatDataModule
    from ptl.models.spec import ModelSpec

KEEP = ("uniform", "first", "last", "ends", "importance")
MEASURED_TOKENS = 1 << 15
"""Tokens of ``--data`` that a teacher's layers, neurons and channels are measured on."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(prog="ptl synth", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    teacher = commands.add_parser(
        "teacher", help="write a teacher's distributions, or its answers, for the data of a recipe", allow_abbrev=False
    )
    teacher.add_argument("-c", "--config", action="append", required=True, help="YAML as for ptl fit; later ones win")
    teacher.add_argument("--out", help="folder of the cache (default: the recipe's teacher.cache)")
    teacher.add_argument("--mode", choices=("topk", "sample"), default="topk", help="the likeliest ids, or drawn ones")
    teacher.add_argument("--k", type=int, default=64, help="ids kept of a token, or draws (default %(default)s)")
    teacher.add_argument("--temperature", type=float, help="default: the recipe's divergence.temperature; of answers 0")
    teacher.add_argument("--batch-tokens", type=int, default=8192, help="most tokens of a batch (default %(default)s)")
    teacher.add_argument("--seed", type=int, default=0, help="of what is drawn (default %(default)s)")
    teacher.add_argument("--answers", metavar="FILE.jsonl", help="write the last answer of each conversation instead")
    teacher.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (default %(default)s)")
    teacher.add_argument("--keep-unfinished", action="store_true", help="keep answers that were cut at that length")
    teacher.epilog = (
        "--data.KEY VALUE overrides a key, as for ptl fit. Processes that a launcher starts (RANK, WORLD_SIZE) share "
        "the work; a command that was stopped goes on when it is run again."
    )
    student = commands.add_parser("student", help="keep some layers of a model as a student", allow_abbrev=False)
    student.add_argument("model", help="run folder, model folder or hub name")
    student.add_argument("--layers", type=int, required=True, help="layers to keep")
    student.add_argument("--keep", choices=KEEP, default="uniform", help="which (default %(default)s)")
    student.add_argument("--data", metavar="FILE", help="conversations to measure importance on, of all that is cut")
    student.add_argument("--intermediate-size", type=int, help="neurons to keep in each MLP")
    student.add_argument("--hidden-size", type=int, help="channels of the residual stream to keep")
    student.add_argument("--out", required=True, help="folder to write")
    synth_candidates.add_parser(commands)
    synth_idk.add_parsers(commands)
    synth_tools.add_parsers(commands)
    return top


def main(argv: Sequence[str]) -> int:
    """The command; returns 0, or 2 after one line on stderr."""
    try:
        top = parser()
        args, args.overrides = top.parse_known_args(list(argv))
        if args.overrides and args.command != "teacher":
            top.error(f"unknown option {args.overrides[0]}")
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        shared = {
            "candidates": synth_candidates.candidates,
            "idk": synth_idk.idk,
            "idk-report": synth_idk.idk_report,
            "tools": synth_tools.tools,
            "tools-report": synth_tools.tools_report,
        }
        if args.command in shared:
            return shared[args.command](args, *_rank())
        return {"teacher": teacher, "student": student}[args.command](args)
    except (ValueError, OSError) as mistake:
        if os.environ.get("PTL_TRACEBACK"):
            raise
        print(f"ptl synth: error: {mistake}", file=sys.stderr)
        return 2


# ---- teacher ----


def teacher(args: argparse.Namespace) -> int:
    """Writes the cache, or the answers, for exactly what ``ptl fit`` with the same files would train on."""
    from ptl.apps.data import data_module, layered
    from ptl.apps.runs import quiet_libraries
    from ptl.synth.recipe import recipe_of

    for option, value, least in (("--seed", args.seed, 0), ("--batch-tokens", args.batch_tokens, 1)):
        if value < least:
            raise ValueError(f"{option} must be {least} or more, got {value}")
    recipe = recipe_of(layered(args.config))
    quiet_libraries()
    module = data_module(args.config, args.overrides)
    if args.answers:
        return _answers(args, module, recipe.teacher)
    out = args.out or recipe.cache
    if not out:
        raise ValueError("where to? give --out FOLDER, or set model.init_args.teacher.cache")
    temperature = recipe.temperature if args.temperature is None else args.temperature
    return _cache(args, module, recipe.teacher, Path(out), temperature)


def _cache(args: argparse.Namespace, module: ChatDataModule, spec: ModelSpec, out: Path, temperature: float) -> int:
    from ptl.data.contents import contents
    from ptl.data.fingerprints import teacher_digest, template_digest
    from ptl.data.teacher_plan import CachePlan
    from ptl.data.teacher_writer import CacheWriter
    from ptl.models.vocabulary import vocabulary_fingerprint
    from ptl.synth.progress import Progress
    from ptl.synth.teacher import Reading, write_shard

    rank, world_size = _rank()
    vocab = _vocabulary(module, spec)
    digest, stamps = teacher_digest(spec)
    parts = {name: module.prepared_rows(name) for name in ("train", *(["val"] if module.val_sources else []))}
    plans = {
        name: CachePlan(
            mode=args.mode,
            k=min(args.k, vocab) if args.mode == "topk" else args.k,
            temperature=temperature,
            teacher=digest,
            teacher_name=spec.name,
            tokenizer=vocabulary_fingerprint(module.renderer.tokenizer),
            template=template_digest(module.renderer),
            vocab=vocab,
            data=contents(prepared).hash,
            seed=args.seed if args.mode == "sample" else 0,
        )
        for name, prepared in parts.items()
    }
    readings: dict[str, Any] = {"batch_tokens": args.batch_tokens, "layout": module.layout}
    model: Any = None
    for name, prepared in parts.items():
        writer = CacheWriter(out, plans[name], contents(prepared))
        todo = writer.missing(rank, world_size)
        if todo and model is None:
            model = _load(spec)
        reading = Reading(model=model, prepared=prepared, **readings) if todo else None
        if reading is not None and rank == 0:
            _show_quality(reading, writer, name)
        total = int(writer.rows.offsets[-1])
        with Progress(f"{name}: {spec.name} reads", "tokens", total // world_size) as progress:
            for index in todo:
                begin, end = writer.span(index)
                write_shard(reading, writer, index)  # pyright: ignore[reportArgumentType]
                progress.add(int(writer.rows.offsets[end] - writer.rows.offsets[begin]))
        _report(name, writer, writer.seal(stamps))
    return 0


def _show_quality(reading: Any, writer: Any, name: str) -> None:
    """Bytes against loss, before hours go into a k that was badly chosen."""
    from ptl.synth.quality import measure

    plan = writer.plan
    quality = measure(reading, vocab=plan.vocab, temperature=plan.temperature, k=plan.k)
    quality.save(writer.folder)
    print(f"{name}: what is lost by keeping a part (also in {writer.folder}/quality.md)\n\n{quality.markdown()}")


def _report(name: str, writer: Any, manifest: dict[str, Any] | None) -> None:
    if manifest is None:
        print(f"{name}: {len(writer.missing())} of {len(writer)} shards are left to other processes")
        return
    size, tokens = manifest["bytes"], manifest["tokens"]
    print(
        f"{name}: wrote {writer.folder}: {manifest['rows']:,} rows, {tokens:,} tokens, {size / 1e6:,.1f} MB, "
        f"{size / max(1, tokens):.0f} bytes/token"
    )
    if manifest["skipped"]:
        print(f"{name}: the teacher gave NaN for {manifest['skipped']:,} of {tokens:,} tokens; they have weight 0")


def _vocabulary(module: ChatDataModule, spec: ModelSpec) -> int:
    """Ids that the teacher shares with the data's tokenizer, by their strings."""
    from ptl.data.tokenizer import load_tokenizer
    from ptl.models.vocabulary import compare_vocabularies

    own = load_tokenizer(spec.name, trust_remote_code=spec.trust_remote_code)
    shared = compare_vocabularies(module.renderer.tokenizer, own)
    for note in shared.notes:
        print(f"ptl synth: {note}", file=sys.stderr)
    return shared.size


def _load(spec: ModelSpec) -> Any:
    """The teacher on its device, in eval mode and frozen."""
    import torch

    from ptl.models.teachers import build_teacher

    model: Any = build_teacher(spec)
    if torch.cuda.is_available() and spec.quantize is None:
        model = model.to(f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}")
    return model


def _rank() -> tuple[int, int]:
    """This process's number and how many there are, as launchers set them."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return (rank, world_size) if 0 <= rank < world_size else (0, 1)


def _answers(args: argparse.Namespace, module: ChatDataModule, spec: ModelSpec) -> int:
    """Sequence-level distillation: a file of conversations that the teacher has answered."""
    from ptl.data.files import resolve
    from ptl.data.fingerprints import teacher_digest
    from ptl.data.prepare import encoder_of
    from ptl.synth.answers import Writing, write_answers
    from ptl.synth.progress import Progress

    if not args.answers.endswith(".jsonl"):
        raise ValueError(f"--answers {args.answers}: expected a .jsonl file")
    _vocabulary(module, spec)
    writing = Writing(
        teacher=teacher_digest(spec)[0],
        renderer=module.renderer.fingerprint(),
        temperature=args.temperature or 0.0,
        max_new_tokens=args.max_new_tokens,
        batch_tokens=args.batch_tokens,
        seed=args.seed,
        keep_unfinished=args.keep_unfinished,
    )
    sources = module.train_sources
    files = [resolve(source) for source in sources]
    cut: dict[str, Any] = {"max_length": module.max_length, "truncation": module.truncation}
    encoder = encoder_of(sources, files, view=module.view, renderer=module.renderer, **cut)
    with Progress(f"{spec.name} answers", "conversations", None) as progress:
        path = Path(args.answers).expanduser()
        rank, world_size = _rank()
        how: dict[str, Any] = {"rank": rank, "world_size": world_size, "report": progress.add}
        rows, left_out = write_answers(_load(spec), encoder, path, writing, **how)
    if rows is None:
        print(f"{path} waits for other processes, or for this command to be run again; its parts are beside it")
        return 0
    print(f"{path}: {rows:,} answers; left out: {left_out.told() or 'none'}")
    return 0


# ---- student ----


def student(args: argparse.Namespace) -> int:
    """Writes a student as a plain Hugging Face folder, ready to be a run's ``policy.name``."""
    from ptl.apps.runs import quiet_libraries
    from ptl.data.render import Renderer
    from ptl.data.tokenizer import load_tokenizer
    from ptl.models.build import load_base
    from ptl.models.export import export
    from ptl.models.importance import choose_layers, layer_importance
    from ptl.models.names import base_spec, resolve_model
    from ptl.models.spec import Shrink
    from ptl.models.students import kept_layers, make_student

    if args.keep == "importance" and not args.data:
        raise ValueError("--keep importance is measured: give --data FILE")
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: give another folder")
    quiet_libraries()
    found = resolve_model(args.model)
    if found.adapter:
        raise ValueError(f"{args.model} is an adapter: merge it first with `ptl export {args.model} --out FOLDER`")
    model: Any = load_base(base_spec(found)).eval()
    depth, before = model.config.get_text_config().num_hidden_layers, _parameters(model)
    batches = _measured(found.name, args.data, model) if args.data else None
    layers: Any = args.layers
    if args.keep == "importance":
        scores = layer_importance(model, batches or ())
        layers = choose_layers(scores, args.layers)
        print("importance of layers: " + " ".join(f"{i}:{score:.3f}" for i, score in enumerate(scores)))
    keep: Any = "uniform" if args.keep == "importance" else args.keep
    shrink = Shrink(layers=layers, keep=keep, intermediate_size=args.intermediate_size, hidden_size=args.hidden_size)
    kept = kept_layers(shrink, depth)
    model = make_student(model, shrink, batches=batches if shrink.narrows else None)
    tokenizer = load_tokenizer(found.name)
    ends = Renderer(tokenizer).terminators if tokenizer.chat_template else ()
    export(model, tokenizer, out, generation_eos=ends)
    after = _parameters(model)
    print(f"wrote {out}: layers {kept} of {depth}, {after:,} of {before:,} parameters ({after / before:.0%})")
    return 0


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _measured(tokenizer: str, data: str, model: Any) -> list[Any]:
    """Batches of the first rows of a file, on the CPU."""
    from ptl.data.module import ChatDataModule
    from ptl.data.sources import Source
    from ptl.synth.teacher import Reading

    module = ChatDataModule([Source(path=data)], tokenizer=tokenizer, truncation="keep_start")
    prepared = module.prepared_rows("train")
    end = 1 + int((prepared.lengths.cumsum() < MEASURED_TOKENS).sum())
    reading = Reading(model=model, prepared=prepared, layout="padded")
    return [batch for batch, _ in reading.batches(0, min(end, len(prepared.rows)))]
