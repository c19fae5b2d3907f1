"""The engine that draws with vLLM: in a process beside each rank, or on a server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ptl.models.adapters import is_adapted
from ptl.models.export import DTYPES, float_dtype
from ptl.models.heads import causal_lm
from ptl.models.spec import CHANGES_BASE, ModelSpec
from ptl.rollout.engine import Abilities, Asked, Draw, Draws, Engine
from ptl.rollout.ranks import agreed
from ptl.rollout.sampling import Sampled
from ptl.rollout.vllm_requests import RANKS, sampling
from ptl.rollout.vllm_server import Server
from ptl.rollout.weights import shared_folder, tied, write_adapter, write_model

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

INSTALL = "make install-vllm on a CPU, or pip install vllm==0.32.0 where there is a GPU"
LOOK_CACHE = 2 << 30
"""Bytes for keys and values of one dialogue on a CPU."""


class VLLM(Engine):
    """Draws with vLLM (arXiv:2309.06180), an optional package.

    The policy's weights go to vLLM as files in ``folder`` whenever they have changed: of a policy with an adapter the
    base once and then the adapter alone, else all. Kept keys and values are dropped then. With ``top_p`` below 1 the
    log-probabilities are not known and left out.

    Arguments:
        mode: ``colocate`` starts an engine beside each rank, on the rank's own device, when it is first asked;
            ``server`` asks one that was started before. On a GPU a colocated engine gives its memory back while the
            policy trains.
        url: of the server, ``http://host:port``.
        folder: where weights pass through, such as a file system in memory. All ranks of a node see the same, and a
            server sees that of the first rank.
        dtype: of vLLM's weights: ``bf16``, ``fp16`` or ``fp32``; None takes the policy's own.
        kv_cache_gib: memory for keys and values of a colocated engine.
        max_model_len: most tokens of a prompt with its answer in a colocated engine; None is what the model can take.
        enforce_eager: leave out compiling and CUDA graphs: a colocated engine starts sooner and draws slower.
        timeout_s: longest that vLLM may take to load weights, or a server to answer.

    Raises:
        ValueError: a value out of its range, or two that do not fit.
    """

    abilities = Abilities(logprobs=True, zero3=True, quantized=False, reproducible=False)

    def __init__(
        self,
        *,
        mode: Literal["colocate", "server"] = "colocate",
        url: str | None = None,
        folder: str = "/dev/shm",
        dtype: Literal["bf16", "fp16", "fp32"] | None = None,
        kv_cache_gib: float = 4.0,
        max_model_len: int | None = None,
        enforce_eager: bool = False,
        timeout_s: float = 1800.0,
    ) -> None:
        if mode not in ("colocate", "server"):
            raise ValueError(f"model.engine.mode must be colocate or server, got {mode!r}")
        if (mode == "server") != (url is not None):
            raise ValueError("model.engine.url is for mode server, and is needed there: http://host:port")
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"model.engine.url must start with http:// or https://, got {url!r}")
        for name, number in (
            ("kv_cache_gib", kv_cache_gib),
            ("timeout_s", timeout_s),
            ("max_model_len", max_model_len),
        ):
            if number is not None and not number > 0:
                raise ValueError(f"model.engine.{name} must be above 0, got {number}")
        self.folder, self.dtype, self.max_model_len = folder, dtype, max_model_len
        self.kv_cache_gib, self.enforce_eager, self.timeout_s = kv_cache_gib, enforce_eager, timeout_s
        self._server = Server(url, timeout_s) if url is not None else None
        self._beside: _Beside | None = None
        self._longest = self._vocab = 0
        self._version: int | None = None
        self._pushes = 0

    def check(self, policy: ModelSpec) -> None:
        super().check(policy)
        adapter = policy.adapter
        if adapter is None:
            return
        wrong = [name for name in ("dora", "train_tokens", "save_modules") if getattr(adapter, name)]
        wrong += ["init"] if adapter.init in CHANGES_BASE else []
        wrong += ["rank"] if adapter.rank > RANKS[-1] else []
        if wrong:
            raise ValueError(
                f"vLLM takes plain LoRA alone, of rank {RANKS[-1]} at most: remove model.policy.adapter.{wrong[0]}, or "
                "set model.engine to ptl.rollout.hf.HF"
            )

    @contextmanager
    def session(self, policy: nn.Module, strategy: Strategy, version: int) -> Iterator[Draw]:
        device = strategy.root_device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            agreed(strategy, lambda: self._beside and self._beside.wake())
            if version != self._version:
                self._version = None
                self._sync(policy, strategy)
                self._version = version
        try:
            yield self._draw
        finally:
            if self._beside is not None:
                self._beside.sleep()

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()
        self._beside, self._version = None, None

    # ---- weights ----

    def _sync(self, policy: nn.Module, strategy: Strategy) -> None:
        """Brings vLLM the policy's weights of now; all ranks together."""
        adapted, first = is_adapted(policy), self._longest == 0
        self._vocab = int(causal_lm(policy).config.get_text_config().vocab_size)
        rank: int | None = policy.peft_config["default"].r if adapted else None  # pyright: ignore
        server = self._server
        if server is not None:
            self._longest = agreed(strategy, lambda: server.open(rank, tied(policy)))
        # A server's folder is written once, a colocated engine's once a node.
        writes = strategy.is_global_zero if server is not None else getattr(strategy, "local_rank", 0) == 0
        self._pushes += 1
        name = strategy.broadcast(f"ptl-{uuid.uuid4().hex[:12]}", src=0)
        if not adapted or (first and server is None):
            dtype = DTYPES[self.dtype] if self.dtype is not None else float_dtype(policy)
            # On a CPU vLLM keeps a packed copy of the head, which it does not make again when a tied model is reloaded.
            untied = not adapted and server is None and strategy.root_device.type == "cpu"
            with shared_folder(self.folder, name, strategy, writes) as folder:
                agreed(strategy, partial(write_model, policy, folder, dtype, writes, untied=untied))
                agreed(strategy, partial(self._load, folder, dtype, rank, strategy, writes))
        if adapted:
            with shared_folder(self.folder, f"{name}-adapter", strategy, writes) as folder:
                agreed(strategy, partial(write_adapter, policy, folder, writes))
                agreed(strategy, partial(self._adapt, folder, writes))

    def _load(self, folder: Path, dtype: torch.dtype, rank: int | None, strategy: Strategy, writes: bool) -> None:
        if self._server is not None:
            if writes:
                self._server.load(folder)
        elif self._beside is not None:
            self._beside.load(folder)
        else:
            self._beside = _Beside(
                folder,
                device=strategy.root_device,
                timeout_s=self.timeout_s,
                dtype=str(dtype).removeprefix("torch."),
                kv_cache_memory_bytes=int(self.kv_cache_gib * 2**30),
                max_model_len=self.max_model_len,
                enforce_eager=self.enforce_eager,
                **(
                    {}
                    if rank is None
                    else {
                        "enable_lora": True,
                        "max_loras": 1,
                        "max_lora_rank": next(room for room in RANKS if room >= rank),
                    }
                ),
            )
            self._longest = self._beside.longest

    def _adapt(self, folder: Path, writes: bool) -> None:
        if self._beside is not None:
            self._beside.adapt(folder, self._pushes)
        elif self._server is not None and writes:
            self._server.adapt(folder, folder.name)
        elif self._server is not None:
            self._server.use(folder.name)

    # ---- answers ----

    def _draw(self, asked: Sequence[Asked], draws: Draws) -> list[list[Sampled]]:
        if not asked:
            return []
        needed = max(len(a.ids) + a.limit for a in asked)
        if needed > self._longest:
            raise ValueError(
                f"a prompt with its answer may have {needed} tokens, and vLLM was started for {self._longest}: raise "
                "max_model_len, or lower data.max_length or the limit of new tokens"
            )
        engine = self._server or self._beside
        assert engine is not None
        # An end that the model has no row for is never drawn, and vLLM refuses to be told of it.
        known = draws._replace(stop=tuple(token for token in draws.stop if token < self._vocab))
        answers = engine.generate([list(a.ids) for a in asked], [sampling(a, known) for a in asked])
        if draws.top_p < 1:
            answers = [[Sampled(answer.ids, []) for answer in group] for group in answers]
        return answers if draws.temperature else [group * draws.samples for group in answers]


class _Beside:
    """vLLM in processes of its own beside this one, on the same device.

    Arguments:
        folder: a plain Hugging Face folder; not needed after.
        device: this rank's.
        timeout_s: longest that loading weights may take. To start, vLLM takes at most ``VLLM_ENGINE_READY_TIMEOUT_S``.
        settings: of ``vllm.LLM``.

    Raises:
        ValueError: vLLM is not installed.
        RuntimeError: it does not start.
    """

    def __init__(self, folder: Path, *, device: torch.device, timeout_s: float, **settings: Any) -> None:
        try:
            from vllm import LLM  # pyright: ignore
        except ImportError as error:
            raise ValueError(
                f"model.engine is VLLM, but vllm cannot be imported ({error}): {INSTALL}, or set model.engine to "
                "ptl.rollout.hf.HF"
            ) from error
        self.timeout_s, self.sleeps = timeout_s, device.type == "cuda"
        self.adapter: Any = None
        try:
            with _alone_on(device):
                self.llm: Any = LLM(
                    str(folder),
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    enable_sleep_mode=self.sleeps,
                    **settings,
                )
        except Exception as error:
            raise RuntimeError(
                f"vLLM did not start ({error}); what it printed above says why. Where memory is short, lower "
                "model.engine.kv_cache_gib or model.engine.max_model_len"
            ) from error
        self.longest = int(self.llm.model_config.max_model_len)

    def load(self, folder: Path) -> None:
        """Takes whole weights in place."""
        self.llm.collective_rpc("reload_weights", timeout=self.timeout_s, kwargs={"weights_path": str(folder)})
        self._forget()

    def adapt(self, folder: Path, number: int) -> None:
        """Takes an adapter in place of the last one; ``number`` is 1 or more, another one each time."""
        from vllm.lora.request import LoRARequest  # pyright: ignore

        self.adapter = LoRARequest(folder.name, number, str(folder))
        if not self.llm.llm_engine.add_lora(self.adapter):
            raise RuntimeError("vLLM did not take the adapter; what it printed above says why")
        self._forget()

    def generate(self, prompts: Sequence[list[int]], settings: Sequence[dict[str, Any]]) -> list[list[Sampled]]:
        """Answers to each prompt by its own settings."""
        from vllm import SamplingParams  # pyright: ignore

        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [SamplingParams(**each) for each in settings],
            use_tqdm=False,
            lora_request=self.adapter,
        )
        return [[_sampled(answer) for answer in sorted(o.outputs, key=lambda a: a.index)] for o in outputs]

    def sleep(self) -> None:
        """Gives a GPU's memory back: weights go to the host, keys and values are dropped."""
        if self.sleeps:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        """Takes the memory again."""
        if self.sleeps:
            self.llm.wake_up()

    def close(self) -> None:
        """Ends the processes."""
        self.llm.llm_engine.engine_core.shutdown()

    def _forget(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps answers of old weights: its cache was not reset")


class VLLMWriter:
    """vLLM on the folder of a whole model, for one dialogue at a time: a ``ptl.apps.reply.Writer``.

    Arguments:
        folder: a plain Hugging Face folder.
        dtype: ``bf16``, ``fp16`` or ``fp32``; None takes the folder's own.

    Raises:
        ValueError: vLLM is not installed, or does not start.
    """

    def __init__(self, folder: Path, *, dtype: str | None = None) -> None:
        try:
            from vllm import LLM  # pyright: ignore
        except ImportError as error:
            raise ValueError(f"--engine vllm needs vllm, which cannot be imported ({error}): {INSTALL}") from error
        from transformers import GenerationConfig

        try:
            own = GenerationConfig.from_pretrained(folder).eos_token_id
        except OSError:  # a folder without one
            own = None
        self.ends = frozenset([] if own is None else [own] if isinstance(own, int) else own)
        on_cpu = not torch.cuda.is_available()
        try:
            self._llm: Any = LLM(
                str(folder),
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype="auto" if dtype is None else str(DTYPES[dtype]).removeprefix("torch."),
                enforce_eager=on_cpu,  # compiling takes longer than a look
                # On a CPU vLLM would ask for nine tenths of the memory. Where a whole context needs more than this,
                # it takes a shorter one.
                kv_cache_memory_bytes=LOOK_CACHE if on_cpu else None,
                max_model_len=-1,
            )
        except Exception as error:
            raise ValueError(
                f"vLLM did not start ({error}); what it printed above says why. --engine transformers goes without it"
            ) from error
        self.longest = int(self._llm.model_config.max_model_len)
        self._asked = 0

    def tokens(
        self, prompt: Sequence[int], *, temperature: float, top_p: float, seed: int | None, limit: int, ends: set[int]
    ) -> Iterator[int]:
        from vllm import SamplingParams  # pyright: ignore

        engine, name = self._llm.llm_engine, str(self._asked)
        self._asked += 1
        how = {"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": limit, "detokenize": False}
        engine.add_request(name, {"prompt_token_ids": list(prompt)}, SamplingParams(**how, stop_token_ids=sorted(ends)))
        given = 0
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    ids = list(output.outputs[0].token_ids)
                    yield from ids[given:]
                    given = len(ids)
        finally:
            engine.abort_request([name])  # the client has left, or a stop text has come

    def close(self) -> None:
        """Ends vLLM's processes."""
        self._llm.llm_engine.engine_core.shutdown()


def _sampled(answer: Any) -> Sampled:
    ids = list(answer.token_ids)
    return Sampled(ids, [step[token].logprob for token, step in zip(ids, answer.logprobs, strict=True)])


@contextmanager
def _alone_on(device: torch.device) -> Iterator[None]:
    """Processes that start inside see no other GPU; on a CPU, not ``MKL_NUM_THREADS``.

    There vLLM keeps to some of the cores and sets ``OMP_NUM_THREADS`` to their number, but not MKL's: more threads than
    cores wait for each other, ten times slower.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    changed: dict[str, str | None] = {"MKL_NUM_THREADS": None}
    if device.type == "cuda":
        index = device.index or 0
        changed = {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}
    before = {name: os.environ.get(name) for name in changed}
    _set(changed)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
