"""safetensors files read through the page cache, row by row, and files that are whole or absent."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ptl.data.durable import replacing

_DTYPES = {
    **{"U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "F16": np.float16},
    **{"U32": np.uint32, "I32": np.int32, "F32": np.float32, "U64": np.uint64, "I64": np.int64, "F64": np.float64},
}


def mapped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file as views of one memory map, and its metadata. No descriptor stays open.

    The library's own reader copies what it reads; this one leaves rows on disk until they are indexed.

    Raises:
        ValueError: it is no whole safetensors file.
    """
    try:
        raw = np.memmap(path, np.uint8, mode="r")
        begin = 8 + int(raw[:8].view("<u8")[0])
        header = json.loads(raw[8:begin].tobytes())
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                data = raw[begin + start : begin + end]
                tensors[name] = np.asarray(data.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): delete it and make it again") from error
    return tensors, header.get("__metadata__", {})


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Gives a name of its own beside ``path``; what is written there becomes ``path`` at the end, at once.

    Several processes that publish the same content at the same time do no harm. A killed one leaves its partial file.
    """
    with replacing(path, writer=f"-{uuid.uuid4().hex[:8]}") as partial:
        yield partial
