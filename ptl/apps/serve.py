"""``ptl serve``: a model behind OpenAI's chat completions on this machine, with a page to talk to it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ptl.apps.reply import ModelWriter, Writer, check_sampling
from ptl.tools.load import load_tools
from ptl.tools.loop import ROUNDS
from ptl.tools.toolbox import Toolbox

if TYPE_CHECKING:
    from ptl.models.names import Found

NEEDED = "the server needs starlette and uvicorn: pip install 'ptl[rank]'"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(prog="ptl serve", description=__doc__, allow_abbrev=False)
    top.add_argument("model", help="run folder, model folder, adapter folder or hub name")
    top.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    top.add_argument("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    top.add_argument("--name", help="of the model, for clients (default: as given)")
    top.add_argument("--template", help="chat template: a packaged name, a .jinja file or Jinja text")
    top.add_argument("--tools", nargs="+", default=[], metavar="TOOL", help="as for ptl chat; the server runs them")
    top.add_argument("--tool-seconds", type=float, default=20.0, help="most time of a call (default %(default)s)")
    top.add_argument("--tool-rounds", type=int, default=ROUNDS, help="most turns that call tools for an answer")
    top.add_argument("--temperature", type=float, default=0.7, help="where a client says none (default %(default)s)")
    top.add_argument("--top-p", type=float, default=0.95, help="where a client says none (default %(default)s)")
    top.add_argument("--max-new-tokens", type=int, default=512, help="where a client says none (default %(default)s)")
    top.add_argument(
        "--engine",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        help="auto: vllm where it is installed and the model is a plain folder, else transformers",
    )
    top.add_argument("--dtype", choices=("auto", "bf16", "fp32", "fp16"), default="auto")
    top.epilog = (
        "One request is answered at a time: this is for a look, and for clients in development. For many at once serve "
        "an export with vLLM. On an address that other machines reach, clients need the token that is printed."
    )
    return top


def main(argv: Sequence[str]) -> int:
    """The command; returns 0, or 2 after one line on stderr."""
    try:
        args = parser().parse_args(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return serve(args)
    except (ValueError, OSError) as mistake:
        print(f"ptl serve: error: {mistake}", file=sys.stderr)
        return 2


def serve(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C."""
    check_sampling(args.temperature, args.top_p, args.max_new_tokens)
    if args.tool_rounds < 1:
        raise ValueError(f"--tool-rounds must be 1 or more, got {args.tool_rounds}")
    try:
        import uvicorn  # noqa: F401  what ``run`` needs

        from ptl.apps.guard import entrance, listen, run
        from ptl.apps.serving.app import build_app
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] == "ptl":
            raise
        raise ValueError(f"{NEEDED} ({missing.name} is missing)") from None
    from ptl.apps.runs import quiet_libraries
    from ptl.apps.serving.desk import Desk
    from ptl.data.render import Renderer
    from ptl.data.tokenizer import load_tokenizer
    from ptl.models.names import resolve_model

    quiet_libraries()
    found = resolve_model(args.model)
    box = Toolbox(load_tools(args.tools), seconds=args.tool_seconds)
    listener = listen(args.host, args.port)
    writer: Writer | None = None
    try:
        writer = _writer(found, args)
        renderer = Renderer(load_tokenizer(found.name, template=args.template))
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens}
        desk = Desk(writer, renderer, box, sampling, args.tool_rounds)
        door, url = entrance(args.host, listener, "serve")
        app = build_app(desk, args.name or args.model, door)
        with contextlib.suppress(KeyboardInterrupt):
            run(app, listener, lambda: _tell(url))
    finally:
        listener.close()
        box.close()
        if writer is not None:
            writer.close()
    return 0


def _tell(url: str) -> None:
    base, _, query = url.partition("?")
    print(f"OpenAI's API: base_url {base}v1{', api_key ' + query.removeprefix('token=') if query else ''}")
    print(f"open {url}   (Ctrl-C stops)", flush=True)


def _writer(found: Found, args: argparse.Namespace) -> Writer:
    plain = found.adapter is None and Path(found.name).is_dir()
    if args.engine == "vllm" and not plain:
        raise ValueError(
            f"--engine vllm serves a plain folder, and {args.model} is none: write one with ptl export {args.model} "
            "--out FOLDER, or leave --engine out"
        )
    if args.engine == "vllm" or (args.engine == "auto" and plain and find_spec("vllm")):
        from ptl.rollout.vllm import VLLMWriter

        return VLLMWriter(Path(found.name), dtype=None if args.dtype == "auto" else args.dtype)
    from ptl.apps.runs import load_model

    return ModelWriter(load_model(found, dtype=args.dtype, device="auto"))
