"""Rollouts by vLLM: in this process on the trainer's GPU, or from a server over HTTP.

Both get new weights through a folder: adapters are saved and loaded as LoRA, full models are saved and reloaded in place.
Put the folder on a memory file system. vLLM reports one log-probability a token, of the processed distribution, so
`Rollouts.log_probs` is None where penalties or truncation reshape it. Written against vLLM 0.33.

A server has to be started as `vllm serve FOLDER --logprobs-mode processed_logprobs --generation-config vllm`, with
VLLM_SERVER_DEV_MODE=1 for weight updates, or with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 for adapters.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from aligntune.errors import BackendError, require
from aligntune.models.forward import causal_model
from aligntune.rollouts.base import Rollouts, SamplingParams, check_prompts, cut_at_stop

ADAPTER = "aligntune"
"""Adapters are loaded as aligntune-1, aligntune-2, ...: vLLM keeps cached prefixes by name."""


class VLLMColocated:
    """An engine of vLLM in this process. `settings` go to `vllm.LLM` (`gpu_memory_utilization`, `max_model_len`, ...)."""

    name = "vllm"

    def __init__(self, model: nn.Module, weights_dir: str | Path, **settings: Any) -> None:
        self.vllm = require("vllm", extra="vllm", why="rollouts by vLLM")
        self.model, self.weights_dir = model, Path(weights_dir)
        self.updates = 0
        _save_base(model, self.weights_dir)
        fixed = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm", "skip_tokenizer_init": True}
        self.llm = self.vllm.LLM(model=str(self.weights_dir), enable_lora=_has_adapter(model), **fixed, **settings)
        self.adapter: Any = None
        if _has_adapter(model):
            self.update_weights()

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        """See `RolloutEngine`."""
        check_prompts(prompt_ids)
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in prompt_ids]
        sampling = [self.vllm.SamplingParams(**_request(params, i), detokenize=False) for i in range(len(prompts))]
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False, lora_request=self.adapter)
        rows = []
        for output in outputs:
            for choice in sorted(output.outputs, key=lambda o: o.index):
                values = [at[token].logprob for at, token in zip(choice.logprobs, choice.token_ids, strict=True)]
                rows.append((list(choice.token_ids), values))
        return _rollouts(rows, params)

    def update_weights(self) -> None:
        """Save the policy and load it into vLLM; forget prefixes computed with the old weights."""
        self.updates += 1
        if _has_adapter(self.model):
            path = _save_adapter(self.model, self.weights_dir)
            request = require("vllm.lora.request", extra="vllm").LoRARequest
            self.adapter = request(f"{ADAPTER}-{self.updates}", self.updates, str(path))
        else:
            _save_base(self.model, self.weights_dir)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.weights_dir)})
        self.llm.reset_prefix_cache()

    def release(self) -> None:
        """Nothing to do: vLLM keeps the share of memory that it was given."""


class VLLMServer:
    """A vLLM server at `url`. `weights_dir` must be seen by both machines under the same path; `parallel` requests are
    in flight at a time; `timeout` seconds bound each."""

    name = "vllm-server"

    def __init__(
        self, model: nn.Module, url: str, weights_dir: str | Path, *, parallel: int = 64, timeout: float = 600
    ) -> None:
        self.model, self.url, self.weights_dir = model, url.rstrip("/"), Path(weights_dir)
        self.parallel, self.timeout = parallel, timeout
        self.updates = 0
        served = self._call("/v1/models", None)["data"]
        if not served:
            raise BackendError(f"the vLLM server at {self.url} serves no model")
        self.served = served[0]["id"]
        self.update_weights()

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        """See `RolloutEngine`."""
        check_prompts(prompt_ids)
        with ThreadPoolExecutor(self.parallel) as pool:
            answers = list(pool.map(lambda item: self._complete(item[1], params, item[0]), enumerate(prompt_ids)))
        return _rollouts([row for answer in answers for row in answer], params)

    def _complete(
        self, prompt: Sequence[int], params: SamplingParams, index: int
    ) -> list[tuple[list[int], list[float]]]:
        body = {"model": self.served, "prompt": list(prompt), "return_token_ids": True, **_request(params, index)}
        choices = sorted(self._call("/v1/completions", body)["choices"], key=lambda choice: choice["index"])
        if any(choice.get("token_ids") is None for choice in choices):
            raise BackendError(f"the server at {self.url} returns no token ids: vLLM 0.10.2 or newer is needed")
        return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]

    def update_weights(self) -> None:
        """Save the policy where the server reads it, and tell the server."""
        if _has_adapter(self.model):
            path, before = _save_adapter(self.model, self.weights_dir), self.served
            self.updates += 1
            self.served = f"{ADAPTER}-{self.updates}"
            self._call("/v1/load_lora_adapter", {"lora_name": self.served, "lora_path": str(path)})
            if self.updates > 1:
                self._call("/v1/unload_lora_adapter", {"lora_name": before})
            return
        _save_base(self.model, self.weights_dir)
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.weights_dir)}})
        self._call("/reset_prefix_cache", {})

    def release(self) -> None:
        """Nothing to do: the memory is the server's."""

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        """POST the body (GET without one); BackendError with what the server said."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                text = response.read().decode()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            hint = " (see aligntune.rollouts.vllm for how to start the server)" if error.code == 404 else ""
            raise BackendError(f"the vLLM server refused {path} with {error.code}: {said}{hint}") from error
        except OSError as error:
            raise BackendError(f"no vLLM server answers at {self.url}: {error}") from error
        return json.loads(text) if text.startswith(("{", "[")) else text


def _request(params: SamplingParams, index: int) -> dict[str, Any]:
    """Sampling settings in vLLM's names, alike for `SamplingParams` and the completions API. Only our stop tokens stop."""
    return {
        "max_tokens": params.max_new_tokens, "n": params.num_generations, "temperature": params.temperature,
        "top_p": params.top_p, "top_k": params.top_k, "min_p": params.min_p, "repetition_penalty": params.repetition_penalty,
        "stop_token_ids": list(params.stop_token_ids), "ignore_eos": True, "logprobs": 0,
        "seed": None if params.seed is None else params.seed + index, **params.generation_kwargs,
    }  # fmt: skip


def _rollouts(rows: list[tuple[list[int], list[float]]], params: SamplingParams) -> Rollouts:
    result = Rollouts([], None if params.reshapes else [], [], [])
    for tokens, values in rows:
        length, finished = cut_at_stop(tokens, params.stop_token_ids)
        result.completion_ids.append(tokens[:length])
        result.finished.append(finished)
        result.sampler_log_probs.append([0.0] * length if params.greedy else values[:length])
        if result.log_probs is not None:
            result.log_probs.append(values[:length])
    return result


def _has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def _save_base(model: nn.Module, folder: Path) -> None:
    """Weights in the model's own names; of a PEFT model, those without the adapter."""
    causal = causal_model(model)
    if not _has_adapter(model):
        causal.save_pretrained(folder)
        return
    plain = {
        name.replace(".base_layer.", "."): weight
        for name, weight in causal.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    causal.save_pretrained(folder, state_dict=plain)


def _save_adapter(model: Any, folder: Path) -> Path:
    path = folder / "adapter"
    model.save_pretrained(path)
    return path
