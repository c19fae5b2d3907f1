"""What ``ptl tokens add``, a training and ``ptl export`` wrote is the same model in vLLM, and reads dialogues alike."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptl.apps.reply import ModelWriter, Reply
from ptl.apps.runs import load_model
from ptl.apps.serving.desk import Desk, Exchange
from ptl.data.render import Renderer
from ptl.data.tokenizer import load_tokenizer
from ptl.models.export import export
from ptl.models.names import resolve_model
from ptl.models.spec import LoRA, ModelSpec
from ptl.rollout.vllm import INSTALL, VLLMWriter
from ptl.tools.toolbox import Toolbox
from ptl.types import Conversation, Message, Origin
from tests import tiny
from tests.models import test_new_tokens
from tests.models.zero_build import alone
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason=f"vllm is not installed: {INSTALL}"),
]
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "rows": {"adapter": True},
    "qlora rows": {"quantize": "nf4", "adapter": True},
}
FP32 = 2e-4
"""Nats by which vLLM's kernels on a CPU may differ from ours; as in the tests of the engine."""
# No mark is typed in it: vLLM's own chat takes a typed <|im_end|> for the token, which ours does not.
DIALOGUE = [
    Message(role="system", content="You are a helpful assistant"),
    Message(role="user", content="what is 2+2 ?"),
    Message(role="assistant", content="<CALCULATOR-TOOL>2+2</CALCULATOR-TOOL>"),
    Message(role="user", content="Où est Shanghai ?"),
]


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    """Models that were given the notes' marks and the tools' tags, tied and untied."""
    from ptl import cli

    root = tmp_path_factory.mktemp("grown")
    for tied in (True, False):
        tokenizer = tiny.make_tokenizer()
        tiny.save_folder(root / f"plain-{tied}", tokenizer, tie=tied, hidden=128, initializer_range=0.15)
        arguments = [
            "tokens",
            "add",
            str(root / f"plain-{tied}"),
            "--out",
            str(root / str(tied)),
            "--set",
            "chat",
            "tools",
        ]
        assert cli.main(arguments) == 0
    return root


@pytest.fixture(scope="module")
def grown_rows(tmp_path_factory) -> Path:
    """The models of the new tokens' own tests."""
    return test_new_tokens.grow(tmp_path_factory.mktemp("grown-rows"), tiny.make_tokenizer())


def in_vllm(
    folder: Path, prompts: list[list[int]], messages: list[Message] | None = None
) -> tuple[list[list[float]], list[int], list[int]]:
    """Log-probabilities of the tokens of some prompts, what vLLM reads of a dialogue, and what it answers greedily.

    Without a dialogue, the last two are empty.
    """
    from vllm import LLM, SamplingParams  # pyright: ignore

    llm = LLM(
        str(folder), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=50_000_000, max_model_len=256,
        logprobs_mode="processed_logprobs", enable_prefix_caching=False,
    )  # fmt: skip
    try:
        scored = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        logps = [
            [step[token].logprob for token, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(prompts, scored, strict=True)
        ]
        if messages is None:
            return logps, [], []
        said = [{"role": turn.role, "content": turn.content} for turn in messages]
        [answer] = llm.chat(said, SamplingParams(max_tokens=12, temperature=0.0), use_tqdm=False)
        return logps, list(answer.prompt_token_ids), list(answer.outputs[0].token_ids)
    finally:
        llm.llm_engine.engine_core.shutdown()


def own(folder: Path, prompts: list[list[int]]) -> list[list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for ids in prompts:
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
        found.append(logp[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return found


def check(folder: Path) -> None:
    """vLLM gives transformers' log-probabilities, reads what training, chat and serving read, and says the same."""
    renderer = Renderer(load_tokenizer(str(folder)))
    text = [*DIALOGUE, Message(role="assistant", content="En Chine.")]
    [trained] = renderer.render(Conversation(messages=tuple(text), origin=Origin("test", 1)))
    ids = [int(token) for token in trained.ids]
    prompts = [ids, ids[::-1]]
    logps, read, said = in_vllm(folder, prompts, DIALOGUE)
    for mine, theirs in zip(own(folder, prompts), logps, strict=True):
        assert mine == pytest.approx(theirs, abs=FP32)
    model = load_model(resolve_model(str(folder)), device=torch.device("cpu")).eval()
    reply = Reply(ModelWriter(model), renderer, DIALOGUE, temperature=0.0, max_new_tokens=12)
    list(reply)
    exchange = Exchange()
    desk = Desk(ModelWriter(model), renderer, Toolbox([]), {"temperature": 0.0, "max_new_tokens": 12})
    # A tool of the client's: one turn, whatever tags a model of random weights may write in it.
    list(desk.answer(DIALOGUE, exchange, tools=[{"function": {"name": "nothing"}}]))
    served = [token.id for token in exchange.tokens if not token.own]
    assert read == reply.prompt == served == ids[: len(read)]
    wrote = [*reply.ids, *([] if reply.end is None else [reply.end])]
    assert said == wrote == [token.id for token in exchange.tokens if token.own]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_are_the_same_in_vllm(kind, tied, grown, tmp_path):
    folder = grown / str(tied)
    tokenizer = load_tokenizer(str(folder))
    options = dict(KINDS[kind])
    new = [
        tokenizer.convert_tokens_to_ids(token) for token in ("<|im_sep|>", "<CALCULATOR-TOOL>", "</CALCULATOR-TOOL>")
    ]
    if options.pop("adapter", False):
        options["adapter"] = LoRA(rank=4, train_tokens=new)
    spec = ModelSpec(name=str(folder), attention="sdpa", **options)
    losses, model = alone(spec, torch.tensor([[new[0], 9, new[1], 33, new[2], 7], [100, new[2], 3, new[0], new[1], 8]]))
    assert losses[-1] < losses[0]
    export(model, tokenizer, tmp_path / "merged", dtype="fp32", generation_eos=Renderer(tokenizer).terminators)
    check(tmp_path / "merged")


def test_new_tokens_trained_under_zero_3_are_the_same_in_vllm(grown_rows, tmp_path):
    """What two ranks export that hold half of each matrix, by each kind of training, tied and untied."""
    run_ranks("tests.models.zero_new_tokens:matrix", 2, {"folder": str(grown_rows), "out": str(tmp_path)}, timeout=400)
    prompts = [list(ids) for ids in test_new_tokens.IDS]
    exports = sorted(tmp_path.glob("*/merged"))
    assert len(exports) == 2 * len(test_new_tokens.KINDS)
    for folder in exports:
        logps, *_ = in_vllm(folder, prompts)
        for mine, theirs in zip(own(folder, prompts), logps, strict=True):
            assert mine == pytest.approx(theirs, abs=FP32), folder.parent.name


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_an_export_in_half_the_bytes_is_the_same_in_vllm(dtype, grown, tmp_path):
    from ptl import cli

    assert cli.main(["export", str(grown / "True"), "--out", str(tmp_path / dtype), "--dtype", dtype]) == 0
    check(tmp_path / dtype)


def test_the_server_may_write_with_vllm(grown):
    """The same answer, piece by piece, as from transformers; a stop text and a client that leaves end the request."""
    folder = grown / "True"
    renderer = Renderer(load_tokenizer(str(folder)))
    own = ModelWriter(load_model(resolve_model(str(folder)), device=torch.device("cpu")).eval())
    writer = VLLMWriter(folder, dtype="fp32")
    try:
        assert writer.longest == own.longest and writer.ends == own.ends
        how = {"temperature": 0.0, "max_new_tokens": 12}
        mine, theirs = Reply(own, renderer, DIALOGUE, **how), Reply(writer, renderer, DIALOGUE, **how)
        said, pieces = "".join(mine), list(theirs)
        assert (theirs.ids, theirs.end, theirs.finish) == (mine.ids, mine.end, mine.finish)
        assert "".join(pieces) == said and len(pieces) > 1
        stop = said.strip()[3:5]
        ended = Reply(writer, renderer, DIALOGUE, **how, stops=[stop])
        assert stop in "".join(ended) and ended.finish == "text" and len(ended.ids) < len(mine.ids)
        leaves = iter(Reply(writer, renderer, DIALOGUE, temperature=1.0, max_new_tokens=200, seed=1))
        next(leaves)
        leaves.close()
        assert "".join(Reply(writer, renderer, DIALOGUE, **how)) == said
        drawn = [
            "".join(Reply(writer, renderer, DIALOGUE, temperature=1.0, max_new_tokens=12, seed=s)) for s in (1, 1, 2)
        ]
        assert drawn[0] == drawn[1] != drawn[2]
    finally:
        writer.close()
