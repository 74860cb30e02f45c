"""Which rollout engine runs here, and why?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from aligntune.errors import BackendError, ConfigError
from aligntune.models.forward import input_device
from aligntune.rollouts.base import RolloutEngine, SamplingParams
from aligntune.rollouts.graph import GraphEngine, check_rollouts
from aligntune.rollouts.transformers import TransformersEngine
from aligntune.rollouts.unsloth import UnslothEngine, patched_by_unsloth

ENGINES = ("auto", "graph", "transformers", "vllm", "vllm-server")


def select_engine(
    model: nn.Module,
    name: str = "auto",
    params: SamplingParams | None = None,
    *,
    max_rows: int | None = None,
    compile_layers: bool = True,
    weights_dir: str | Path | None = None,
    server_url: str | None = None,
    **vllm_settings: Any,
) -> tuple[RolloutEngine, str]:
    """(engine, reason). `auto` takes `graph` where it runs the model, its sampling settings and its device, and gives the
    right log-probabilities (which is tried on two short prompts); else `transformers`. vLLM runs when asked for by name:
    it keeps a second copy of the weights. `params` are the settings that will be used, as far as they are known."""
    if name not in ENGINES:
        raise ConfigError(f"there is no rollout engine '{name}'; there are {', '.join(ENGINES)}")
    if name in ("vllm", "vllm-server"):
        return _vllm(model, name, weights_dir, server_url, vllm_settings), "asked for"
    if patched_by_unsloth(model) and name in ("auto", "transformers"):
        return UnslothEngine(model, max_rows=max_rows), "Unsloth's layers read a cache in its own way"
    if name == "transformers":
        return TransformersEngine(model, max_rows=max_rows), "asked for"
    missing = _graph_missing(model, params)
    if missing is None:
        engine = GraphEngine(model, max_rows=max_rows, compile_layers=compile_layers)
        return engine, "asked for" if name == "graph" else "it runs this model, with its weights in place"
    if name == "graph":
        raise BackendError(f"the rollout engine 'graph' cannot run here: {missing}. Use 'auto' or 'transformers'")
    return TransformersEngine(model, max_rows=max_rows), f"not 'graph', since {missing}"


def _graph_missing(model: nn.Module, params: SamplingParams | None) -> str | None:
    if params is not None and params.generation_kwargs:
        return f"it does not know the generation_kwargs {', '.join(sorted(params.generation_kwargs))}"
    device = input_device(model)
    if len({p.device for p in model.parameters()}) > 1:
        return "the model is spread over several devices"
    if device.type not in ("cpu", "cuda"):
        return f"it has no kernels for {device.type}"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "its kernels need Triton"
    return check_rollouts(model)


def _vllm(
    model: nn.Module, name: str, weights_dir: str | Path | None, url: str | None, settings: dict[str, Any]
) -> RolloutEngine:
    from aligntune.rollouts.vllm import VLLMColocated, VLLMServer

    if weights_dir is None:
        raise ConfigError("rollouts by vLLM need a folder through which they get new weights: set weights_dir")
    if name == "vllm":
        return VLLMColocated(model, weights_dir, **settings)
    if url is None:
        raise ConfigError("the rollout engine 'vllm-server' needs the address of a running server: set server_url")
    return VLLMServer(model, url, weights_dir)
