"""Steps that would break the weights are left out on all ranks; where there are none, nothing changes by a bit."""

import socket

import pytest
import torch

from ptl.callbacks.guard import Spike
from ptl.callbacks.health import DivergedError, Health
from ptl.callbacks.jsonl import read_metrics, read_rows
from ptl.callbacks.stragglers import Pace, Stragglers, over_median
from tests.callbacks.guard_parts import REWOUND, SPIKED, Kinds, Poison, numbered
from tests.callbacks.parts import loader, trainer
from tests.callbacks.real import make_inputs
from tests.ranks import run_ranks

KINDS = ("fused", "adamw", "sgd")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    model, data = make_inputs(folder / "inputs")
    args = {"folder": str(folder), "model": str(model), "data": str(data)}
    return run_ranks("tests.callbacks.guard_parts:guarded", 2, args, timeout=400)


def state_after(folder, kind, batches, *, steps, callbacks, **options):
    """Weights and moments after a fit."""
    torch.manual_seed(0)
    module = Kinds(kind)
    fit = trainer(folder, callbacks, max_steps=steps, **options)
    fit.fit(module, loader(batches))
    optimizer = fit.optimizers[0].state_dict()["state"]
    return [*module.state_dict().values(), *(value for state in optimizer.values() for value in state.values())], fit


def same(one, other) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


# ---- one process ----


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sound_is_trained_bit_by_bit_as_without_the_guard(tmp_path, kind):
    options = {"steps": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    plain, _ = state_after(tmp_path / "a", kind, numbered(8), callbacks=[], **options)
    health = Health(every_n_steps=3, spike=Spike(least=2, window=4))
    watched, fit = state_after(tmp_path / "b", kind, numbered(8), callbacks=[health], **options)
    assert len(plain) > 20 and same(plain, watched)
    assert not hasattr(fit.optimizers[0], "found_inf")
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab")
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for rows in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_left_out_is_as_if_its_data_were_not_there(tmp_path, kind, accumulate):
    """Neither decay nor momentum move what a step without a gradient would still move."""
    batches = numbered(6 * accumulate)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    callbacks = [Health(every_n_steps=4), Poison([3])]
    left_out, fit = state_after(tmp_path / "a", kind, batches, steps=6, callbacks=callbacks, **options)
    sound = batches[: 2 * accumulate] + batches[3 * accumulate :]
    without, _ = state_after(tmp_path / "b", kind, sound, steps=5, callbacks=[], **options)
    assert fit.global_step == 6 and same(left_out, without)
    [noted] = read_rows(tmp_path / "a" / "skipped.jsonl")
    rows = [n for batch in batches[2 * accumulate : 3 * accumulate] for n in batch.rows.tolist()]
    assert (noted["step"], noted["grad_norm"], noted["rows"]) == (3, None, [rows])
    logged = [row for row in read_metrics(tmp_path / "a" / "metrics.jsonl") if "health/skipped_steps" in row]
    assert [(row["step"], row["health/skipped_steps"]) for row in logged] == [(3, 1.0)]


def test_a_gradient_that_spikes_is_left_out_and_the_next_is_not(tmp_path):
    callbacks = [Health(every_n_steps=5, spike=Spike(least=6, window=16)), Poison([10], factor=1000.0)]
    spiked, _ = state_after(tmp_path / "a", "fused", numbered(12), steps=12, callbacks=callbacks)
    batches = numbered(12)
    without, _ = state_after(tmp_path / "b", "fused", batches[:9] + batches[10:], steps=11, callbacks=[])
    assert same(spiked, without)
    [noted] = read_rows(tmp_path / "a" / "skipped.jsonl")
    assert (noted["step"], noted["reason"], noted["rows"]) == (10, "spike", [[18, 19]]) and noted["grad_norm"] > 100


def test_without_the_setting_a_spike_is_trained_on(tmp_path):
    callbacks = [Health(), Poison([10], factor=1000.0)]
    state_after(tmp_path, "fused", numbered(12), steps=12, callbacks=callbacks)
    assert not (tmp_path / "skipped.jsonl").exists()


def test_steps_in_a_row_are_counted_across_looks_and_single_ones_forgotten(tmp_path):
    callbacks = [Health(every_n_steps=2, max_skipped_in_a_row=3, max_rewinds=0), Poison([1, 3, 5, 6, 7])]
    with pytest.raises(DivergedError, match=r"since optimizer step 5 \(seen at step 8; 3 steps in a row"):
        state_after(tmp_path, "fused", numbered(12), steps=12, callbacks=callbacks)
    assert [row["step"] for row in read_rows(tmp_path / "skipped.jsonl")] == [1, 3, 5, 6, 7]


def test_bad_arguments():
    for options, key in (
        ({"max_skipped_in_a_row": 0}, "health.max_skipped_in_a_row"),
        ({"max_rewinds": -1}, "health.max_rewinds"),
    ):
        with pytest.raises(ValueError, match=key):
            Health(**options)
    for options in ({"every_n_steps": 0}, {"windows": 0}, {"ratio": 1.0}):
        with pytest.raises(ValueError, match="stragglers"):
            Stragglers(**options)
    for options, key in (({"deviations": 0}, "health.spike.deviations"), ({"least": 200}, "health.spike.least")):
        with pytest.raises(ValueError, match=key):
            Spike(**options)


# ---- two ranks ----


def test_law_7_one_ranks_bad_loss_is_left_out_by_both(guarded):
    for result in guarded:
        ddp = result["ddp"]
        assert ddp["with"] == ddp["without"] and (ddp["with step"], ddp["without step"]) == (4, 3)
    assert guarded[0]["ddp"]["with"] == guarded[1]["ddp"]["with"]
    [noted] = guarded[0]["ddp"]["noted"]
    assert (noted["step"], noted["reason"], noted["rows"]) == (2, "loss", [[2, 3], [2, 3]])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_in_fp32_leaves_out_the_same_step(guarded, stage):
    result = guarded[0][f"zero{stage}"]
    assert result["with"] == pytest.approx(result["without"], rel=1e-12)
    [noted] = result["noted"]
    assert (noted["step"], noted["rows"]) == (2, [[2, 3], [2, 3]])


def test_both_ranks_stop_when_one_loss_breaks(guarded):
    one, other = (result["diverged"] for result in guarded)
    assert "since optimizer step 5 (seen at step 6;" in one["error"]
    assert one == other and one["newest"] == "step=00000004.ckpt"


@pytest.mark.parametrize("name", SPIKED)
def test_law_7_one_ranks_spike_is_left_out_by_the_engine_of_both(guarded, name):
    """Weights, moments and counts are bit by bit those of a run without that step's data, on each rank."""
    for result in guarded:
        spiked = result["spiked"][name]
        assert spiked["with"] == spiked["without"]
        # What DeepSpeed itself has skipped is another count, of what overflows.
        assert (spiked["with steps"], spiked["without steps"]) == ([9, 0], [8, 0])
    result = guarded[0]["spiked"][name]
    assert result["with"][0] == guarded[1]["spiked"][name]["with"][0]
    [noted] = result["skipped.jsonl"]
    rows = [[24, 25, 26, 27]] if SPIKED[name].get("accumulate") else [[12, 13]]
    assert (noted["step"], noted["reason"], noted["rows"]) == (7, "spike", rows * 2) and noted["grad_norm"] > 50
    key = "health/skipped_steps"
    assert [(row["step"], row[key]) for row in result["metrics.jsonl"] if key in row] == [(3, 0.0), (7, 1.0)]


def test_spikes_are_refused_where_no_norm_is_taken_before_the_step(guarded):
    for result in guarded:
        assert "compute_grad_norm False: set it to True, or remove health.spike" in result["refused"]


@pytest.mark.parametrize("name", REWOUND)
def test_a_rewind_under_zero(guarded, name):
    """Two steps an epoch of six rows: steps 5 and 6 break, and what follows step 4 is the data of step 7."""
    for result in guarded:
        rewound = result["rewound"][name]
        assert ("spikes" in rewound["error"]) == REWOUND[name]["spikes"]
        assert "since optimizer step 5" in rewound["error"] and rewound["rewind"] == [4, 6]
        assert rewound["aside"] == ["step=00000005.ckpt"]
        assert (rewound["second"]["step"], rewound["second"]["epoch"]) == (6, 4)
    one, two = (result["rewound"][name] for result in guarded)
    first, second = ({int(s): r for s, r in one[n]["rows"].items()} for n in ("first", "second"))
    other = {int(s): r for s, r in two["second"]["rows"].items()}
    assert sorted(first) == [1, 2, 3, 4, 5, 6] and sorted(second) == sorted(other) == [5, 6]
    # What is left is the last epoch, each row once.
    assert sorted(row for rows in [*second.values(), *other.values()] for row in rows) == list(range(12))


def test_a_rewind_ends_with_the_same_weights_whatever_broke_and_under_every_stage(guarded):
    """What was left out has left no trace in weights or moments; the stages differ by the order of their sums."""
    first, second = ([case[n]["size"] for case in guarded[0]["rewound"].values()] for n in ("first", "second"))
    for sizes in (first, second):
        assert sizes[::2] == sizes[1::2]
        assert sizes == pytest.approx([sizes[0]] * len(REWOUND), rel=1e-6)
    assert second[0] != pytest.approx(first[0], rel=1e-5)


# ---- who is slow ----


@pytest.mark.parametrize(("name", "part"), [("forward", "forward_seconds"), ("data", "data_wait_seconds")])
def test_a_rank_that_stays_slow_is_named_with_its_host(guarded, name, part):
    found = guarded[0]["slowed"][name]
    assert sorted(found["ratios"]) == ["1", "3", "5"] and min(found["ratios"].values()) >= 1
    [named] = found["named"]
    assert (named["rank"], named["host"], named["step"]) == (1, socket.gethostname(), 4)
    assert found["ratios"]["3"] == pytest.approx(named["over_median"], abs=1e-3)
    assert named[part] > 0.05 and named["over_median"] > 1.3


def test_ranks_that_are_alike_are_not(guarded):
    assert guarded[0]["slowed"]["alike"]["named"] == []


def test_of_two_ranks_the_faster_is_the_median():
    assert over_median([Pace(1.0, 0.5), Pace(2.5, 0.5)]) == [1.0, 2.0]
    assert over_median([Pace(1.0, 0.0), Pace(1.2, 0.0), Pace(3.0, 0.6)]) == [1 / 1.2, 1.0, 3.0]
    assert over_median([Pace(0.0, 0.0)] * 3) == [1.0] * 3
