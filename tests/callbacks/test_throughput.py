"""Throughput: exact counts over ranks, what is left out of the time, and what is not known."""

import time

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.clock import CudaClock, HostClock, StepTimer, median_and_p90
from ptl.callbacks.hardware import device_peak
from ptl.callbacks.jsonl import read_metrics
from ptl.callbacks.shape import model_shape, parameter_counts
from ptl.callbacks.single_file import AtomicCheckpointIO
from ptl.callbacks.throughput import Throughput, count_tokens, excluded
from ptl.functional.flops import Work, training_flops
from ptl.models.adapters import add_lora
from ptl.models.spec import LoRA
from tests import tiny
from tests.callbacks import scenarios
from tests.callbacks.parts import Toy, loader, packed, padded, trainer
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def totals(batches) -> list[int]:
    return sum((count_tokens(batch, 0, CPU) for batch in batches), torch.zeros(5, dtype=torch.int64)).tolist()


# ---- counting ----


def test_packed_and_padded_batches_count_the_same_documents():
    lengths = [7, 3, 5]
    squares, windowed = 49 + 9 + 25, 7 * 4 + 3 * 3 + 5 * 4
    assert count_tokens(packed(lengths, trained=2), 4, CPU).tolist() == [15, 2, 15, squares, windowed]
    assert count_tokens(padded(lengths, trained=4), 4, CPU).tolist() == [15, 4, 21, squares, windowed]


def test_token_batches_inside_other_batches_count():
    inner = packed([4, 4], trained=3)
    nested = {"student": inner, "pair": (inner, [inner])}
    assert count_tokens(nested, 0, CPU).tolist() == [3 * n for n in count_tokens(inner, 0, CPU).tolist()]


def test_model_shape_of_a_llama_by_hand():
    model = tiny.make_model(400, tie=False)  # 2 layers, hidden 32, 4 heads, 2 key-value heads, mlp 64
    shape = model_shape(model)
    assert shape.body_trained == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert (shape.head_trained, shape.body_frozen, shape.attention) == (400 * 32, 0, 2 * 32)
    assert parameter_counts(model)[0] == sum(p.numel() for p in model.parameters())


def test_model_shape_of_lora_with_a_head_that_is_trained_whole():
    model = add_lora(tiny.make_model(400, tie=False), LoRA(rank=4, save_modules=["lm_head"]))
    shape = model_shape(model)
    assert (shape.head_trained, shape.head_frozen) == (400 * 32, 0)  # not also the frozen copy
    assert shape.body_trained == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))


def test_model_shape_counts_the_experts_that_a_token_visits():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SMALL, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2)
    shape = model_shape(MixtralForCausalLM(config))
    attention, router, expert = 2 * 32 * 32 + 2 * 32 * 16, 32 * 8, 3 * 32 * 48
    assert shape.body_trained == 2 * (attention + router + 2 * expert)


def test_sliding_layers_see_their_window():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**SMALL, num_hidden_layers=4, head_dim=8, sliding_window=16)
    shape = model_shape(Gemma2ForCausalLM(config))
    assert (shape.attention, shape.sliding, shape.window) == (2 * 4 * 8, 2 * 4 * 8, 16)


# ---- two ranks ----


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-ranks")
    return run_ranks("tests.callbacks.scenarios:throughput", 2, {"folder": str(folder)}, timeout=150)


def test_trap_scale_tokens_are_summed_over_ranks_of_unequal_batches(two_ranks):
    """Rank 0's tokens times the number of ranks is what Lightning's monitor says, and it is wrong here."""
    per_rank = [scenarios.batches_of(index) for index in range(2)]
    rows = [row for row in two_ranks[0]["rows"] if "throughput/tokens_per_second" in row]
    # One warm-up step, then windows of 2 steps that end at even steps; the last holds what is left.
    assert [row["step"] for row in rows][:4] == [1, 3, 5, 6]
    for row, (begin, end) in zip(rows, [(1, 2), (2, 4), (4, 6), (6, 7)], strict=False):
        k = scenarios.ACCUMULATE
        window = [totals(batches[begin * k : end * k]) for batches in per_rank]
        real, trained, positions, *_ = (sum(counts) for counts in zip(*window, strict=True))
        assert row["throughput/padding_fraction"] == pytest.approx(1 - real / positions, rel=1e-12)
        speed = row["throughput/tokens_per_second"]
        assert row["throughput/trained_tokens_per_second"] / speed == pytest.approx(trained / real, rel=1e-12)
        assert row["throughput/padded_tokens_per_second"] / speed == pytest.approx(positions / real, rel=1e-12)
        assert row["throughput/tokens_per_second_per_device"] == pytest.approx(speed / 2, rel=1e-12)
        seconds = real / speed
        # The slower rank sets the pace: 2 micro-batches of 0.05 s a step.
        assert seconds >= 2 * 0.05 * (end - begin)
        assert row["throughput/step_seconds_p90"] >= row["throughput/step_seconds_median"] >= 2 * 0.05
        shape = model_shape(tiny.make_model())
        flops = sum(training_flops(shape, Work(c[0], c[1], c[3], c[4])) for c in window)
        assert row["throughput/flops_per_second_per_device"] == pytest.approx(flops / seconds / 2, rel=1e-9)
        seen = [sum(totals(batches[: end * k])[i] for batches in per_rank) for i in (0, 1)]
        assert [row["throughput/tokens_seen"], row["throughput/trained_tokens_seen"]] == seen


def test_utilisation_of_an_unknown_device_is_left_out(two_ranks):
    assert two_ranks[0]["peak"] is None
    assert two_ranks[0]["summary"]["mfu"] is None
    assert not any("throughput/mfu" in row for row in two_ranks[0]["rows"])


def test_the_summary_is_the_same_on_every_rank(two_ranks):
    first, second = (result["summary"] for result in two_ranks)
    assert first == second
    assert first["measured_steps"] == scenarios.STEPS - scenarios.WARMUP
    assert first["tokens_per_second"] > 0 and first["tokens_per_second_deviation"] > 0
    assert first["peak_memory_gib"] > 0.05


def test_a_resumed_run_carries_the_tokens_on(two_ranks):
    """7 steps, then 3 more after a resume at the last checkpoint, at step 7; the toy loader starts anew."""
    per_rank = [scenarios.batches_of(index) for index in range(2)]
    expected = sum(totals(b)[0] + totals(b[: 3 * scenarios.ACCUMULATE])[0] for b in per_rank)
    assert [result["seen"] for result in two_ranks] == [expected] * 2


# ---- one process ----


def durations(meter: Throughput) -> list[float]:
    return meter._durations


SLOW = 0.8
"""Seconds that something other than training takes; a step of training takes less, also on a busy machine."""


class SlowIO(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        time.sleep(SLOW)
        super().save_checkpoint(checkpoint, path, storage_options)


class SlowCallback(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with excluded(trainer):
            time.sleep(SLOW)


BATCHES = [packed([8, 8], trained=4, seed=i) for i in range(6)]


@pytest.mark.parametrize("place", ["validation", "our_checkpoint", "stock_checkpoint", "before", "after"])
def test_what_is_not_training_is_not_timed(tmp_path, place):
    meter = Throughput(every_n_steps=2, warmup=1)
    callbacks: list = [meter]
    options: dict = {}
    if place == "validation":
        options = {"val_check_interval": 1}
    elif place == "our_checkpoint":
        callbacks.append(Checkpoint(every_n_train_steps=1))
        options = {"plugins": [SlowIO()]}
    elif place == "stock_checkpoint":
        callbacks.append(ModelCheckpoint(tmp_path, every_n_train_steps=1))
        options = {"plugins": [SlowIO()]}
    else:
        callbacks.insert(0 if place == "before" else 1, SlowCallback())
    module = Toy(pause=0.02, val_pause=SLOW)
    start = time.perf_counter()
    trainer(tmp_path, callbacks, max_steps=4, **options).fit(module, loader(BATCHES), loader(BATCHES[:1]))
    assert time.perf_counter() - start > 4 * SLOW  # the slow part did run
    assert len(durations(meter)) == 3
    assert all(0.02 <= seconds < SLOW for seconds in durations(meter))


def test_a_stock_io_is_replaced_and_a_chosen_one_kept(tmp_path):
    fit = trainer(tmp_path, [Checkpoint()], plugins=[SlowIO()], max_steps=1)
    fit.fit(Toy(), loader(BATCHES))
    assert type(fit.strategy.checkpoint_io) is SlowIO
    fit = trainer(tmp_path, [Checkpoint()], max_steps=1)
    fit.fit(Toy(), loader(BATCHES))
    assert type(fit.strategy.checkpoint_io) is AtomicCheckpointIO


def test_waiting_for_data_is_seen(tmp_path):
    shares = {}
    for name, step, data in (("fast", 0.2, 0.0), ("starved", 0.0, 0.3)):
        meter = Throughput(every_n_steps=2, warmup=1)
        trainer(tmp_path / name, [meter], max_steps=5).fit(Toy(pause=step), loader(BATCHES, pause=data))
        shares[name] = meter.summary()["data_wait_fraction"]
    assert shares["fast"] < 0.5 < shares["starved"] <= 1


def test_a_given_peak_gives_the_utilisation(tmp_path):
    meter = Throughput(every_n_steps=3, warmup=0, peak_flops=1e9)
    trainer(tmp_path, [meter]).fit(Toy(), loader(BATCHES))
    summary = meter.summary()
    assert summary["measured_steps"] == 6
    assert summary["mfu"] == pytest.approx(summary["flops_per_second_per_device"] / 1e9, rel=1e-9)


def test_nothing_is_said_during_the_warm_up(tmp_path):
    meter = Throughput(every_n_steps=1, warmup=10)
    fit = trainer(tmp_path, [meter])
    fit.fit(Toy(), loader(BATCHES))
    assert not any("throughput/tokens_per_second" in row for row in read_metrics(fit.loggers[0].path))
    assert meter.summary()["tokens_per_second"] is None and meter.summary()["measured_steps"] == 0


def test_training_is_the_same_with_and_without(tmp_path):
    weights = []
    for callbacks in ([], [Throughput(every_n_steps=2, warmup=1)]):
        module = Toy(dropout=0.3)
        torch.manual_seed(5)
        trainer(tmp_path, callbacks).fit(module, loader(BATCHES))
        weights.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_no_value_is_read_from_the_device_between_logs(tmp_path, monkeypatch):
    """On a GPU each reading of a value would wait for the device."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _f=original, _n=name: (reads.append(_n), _f(self, *a))[1]
        )
    meter = Throughput(every_n_steps=100, warmup=1)
    fit = trainer(tmp_path, [meter], logger=False)
    module = Toy()
    meter.on_train_start(fit, module)
    meter.on_train_batch_start(fit, module, BATCHES[0], 0)
    before = len(reads)
    for index in range(5):
        meter.on_train_batch_start(fit, module, BATCHES[index], index)
        meter.on_train_batch_end(fit, module, None, BATCHES[index], index)
    assert len(reads) == before


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"warmup": -1}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Throughput(**options)


# ---- the stop-watch ----


def test_step_timer_cuts_out_nested_holds():
    timer = StepTimer(HostClock())
    timer.batch_arrived()
    for _ in range(2):
        time.sleep(0.02)
        timer.hold()
        timer.hold()
        time.sleep(0.2)
        timer.release()
        time.sleep(0.2)
        timer.release()
        time.sleep(0.02)
        timer.step_done()
    steps, waited = timer.read()
    assert len(steps) == 2 and all(0.04 <= s < 0.2 for s in steps) and waited == 0
    timer.step_done()
    assert timer.read()[0][0] < 0.2  # reading starts afresh where the last step ended


def test_median_and_p90():
    assert median_and_p90([1.0]) == (1.0, 1.0)
    assert median_and_p90([float(n) for n in range(11)]) == (5.0, 9.0)


# ---- on a GPU ----


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
def test_the_cuda_clock_times_the_device_without_waiting_for_it():
    device = torch.device("cuda", 0)
    matrix = torch.randn(8192, 8192, device=device)
    matrix @ matrix
    torch.cuda.synchronize()
    clock = CudaClock(device)
    begin = time.perf_counter()
    clock.mark()
    for _ in range(20):
        matrix @ matrix
    clock.mark()
    queued = time.perf_counter() - begin
    seconds = clock.read()
    assert seconds[1] == pytest.approx(time.perf_counter() - begin, rel=0.1)
    assert queued < 0.5 * seconds[1]


@pytest.mark.gpu
@on_gpu
def test_throughput_on_a_gpu(tmp_path):
    meter = Throughput(every_n_steps=2, warmup=1)
    trainer(tmp_path, [meter], accelerator="gpu", val_check_interval=2).fit(
        Toy(pause=0.02, val_pause=SLOW), loader(BATCHES), loader(BATCHES[:1])
    )
    summary = meter.summary()
    assert summary["measured_steps"] == 5 and all(0.02 <= seconds < SLOW for seconds in durations(meter))
    known = device_peak(torch.device("cuda", 0), "fp32")
    assert (summary["mfu"] is None) == (known is None) and (known is None or 0 < summary["mfu"] < 1)
    assert summary["peak_memory_gib"] == pytest.approx(torch.cuda.max_memory_reserved() / 2**30, rel=0.01)
