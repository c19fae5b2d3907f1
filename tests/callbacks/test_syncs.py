"""Between two logs no callback of ptl's, no objective and no data module makes the host wait for the device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptl.callbacks.guard import Spike
from ptl.data.batches import collate_tokens
from ptl.data.groups import collate_groups
from ptl.models.attention import NAME as PACKED
from ptl.models.heads import hidden_states, lm_loss
from ptl.models.spec import LoRA, ModelSpec
from ptl.models.teachers import Teacher
from ptl.objectives.distillation import Distillation
from tests import tiny
from tests.callbacks.real import chat, make_inputs, sft
from tests.callbacks.syncs import MICRO_BATCHES, Waits, count
from tests.models import zoo
from tests.ranks import run_ranks
from tests.synth import parts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("case", [{}, {"lora": LoRA(rank=4)}, {"spike": Spike(least=2, window=8)}])
def test_between_logs_nothing_is_read(inputs, tmp_path, case):
    module = sft(inputs[0], lora=case.get("lora"))
    assert count(module, chat(*inputs, micro_batch_size=1), tmp_path, spike=case.get("spike")) == {}


@pytest.fixture(scope="module")
def taught(inputs, tmp_path_factory):
    """A teacher with caches of it in both modes, and another of another tokenizer."""
    folder = tmp_path_factory.mktemp("taught")
    others = tiny.make_tokenizer(special=("<pad>", "<|im_end|>", "<|im_start|>"))
    for name, tokenizer in (("teacher", tiny.make_tokenizer()), ("other", others)):
        tiny.save_folder(folder / name, tokenizer, layers=2, hidden=64)
    data = chat(*inputs)
    data.bind(view=sft(inputs[0]).view, tokenizer=None)
    for mode in ("topk", "sample"):
        parts.write(folder, folder / mode, data=data, mode=mode, temperature=1.0)
    return folder


TEACHERS: dict[str, dict[str, Any]] = {
    "live": {"teacher": "teacher"},
    "topk": {"cache": "topk"},
    "sample": {"cache": "sample"},
    "uld": {"teacher": "other", "cross_tokenizer": "uld"},
    "hybrid": {"teacher": "other", "cross_tokenizer": "hybrid", "ce": 0.5},
}


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "packed") for name in TEACHERS), ("topk", "padded"), ("hybrid", "padded")]
)
def test_between_logs_no_teacher_reads_the_batch(inputs, taught, tmp_path, name, layout):
    options = dict(TEACHERS[name])
    named, cache = options.pop("teacher", None), options.pop("cache", None)
    spec = None if named is None else ModelSpec(name=str(taught / named))
    teacher = Teacher(model=spec, cache=None if cache is None else str(taught / cache))
    module = Distillation(ModelSpec(name=str(inputs[0])), teacher, **options)
    reads = count(module, chat(*inputs, micro_batch_size=1, layout=layout), tmp_path).get("ptl", {})
    reads.pop("fused_divergence.py:_dense_rows", None)  # looks at a CPU's numbers alone
    assert reads == {}


def test_trap_scale_0_8_no_rank_waits_for_its_device_to_learn_of_a_signal(inputs, tmp_path):
    """Lightning's own broadcast does, before every micro-batch; the agreement's flags lie in the host's memory."""
    model, rows = map(str, inputs)
    args = {"model": model, "rows": rows, "run": str(tmp_path)}
    for result in run_ranks("tests.callbacks.test_syncs:on_two_ranks", 2, args, timeout=150):
        for counted in result.values():  # a pass over the data draws a seed, in the host's memory too
            counted.get("ptl", {}).pop("loader.py:__iter__", None)
        assert result["with"] == {"ptl": {"agreement.py:_received": 4}}
        stock = {"lightning": {"training_epoch_loop.py:_broadcast_sigterm_tensor": MICRO_BATCHES}}
        assert {who: places for who, places in result["without"].items() if places} == stock


def on_two_ranks(model: str, rows: str, run: str) -> dict:
    out = {}
    for name, preemption in (("with", True), ("without", False)):
        data = chat(Path(model), Path(rows), micro_batch_size=1)
        out[name] = count(sft(Path(model)), data, Path(run) / name, ranks=2, preemption=preemption)
    return out


FIRST = {"ids": np.arange(3, 9), "spans": [2, 6], "span_weights": [1.0], "source": 0}
SECOND = {"ids": np.arange(9, 13), "spans": [1, 2, 3, 4], "span_weights": [0.5, 1.0], "source": 0}
RANKED = {
    "ids": np.arange(3, 13),
    "prefix": 4,
    "suffixes": np.array([2, 3, 1]),
    "spans": [4, 10],
    "span_weights": [1.0],
}
RANKED |= {"ranks": [1.0, 2.0, 3.0], "scores": [np.nan] * 3, "weight": 1.0, "source": 0}


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_forward_pass_of_collated_documents_reads_nothing(attention, layout):
    model = zoo.make("llama_tied", attention)
    batch = collate_tokens([FIRST, SECOND], layout=layout, pad_id=0, window_weight=1.0)
    with Waits() as waits:
        lm_loss(model, batch, metrics=True).fused.total.backward()
    assert waits.of("ptl") == {}
    with Waits() as waits:  # of a batch whose maker does not know, both are read
        lm_loss(model, batch._replace(trained=None, host_trained=None, host_lengths=None))
    reads = {"heads.py:shifted_targets": 1, "attention.py:packed_inputs": 1}
    packs = attention == PACKED and layout == "packed"
    assert waits.of("ptl") == {place: n for place, n in reads.items() if packs or place.startswith("heads")}


@pytest.mark.parametrize("share", [True, False])
def test_a_forward_pass_of_collated_answers_reads_nothing(share):
    batch = collate_groups([RANKED] * 2, layout="packed", pad_id=0, window_weight=2.0, share_prompt=share)
    assert (batch.parents is not None) == share
    with Waits() as waits:
        hidden_states(zoo.make("llama_tied", PACKED), batch.tokens, parents=batch.parents).sum().backward()
    assert waits.of("ptl") == {}


def test_the_count_sees_what_waits():
    with Waits() as waits:
        value = torch.ones(3)
        value.sum().item()
        value.tolist()
        float(value[0])
        bool(value[0] > 0)
        value.cpu()
        torch.where(value > 0, value, 0.0)
        value[value > 0]
        torch.repeat_interleave(value, value.long())
        torch.repeat_interleave(value, value.long(), output_size=3)
    assert waits.places == {("tests", "test_syncs.py:test_the_count_sees_what_waits"): 7}
