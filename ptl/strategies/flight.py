"""torch's flight recorder: the last collectives of each rank, in a ring in memory, for finding the one that hangs.

Where it is kept is set by variables that torch reads when a process group is made. torch writes it itself when a
collective of NCCL times out; a process that leaves before that writes it by ``write_flight_record``.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch

PREFIX = "rank_"
"""Of the files, which torch's reader asks for: ``fr_trace FOLDER -p rank_``."""
_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")


def set_flight_recorder(folder: Path, environment: MutableMapping[str, str] | None = None) -> None:
    """Has torch keep the last collectives and write them into ``folder`` on a time-out; before a process group exists.

    What the user has set stays.

    Arguments:
        folder: made if absent.
        environment: the process's own where none is given.
    """
    environment = os.environ if environment is None else environment
    if not any(name in environment for name in _SIZE):
        environment[_SIZE[0]] = "2000"
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in environment:
        folder.mkdir(parents=True, exist_ok=True)
        environment["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = str(folder.resolve() / PREFIX)


def write_flight_record(folder: Path, rank: int) -> bool:
    """Writes this rank's last collectives: ``collectives<rank>.txt``, newest last, to read, and torch's pickle.

    torch's reader takes the pickles of NCCL; those of gloo, which it does not know, lack the names of the groups. torch
    has no public call for either; these two are what its own debugger and its time-out use.

    Returns:
        Whether there was anything to write.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    calls = torch._C._distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]
    nccl = "nccl" in torch.distributed.get_backend()
    dump = getattr(calls, "_dump_nccl_trace" if nccl else "_dump_fr_trace", None)
    if dump is None:
        return False
    record = dump()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{PREFIX}{rank}").write_bytes(record)
    lines = [_line(entry) for entry in pickle.loads(record).get("entries", [])]
    (folder / f"collectives{rank}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return True


def _line(entry: dict[str, Any]) -> str:
    """``12 gloo:all_reduce [[3]] completed trainer.py:40 in fit``: the caller outside torch."""
    frames = entry.get("frames") or []
    outside = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame["filename"]]
    at = f" {outside[0]['filename']}:{outside[0]['line']} in {outside[0]['name']}" if outside else ""
    what = [entry.get(name) for name in ("collective_seq_id", "profiling_name", "input_sizes", "state")]
    return " ".join(map(str, what)) + at
