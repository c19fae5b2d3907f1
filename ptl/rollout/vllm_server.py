"""A vLLM server that someone else has started, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from ptl.rollout.sampling import Sampled

START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --tokens-only --generation-config vllm "
    "--logprobs-mode processed_logprobs --dtype DTYPE"
)
START_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 {start} --enable-lora --max-loras 1 --max-lora-rank {rank}"
AT_A_TIME = 128
"""Requests of a rank that are under way together."""


class Server:
    """Speaks to ``vllm serve``.

    The doors that take weights are open only in vLLM's development mode, and to anyone who reaches the port: the
    server belongs on a private network.

    Arguments:
        url: ``http://host:port``.
        timeout_s: longest that a request may take; one that generates may be long.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self.start_line = START
        self._model = self._adapter = ""
        self._opener = build_opener(ProxyHandler({}))  # a cluster's proxy does not lead to its own nodes

    def open(self, rank: int | None, tied: bool) -> int:
        """Finds out whether the server can serve this run.

        Args:
            rank: the adapter's, or None.
            tied: whether embedding and head of the policy are one matrix.

        Returns:
            Most tokens of prompt and answer.

        Raises:
            RuntimeError: no server there, or one that was started otherwise; with the line that starts it.
        """
        self.start_line = START if rank is None else START_LORA.format(start=START, rank=rank)
        card = self._call("/v1/models")["data"][0]
        config = self._call("/server_info?config_format=json")["vllm_config"]
        model = config["model_config"]
        wrong = [
            f"{key} is {model[name]}"
            for key, name, wanted in (
                ("--logprobs-mode", "logprobs_mode", "processed_logprobs"),
                ("--generation-config", "generation_config", "vllm"),
            )
            if model[name] != wanted
        ]
        if rank is not None and not config.get("lora_config"):
            wrong.append("--enable-lora is off")
        if rank is None and tied and "cpu" in str(config["device_config"]):
            wrong.append("a CPU, where vLLM reloads only models whose config has tie_word_embeddings false")
        if wrong:
            raise RuntimeError(
                f"the vLLM server at {self.url} is another: {', '.join(wrong)}. Start it with: {self.start_line}"
            )
        self._model = card["id"]
        return int(card["max_model_len"])

    def load(self, folder: Path) -> None:
        """Has the server take whole weights from a folder that it sees too."""
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self._forget()

    def adapt(self, folder: Path, name: str) -> None:
        """Has the server take an adapter, in place of the last one."""
        self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if self._adapter:
            self._call("/v1/unload_lora_adapter", {"lora_name": self._adapter})
        self._adapter = name
        self._forget()

    def use(self, name: str) -> None:
        """Has this rank ask the adapter that another one loaded."""
        self._adapter = name

    def generate(self, prompts: Sequence[Sequence[int]], settings: Sequence[dict[str, Any]]) -> list[list[Sampled]]:
        """Answers to each prompt by its own settings."""
        with ThreadPoolExecutor(max_workers=min(AT_A_TIME, len(prompts))) as pool:
            return list(pool.map(self._one, prompts, settings))

    def _one(self, ids: Sequence[int], settings: dict[str, Any]) -> list[Sampled]:
        body = {"model": self._adapter or self._model, "token_ids": list(ids), "sampling_params": settings}
        choices = sorted(self._call("/inference/v1/generate", body)["choices"], key=lambda choice: choice["index"])
        return [
            Sampled(choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]])
            for choice in choices
        ]

    def _forget(self) -> None:
        if not self._call("/reset_prefix_cache", {})["success"]:
            raise RuntimeError(
                f"the vLLM server at {self.url} keeps answers of old weights: does something else use it?"
            )

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                text = response.read().decode()
        except HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise RuntimeError(
                f"the vLLM server at {self.url}{path} said {error.code}: {said}. Start it with: {self.start_line}"
            ) from error
        except TimeoutError as error:
            raise RuntimeError(
                f"the vLLM server at {self.url}{path} did not answer within {self.timeout_s} s: see its log, or raise "
                "model.engine.timeout_s"
            ) from error
        except (URLError, HTTPException, OSError) as error:
            raise RuntimeError(
                f"no vLLM server at {self.url} ({error}). Set model.engine.url, or start it with: {self.start_line}"
            ) from error
        return json.loads(text) if text.startswith(("{", "[")) else text
