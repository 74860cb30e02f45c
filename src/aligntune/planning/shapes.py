"""How large is a model? Its matrices, counted from `config.json`; nothing is loaded and torch is not imported.

Decoder families only, and of those the dense ones: `FAMILIES` has one line for each, with what tells it from Llama.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from aligntune.config.base import LoraSettings
from aligntune.errors import ModelError
from aligntune.models.files import adapter_base, is_model_folder


@dataclass(frozen=True)
class Family:
    """What a model type has beside the common parts. Llama is the default of every field."""

    tied: bool = False
    """Whether the embedding is the head while the config does not say."""
    bias: str = ""
    """Linear layers with a bias: `qkv`, `all`, `config` (by `attention_bias` and `mlp_bias`), or none."""
    gated: bool = True
    """Three matrices in the feed-forward part (gate, up, down), not two."""
    norms: int = 2
    """Norms of width `hidden` in a layer."""
    norm_bias: bool = False
    """LayerNorm (scale and shift), not RMSNorm."""
    head_norm: str = ""
    """Norms of queries and keys: `head` (width of one head), `all` (of all heads), or none."""
    wide_norms: bool = False
    """Whether RMSNorm multiplies by its weight in float32."""
    normed_result: bool = False
    """Whether the result of the feed-forward part is normed before it is added."""
    fused: bool = False
    """One matrix for queries, keys and values, and (gated) one for gate and up."""
    positions: bool = False
    """A table of positions."""
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers, in the order of `Shape.linears`."""
    adapters: tuple[str, ...] | None = ("q_proj", "v_proj")
    """PEFT's choice of LoRA targets; None: all linear layers."""
    keys: tuple[tuple[str, str], ...] = ()
    """Config keys that have other names here."""
    defaults: tuple[tuple[str, int], ...] = ()
    """Values that a config may leave out."""


_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_PHI3 = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_GPT2 = ("c_attn", "c_proj", "c_fc", "c_proj")
_GPT2_KEYS = (("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"),
              ("intermediate_size", "n_inner"), ("max_position_embeddings", "n_positions"))  # fmt: skip

FAMILIES = {
    "llama": Family(bias="config"),
    "mistral": Family(),
    "qwen2": Family(bias="qkv"),
    "qwen3": Family(bias="config", head_norm="head", defaults=(("head_dim", 128),)),
    "gemma": Family(tied=True, wide_norms=True, defaults=(("head_dim", 256),)),
    "gemma2": Family(tied=True, norms=4, normed_result=True, wide_norms=True, defaults=(("head_dim", 256),)),
    "gemma3_text": Family(tied=True, norms=4, normed_result=True, wide_norms=True, head_norm="head", defaults=(("head_dim", 256),)),
    "granite": Family(bias="config", adapters=None),
    "smollm3": Family(tied=True, bias="config", adapters=None),
    "olmo2": Family(bias="config", head_norm="all", normed_result=True, wide_norms=True, adapters=None),
    "phi3": Family(fused=True, names=_PHI3, adapters=None),
    "gpt_neox": Family(bias="all", gated=False, norm_bias=True, fused=True, names=_NEOX,
                       adapters=("query_key_value",), keys=(("num_key_value_heads", "num_attention_heads"),)),
    "gpt2": Family(tied=True, bias="all", gated=False, norm_bias=True, fused=True, positions=True, names=_GPT2,
                   adapters=("c_attn",), keys=_GPT2_KEYS),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes that decide memory. `linears`: the matrices of one layer as (name, inputs, outputs, has a bias)."""

    name: str
    family: Family = field(repr=False)
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    positions: int = 0
    attention_bias: bool = False
    mlp_bias: bool = False
    softcap: bool = False
    """Whether attention scores are soft-capped, which only plain (`eager`) attention computes."""

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; values are as wide."""
        return self.kv_heads * self.head_dim

    @cached_property
    def linears(self) -> list[tuple[str, int, int, bool]]:
        family, h, q, k, i = self.family, self.hidden, self.queries, self.keys, self.inner
        projections = [(h, q + 2 * k)] if family.fused else [(h, q), (h, k), (h, k)]
        opening = ([(h, 2 * i)] if family.fused else [(h, i), (h, i)]) if family.gated else [(h, i)]
        attention = [(*size, self.attention_bias or family.bias == "qkv") for size in projections]
        attention.append((q, h, self.attention_bias))
        mlp = [(*size, self.mlp_bias) for size in [*opening, (i, h)]]
        return [(name, *rest) for name, rest in zip(family.names, [*attention, *mlp], strict=True)]

    @property
    def layer_matrices(self) -> int:
        """Parameters of the matrices of one layer."""
        return sum(inputs * outputs for _, inputs, outputs, _ in self.linears)

    @property
    def layer_parameters(self) -> int:
        family = self.family
        norms = family.norms * self.hidden * (2 if family.norm_bias else 1)
        heads = {"": 0, "head": 2 * self.head_dim, "all": self.queries + self.keys}[family.head_norm]
        return self.layer_matrices + sum(outputs for *_, outputs, bias in self.linears if bias) + norms + heads

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; the head is of the same size."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        tables = self.embedding * (1 if self.tied else 2) + self.positions * self.hidden
        return tables + self.layers * self.layer_parameters + self.hidden * (2 if self.family.norm_bias else 1)

    def targets(self, lora: LoraSettings) -> list[tuple[int, int]]:
        """(inputs, outputs) of the matrices of a layer that get an adapter. ModelError for names that it has not got."""
        names = self.target_names(lora)
        return [(inputs, outputs) for name, inputs, outputs, _ in self.linears if name in names]

    def target_names(self, lora: LoraSettings) -> set[str]:
        """Names of the matrices that get an adapter, as `targets`."""
        wanted = lora.target_modules
        if isinstance(wanted, list):
            missing = sorted({name.rsplit(".", 1)[-1] for name in wanted} - set(self.family.names))
            if missing and lora.strict_targets:
                known = ", ".join(dict.fromkeys(self.family.names))
                raise ModelError(
                    f"target_modules: {self.name} has no {', '.join(missing)}; its linear layers are {known}"
                )
            wanted = None if missing else [name.rsplit(".", 1)[-1] for name in wanted]
        if wanted is None:
            wanted = list(self.family.adapters) if self.family.adapters else "all-linear"
        if isinstance(wanted, str) and wanted != "all-linear":
            paths = {
                name: f"model.layers.0.{'self_attn' if at < 4 else 'mlp'}.{name}"
                for at, name in enumerate(self.family.names)
            }
            wanted = [name for name, path in paths.items() if re.fullmatch(wanted, path)]
        return {name for name, *_ in self.linears if wanted == "all-linear" or name in wanted}

    def adapter_parameters(self, lora: LoraSettings) -> int:
        """A matrix of `inputs x rank` and one of `rank x outputs` for each target."""
        return self.layers * sum(lora.rank * (inputs + outputs) for inputs, outputs in self.targets(lora))


def shape_of(config: dict[str, Any], name: str) -> Shape:
    """The shape that a `config.json` describes. ModelError for an architecture that no formula here covers."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        what = f"its model_type is {kind!r}" if kind else "its config.json has no model_type"
        raise ModelError(
            f"{name}: cannot be planned, {what}; formulas exist for {', '.join(FAMILIES)}. `aligntune train --dry-run` checks the rest of the run"
        )
    family = FAMILIES[kind]
    names = dict(family.keys)
    values = dict(family.defaults) | {key: value for key, value in config.items() if value is not None}

    def size(key: str, otherwise: int | None = None) -> int:
        found = values.get(names.get(key, key), values.get(key, otherwise))
        if not isinstance(found, int):
            raise ModelError(f"{name}: its config.json has no whole number under {names.get(key, key)}")
        return found

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    by_config = family.bias == "config"
    return Shape(
        name, family, hidden, size("intermediate_size", 4 * hidden if kind == "gpt2" else None), size("num_hidden_layers"), heads,
        size("num_key_value_heads", heads), size("head_dim", hidden // heads), size("vocab_size"),
        bool(values.get("tie_word_embeddings", family.tied)), size("max_position_embeddings") if family.positions else 0,
        bool(values.get("attention_bias", kind == "gpt_neox")) if by_config or kind == "gpt_neox" else family.bias == "all",
        bool(values.get("mlp_bias", False)) if by_config else family.bias == "all",
        bool(values.get("attn_logit_softcapping", 50.0 if kind == "gemma2" else None)),
    )  # fmt: skip


def read_shape(name: str) -> Shape:
    """The shape of a local model folder, of an adapter's base, or of a hub model whose config is in the local cache."""
    return shape_of(read_config(name), name)


def saved_bytes_per_parameter(name: str) -> int:
    """Of the format that the model was saved in."""
    config = read_config(name)
    return 4 if "32" in str(config.get("dtype", config.get("torch_dtype", "float32"))) else 2


def read_config(name: str) -> dict[str, Any]:
    """`config.json` of a model. ModelError says what to do when it cannot be had."""
    if is_model_folder(name):
        base = adapter_base(name)
        if base is not None:
            return read_config(base)
        path: Path | None = Path(name).expanduser() / "config.json"
    else:
        path = _cached(name)
    if path is None:
        raise ModelError(
            f"{name}: no such folder, and its config is not in the hub's cache. Give a local folder, or fetch the config first: hf download {name} config.json"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds no settings by name")
    return config


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise ModelError(f"{name}: is neither a folder nor a hub name") from error
    return Path(found) if isinstance(found, str) else None
