"""Between two logs no callback of ptl's, no objective and no data module makes the host wait for the device."""

from pathlib import Path

import pytest
import torch

from ptl.callbacks.guard import Spike
from ptl.models.spec import LoRA
from tests.callbacks.real import make_inputs
from tests.callbacks.syncs import MICRO_BATCHES, Waits, count
from tests.ranks import run_ranks

FORWARD = {
    "heads.py:shifted_targets",  # how many tokens are trained is the shape of what the head computes
    "attention.py:packed_inputs",  # the documents' lengths are arguments of the attention's kernels
}
"""What the forward pass reads, once a micro-batch each, before anything of it is queued."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("case", [{}, {"lora": LoRA(rank=4)}, {"spike": Spike(least=2, window=8)}])
def test_between_logs_only_the_forward_pass_reads_anything(inputs, tmp_path, case):
    assert count(*inputs, tmp_path, **case) == {"ptl": dict.fromkeys(FORWARD, MICRO_BATCHES)}


def test_trap_scale_0_8_no_rank_waits_for_its_device_to_learn_of_a_signal(inputs, tmp_path):
    """Lightning's own broadcast does, before every micro-batch; the agreement's flags lie in the host's memory."""
    model, rows = map(str, inputs)
    args = {"model": model, "rows": rows, "run": str(tmp_path)}
    for result in run_ranks("tests.callbacks.test_syncs:on_two_ranks", 2, args, timeout=150):
        forward = dict.fromkeys(FORWARD, MICRO_BATCHES)
        for counted in result.values():  # a pass over the data draws a seed, in the host's memory too
            counted["ptl"].pop("loader.py:__iter__", None)
        assert result["with"]["ptl"].pop("agreement.py:_received") == 4
        assert result["with"] == {"ptl": forward}
        stock = {"lightning": {"training_epoch_loop.py:_broadcast_sigterm_tensor": MICRO_BATCHES}}
        assert result["without"] == {"ptl": forward, **stock}


def on_two_ranks(model: str, rows: str, run: str) -> dict:
    out = {}
    for name, preemption in (("with", True), ("without", False)):
        out[name] = count(Path(model), Path(rows), Path(run) / name, ranks=2, preemption=preemption)
    return out


def test_the_count_sees_what_waits():
    with Waits() as waits:
        value = torch.ones(3)
        value.sum().item()
        value.tolist()
        float(value[0])
        bool(value[0] > 0)
        value.cpu()
        torch.where(value > 0, value, 0.0)
    assert waits.places == {("tests", "test_syncs.py:test_the_count_sees_what_waits"): 5}
