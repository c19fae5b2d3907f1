"""Fixtures: tiny models and tokenizers made in process, with no network.

The environment is set before torch is imported: one thread a process, offline hubs, DeepSpeed on the CPU.
"""

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from tests import forks, tiny
from tests.ranks import EXTENSIONS

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
forks.share()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that of two processes none is left alone with them: clusters, then ranks."""

    def length(item: pytest.Item) -> int:
        if "slurm" in item.path.parts:
            return 0
        return 1 if hasattr(getattr(item, "module", None), "run_ranks") else 2

    items.sort(key=length)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays: no collection of garbage looks through it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with ChatML tokens, ``<|im_end|>`` as EOS and PAD, and the ChatML template."""
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A tiny tied Llama with its tokenizer, saved as a plain Hugging Face folder."""
    return tiny.save_folder(tmp_path_factory.mktemp("tiny-model"), tokenizer)
