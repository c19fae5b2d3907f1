"""vLLM samples from the policy of now, at the temperature asked, beside this process and on a server."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from threading import Thread
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from ptl.models.adapters import add_lora
from ptl.models.heads import causal_lm
from ptl.models.spec import LoRA, ModelSpec
from ptl.rollout.engine import Asked, Draws
from ptl.rollout.vllm import INSTALL, VLLM
from ptl.rollout.vllm_requests import sampling
from ptl.rollout.weights import shared_folder, write_adapter, write_model
from tests import tiny
from tests.ranks import run_ranks

VOCAB = 400
DRAWS = Draws(samples=4, temperature=0.7, top_p=1.0, stop=(0, 1, 2, 3), seed=5)
ASKED = [Asked([5, 6, 7], 11, 12), Asked([9], 4, 3), Asked(list(range(4, 64)), 7, 20)]
FP32 = 2e-4
"""Nats by which vLLM's kernels on a CPU may differ from ours in fp32; seen: 5.5e-5."""
BF16 = 0.5
"""The same in bf16; seen: 0.23."""
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason=f"vllm is not installed: {INSTALL}")
START_S = 240
FLAGS = """
--host 127.0.0.1 --tokens-only --generation-config vllm --logprobs-mode processed_logprobs --dtype float32
--enforce-eager --kv-cache-memory-bytes 50000000 --max-model-len 128 --enable-lora --max-loras 1 --max-lora-rank 8
"""


def make(tie=True, seed=0, **config):
    shape = {"hidden": 128, "intermediate_size": 256, "initializer_range": 0.15}
    return tiny.make_model(VOCAB, tie=tie, seed=seed, **shape, **config)


def adapted(**lora):
    model = add_lora(make(), LoRA(rank=4, **lora))
    moved(model, 0.1)
    return model


@torch.no_grad()
def moved(model, by=0.03):
    """A step of SGD on noise: every weight that trains changes."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * by)


def worst(model, questions, answers, temperature):
    """Largest difference between an answer's log-probabilities and those of a plain forward, in nats."""
    lm, found = causal_lm(model), 0.0
    for question, group in zip(questions, answers, strict=True):
        for answer in group:
            assert len(answer.ids) == len(answer.logprobs) > 0
            ids = torch.tensor([list(question.ids) + answer.ids])
            with torch.no_grad():
                logp = torch.log_softmax(lm(input_ids=ids).logits[0].float() / temperature, -1)
            own = logp[len(question.ids) - 1 : -1].gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]
            found = max(found, float((own - torch.tensor(answer.logprobs)).abs().max()))
    return found


def drawn(engine, model, version, questions=ASKED, draws=DRAWS):
    with engine.session(model, SingleDeviceStrategy(device=torch.device("cpu")), version) as draw:
        return draw(questions, draws)


def small(**settings):
    return VLLM(kv_cache_gib=0.05, max_model_len=128, enforce_eager=True, **settings)


def check_follows_updates(engine, model):
    """The same engine over three versions: right each time, and wrong for the weights that came after."""
    for version in range(3):
        answers = drawn(engine, model, version)
        assert worst(model, ASKED, answers, DRAWS.temperature) < FP32
        moved(model)
        assert worst(model, ASKED, answers, DRAWS.temperature) > 0.1
        # The version says that nothing has changed, so nothing is sent.
        assert worst(model, ASKED, drawn(engine, model, version), DRAWS.temperature) > 0.1
    return drawn(engine, model, 3)


# ---- without vLLM ----


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_folder_that_vllm_reads_is_the_policy_without_its_adapter(tmp_path, tie, adapter):
    model = make(tie=tie)
    ids = torch.tensor([ASKED[2].ids])
    expected = model(input_ids=ids).logits
    if adapter:
        model = add_lora(model, LoRA(rank=4))
        moved(model, 0.1)
    for untied in (False, True):
        folder = tmp_path / str(untied)
        folder.mkdir()
        write_model(model, folder, torch.float32, True, untied=untied)
        read = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(read(input_ids=ids).logits, expected)
        assert read.config.tie_word_embeddings == (tie and not untied)
        names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].keys()
        twice = {"lm_head.weight"} if tie and not untied else set()
        assert names == make(tie=tie).state_dict().keys() - twice
    write_model(model, tmp_path, torch.float32, False)  # walks with the others and writes nothing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["False", "True"]


def test_experts_are_written_as_published_checkpoints_name_them(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_experts=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, vocab_size=64)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **heads)).eval()
    write_model(model, tmp_path, torch.float32, True)
    with safe_open(tmp_path / "model-00001.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.3.gate_proj.weight" in file.keys()  # noqa: SIM118  (not a mapping)
    ids = torch.tensor([ASKED[2].ids]) % 64
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(read(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)


def test_weights_pass_through_a_folder_that_nobody_has_made_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strategy = SingleDeviceStrategy(device=torch.device("cpu"))
    with shared_folder("runs/first/weights", "name", strategy, True) as folder:
        assert folder == tmp_path / "runs/first/weights/name" and folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists() and folder.parent.exists()


def test_a_rank_that_cannot_write_walks_to_the_end_before_it_says_so(tmp_path, monkeypatch):
    import ptl.rollout.weights as weights

    seen = []
    entered = weights.gathered
    monkeypatch.setattr(weights, "gathered", lambda tensors: (seen.append(tensors), entered(tensors))[1])
    monkeypatch.setattr(weights, "SHARD_BYTES", 1)
    with pytest.raises(SafetensorError):
        write_model(make(), tmp_path / "absent", torch.float32, True)
    assert len(seen) == len(list(make().parameters()))


def test_the_adapters_folder_is_the_adapter(tmp_path):
    from peft import PeftModel

    model = adapted(rslora=True)
    write_adapter(model, tmp_path, True)
    read = PeftModel.from_pretrained(make(), tmp_path)
    ids = torch.tensor([ASKED[2].ids])
    assert torch.equal(read(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_vllm_cannot_draw_from_is_refused_with_the_key():
    for adapter, key in (
        (LoRA(dora=True), "dora"),
        (LoRA(train_tokens=[3]), "train_tokens"),
        (LoRA(save_modules=["lm_head"]), "save_modules"),
        (LoRA(init="pissa"), "init"),
        (LoRA(rank=1024), "rank"),
    ):
        with pytest.raises(ValueError, match=rf"remove model\.policy\.adapter\.{key}"):
            VLLM().check(ModelSpec(name="x", adapter=adapter))
    VLLM().check(ModelSpec(name="x", adapter=LoRA(rslora=True)))
    with pytest.raises(ValueError, match=r"remove model\.policy\.quantize"):
        VLLM().check(ModelSpec(name="x", adapter=LoRA(), quantize="nf4"))
    for wrong, key in (
        ({"mode": "server"}, "url"),
        ({"url": "http://x"}, "url"),
        ({"kv_cache_gib": 0}, "kv_cache_gib"),
    ):
        with pytest.raises(ValueError, match=rf"model\.engine\.{key}"):
            VLLM(**wrong)


def test_trap_grpo_15_each_prompt_and_rollout_has_its_own_seed():
    seeds = {sampling(question, DRAWS._replace(seed=seed))["seed"] for question in ASKED for seed in range(5)}
    assert len(seeds) == 15 and all(0 <= seed < 2**61 for seed in seeds)
    assert sampling(ASKED[0], DRAWS) == sampling(ASKED[0], DRAWS)


def test_no_server_is_an_error_that_says_how_to_start_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = VLLM(mode="server", url=f"http://127.0.0.1:{port}", timeout_s=5)
    with pytest.raises(RuntimeError, match=r"no vLLM server at .*model\.engine\.url, or start it with: .* vllm serve"):
        drawn(engine, make(), 0)


@pytest.mark.timeout(30)
def test_a_server_that_never_answers_ends_in_time():
    release = []

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self):
            while not release:
                time.sleep(0.05)

    server = HTTPServer(("127.0.0.1", 0), Silent)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        engine = VLLM(mode="server", url=f"http://127.0.0.1:{server.server_port}", timeout_s=0.5)
        with pytest.raises(RuntimeError, match=r"did not answer within 0\.5 s"):
            drawn(engine, make(), 0)
    finally:
        release.append(True)
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_the_error_says_how_to_install_it():
    with pytest.raises(ValueError, match=r"make install-vllm.*ptl\.rollout\.hf\.HF"):
        drawn(small(), make(), 0)


# ---- beside this process ----


@pytest.fixture(scope="module")
def whole():
    """An engine that has drawn from a policy without an adapter, and the policy."""
    model, engine = make(), small()
    drawn(engine, model, -1)
    yield engine, model
    engine.close()


@needs_vllm
@pytest.mark.slow
def test_law_3_colocated_logprobs_are_ours_at_the_temperature(whole):
    engine, model = whole
    for temperature in (0.7, 1.0, 1.6, 0.0):
        answers = drawn(engine, model, -1, draws=DRAWS._replace(temperature=temperature))
        assert [len(group) for group in answers] == [4] * 3
        assert worst(model, ASKED, answers, temperature or 1.0) < FP32


@needs_vllm
@pytest.mark.slow
def test_answers_end_at_a_stop_id_or_at_their_own_limit(whole):
    engine, model = whole
    # The last of these ends has no row in the model.
    answers = drawn(engine, model, -1, draws=DRAWS._replace(samples=32, stop=(*range(20), VOCAB)))
    ended = set()
    for question, group in zip(ASKED, answers):
        for answer in group:
            assert len(answer.ids) <= question.limit and not set(range(20)) & set(answer.ids[:-1])
            assert len(answer.ids) == question.limit or answer.ids[-1] < 20
            ended.add(answer.ids[-1] < 20)
    assert ended == {True, False}


@needs_vllm
@pytest.mark.slow
def test_trap_grpo_2_draws_are_the_softmax_whatever_the_models_generation_configuration(whole):
    """The server's test has a poisoned folder; here nothing but our own fields can act."""
    engine, model = whole
    check_frequencies(engine, model, -1)


def check_frequencies(engine, model, version):
    questions = [Asked([5, 6, 7], number, 1) for number in range(50)]
    with torch.no_grad():
        z = causal_lm(model)(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    p = torch.softmax(z / DRAWS.temperature, -1)
    answers = drawn(engine, model, version, questions, DRAWS._replace(samples=80, stop=()))
    first = [answer.ids[0] for group in answers for answer in group]
    counts, many = torch.bincount(torch.tensor(first), minlength=VOCAB).double(), len(first)
    order = p.argsort(descending=True)
    best = order[many * p[order] > 5]
    # The rest is one cell, so that each expects at least 5.
    seen = torch.cat([counts[best], counts.sum()[None] - counts[best].sum()])
    expected = many * torch.cat([p[best], 1 - p[best].sum()[None]])
    chi_squared = ((seen - expected).square() / expected.clamp_min(1)).sum().item()
    free = len(best)
    assert free > 10 and chi_squared < free + 5 * (2 * free) ** 0.5


@needs_vllm
@pytest.mark.slow
def test_top_p_cuts_what_is_drawn_and_leaves_the_scores_out(whole):
    engine, model = whole
    question = Asked([5, 6, 7], 3, 1)
    (answers,) = drawn(engine, model, -1, [question], DRAWS._replace(samples=500, top_p=0.5, stop=()))
    with torch.no_grad():
        z = model(input_ids=torch.tensor([question.ids])).logits[0, -1].double()
    ranked, order = torch.softmax(z / DRAWS.temperature, -1).sort(descending=True)
    kept = set(order[ranked.cumsum(0) - ranked < 0.5].tolist())
    assert {a.ids[0] for a in answers} <= kept and len(kept) > 1
    assert all(a.logprobs == [] for a in answers)


@needs_vllm
@pytest.mark.slow
def test_trap_grpo_15_seeds_tell_rollouts_prompts_and_answers_apart(whole):
    engine, model = whole
    same = [Asked([5, 6, 7], number, 12) for number in range(4)]
    first = drawn(engine, model, -1, same)
    assert len({tuple(a.ids) for group in first for a in group}) > 12
    assert drawn(engine, model, -1, same, DRAWS._replace(seed=6)) != first


@needs_vllm
@pytest.mark.slow
def test_modes_and_generators_are_as_before_also_when_the_body_raises(whole):
    engine, model = whole
    model.train()
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads())
    with pytest.raises(KeyError), engine.session(model, SingleDeviceStrategy(device=torch.device("cpu")), -1) as draw:
        draw(ASKED, DRAWS)
        raise KeyError("in the body")
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads()) == states[1:]
    with pytest.raises(ValueError, match=r"131 tokens, and vLLM was started for 128"):
        drawn(engine, model, -1, [Asked([5] * 120, 0, 11)])
    assert drawn(engine, model, -1, []) == []


@needs_vllm
@pytest.mark.slow
def test_trap_grpo_5_colocated_vllm_has_the_weights_of_now(whole):
    engine, model = whole
    check_follows_updates(engine, model)


@needs_vllm
@pytest.mark.slow
def test_trap_grpo_5_colocated_vllm_has_the_adapter_of_now():
    model, engine = adapted(rslora=True), small()
    try:
        check_follows_updates(engine, model)
    finally:
        engine.close()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("ptl-")]


@needs_vllm
@pytest.mark.slow
def test_bf16_agrees_as_bf16_does():
    model, engine = make().to(torch.bfloat16), small()
    try:
        answers = drawn(engine, model, 0)
    finally:
        engine.close()
    difference = worst(model, ASKED, answers, DRAWS.temperature)
    assert 0 < difference < BF16, difference


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_law_3_each_of_two_ranks_has_a_vllm_of_its_own(tmp_path):
    """Under DDP and, with an adapter, ZeRO-3; the variables that launched the ranks do not reach vLLM's processes."""
    shape = {"hidden": 128, "intermediate_size": 256, "initializer_range": 0.15}
    folder = tiny.save_folder(tmp_path / "model", tiny.make_tokenizer(), **shape)
    args = {"folder": str(folder), "out": str(tmp_path / "out")}
    results = run_ranks("tests.rollout.vllm_ranks:beside", world_size=2, args=args, timeout=800)
    for name in ("ddp", "zero3"):
        first, second = (result[name] for result in results)
        assert all(0 < case["worst"] < FP32 for case in (first, second)), name
        assert len(first["losses"]) == 2 and (first["cut"] > 0) == (name == "zero3")
        # The same seeds and weights: what rank 1 said the first time after each step is what rank 0 said.
        assert len(second["said"]) == 2 * len(first["said"])
        assert first["said"][:2] == second["said"][:2], name
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("ptl-")]


# ---- a server ----


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server whose folder has a generation configuration that would spoil every draw."""
    folder = tmp_path_factory.mktemp("server")
    model = make(tie=False, seed=9)
    model.save_pretrained(folder)
    poison = {
        "do_sample": True,
        "top_k": 1,
        "repetition_penalty": 5.0,
        "min_p": 0.9,
        "temperature": 0.01,
        "eos_token_id": 5,
    }
    (folder / "generation_config.json").write_text(json.dumps(poison))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The CPU package's own `vllm` command looks for a distribution of that name and fails.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += FLAGS.split()
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_healthy(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_healthy(process, port, log):
    for _ in range(START_S):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(START_S + 120)
def test_trap_grpo_5_a_server_has_the_weights_of_now_and_its_own_settings_leak_into_nothing(server):
    model, engine = make(tie=False), VLLM(mode="server", url=server, timeout_s=60)
    check_follows_updates(engine, model)
    check_frequencies(engine, model, 3)
    assert worst(model, ASKED, drawn(engine, model, 3), DRAWS.temperature) < FP32
    assert worst(model, ASKED, drawn(engine, model, 3, draws=DRAWS._replace(temperature=0.0)), 1.0) < FP32
    with pytest.raises(RuntimeError, match=r"tie_word_embeddings false"):
        drawn(VLLM(mode="server", url=server, timeout_s=60), make(), 0)


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(START_S + 120)
def test_trap_grpo_5_a_server_has_the_adapter_of_now(server):
    base = make(tie=False)
    engine = VLLM(mode="server", url=server, timeout_s=60)
    drawn(engine, base, 0)  # the server's base is this policy's from here on
    model = add_lora(base, LoRA(rank=4))
    moved(model, 0.1)
    check_follows_updates(VLLM(mode="server", url=server, timeout_s=60), model)
