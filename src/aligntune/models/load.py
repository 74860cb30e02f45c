"""How is a model loaded for training? Weights, precision, quantisation, attention kernel, LoRA."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, set_seed

from aligntune.config import rl, sft
from aligntune.errors import ConfigError, ModelError, require
from aligntune.models.files import adapters_of, explain_missing, is_model_folder
from aligntune.models.kernels.attention import VARLEN, resolve_attention
from aligntune.models.lora import add_lora, head_names, is_quantised, merge, rounded_away, task_of
from aligntune.models.precision import Precision, device
from aligntune.models.start import base_of, name_adapters, start_of
from aligntune.models.tokenizer import fit_embeddings

logger = logging.getLogger(__name__)

ModelConfig = sft.ModelConfig | rl.ModelConfig

OWN_NAMES = {
    "dtype": "precision", "torch_dtype": "precision", "attn_implementation": "attn_implementation", "device_map": "device_map",
    "max_memory": "max_memory", "quantization_config": "quantization", "num_labels": "num_labels",
}  # fmt: skip

PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of transformers to spread a model over devices."""


def load_policy(
    config: ModelConfig, precision: Precision, *, seed: int, auto_class: Any = AutoModelForCausalLM, tokenizer: Any = None,
    **head: Any,
) -> Any:  # fmt: skip
    """The model to train, with its LoRA adapter if one is asked for.

    `auto_class` and `head` (e.g. `num_labels`) choose the head. An adapter folder as `name_or_path` is merged into its
    base, which is then trained further. `seed` decides new weights (adapter, head). The tokens of `tokenizer` get their rows
    in the embedding, which cannot grow once an adapter lies around it. Raises `ModelError` when nothing would be trained.
    """
    set_seed(seed)
    lora = config.lora
    trained = lora is None
    model = load_model(config, precision, trained=trained, auto_class=auto_class, **head)
    if tokenizer is not None:
        fit_embeddings(model, tokenizer)
    if config.quantization and lora is not None:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    if lora is not None:
        model = add_lora(model, lora, head=auto_class is not AutoModelForCausalLM)
        name_adapters(model, config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"{config.name_or_path}: no parameter is trainable, so training would change nothing")
    return model


def load_model(
    config: ModelConfig, precision: Precision, *, trained: bool, name: str | None = None, auto_class: Any = AutoModelForCausalLM,
    init_kwargs: dict[str, Any] | None = None, **head: Any,
) -> Any:  # fmt: skip
    """The bare model `name` (default: where the config's policy starts), placed on its device, without a new adapter."""
    name = name or start_of(config)
    is_model_folder(name)
    base = base_of(config, name)
    kwargs = loading_arguments(config, precision, trained, init_kwargs)
    try:
        found = AutoConfig.from_pretrained(base or name, **_config_kwargs(kwargs))
        kwargs |= _attention(config, found, auto_class) | head
        model = auto_class.from_pretrained(base or name, **kwargs)
    except (OSError, KeyError) as error:
        raise ModelError(explain_missing(base or name, "weights", error)) from error
    except ValueError as error:
        if any(
            said in str(error) for said in ("trust_remote_code", "Unrecognized", "does not recognize this architecture")
        ):
            raise ModelError(explain_missing(base or name, "weights", error)) from error
        raise
    except SafetensorError as error:
        raise ModelError(
            f"{base or name}: a weight file is damaged or cut off ({error}); copy or download it again"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ModelError(f"{base or name}: its weights have other shapes than its config.json says") from error
        raise
    except TypeError as error:
        unknown = [key for key in kwargs if f"unexpected keyword argument '{key}'" in str(error)]
        if unknown:
            raise ConfigError(f"model.model_init_kwargs.{unknown[0]}: the model takes no such argument") from error
        raise
    if base is not None:
        model = merge_adapter(model, name)
        model.lies_on = [base, *adapters_of(name)]
    if "device_map" not in kwargs:
        model.to(device())
    return model


def merge_adapter(model: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """The model with a saved LoRA adapter, and those that it lies on, added into its weights; tokens that were added in training
    are added here too. On a quantised model it is laid, frozen: added, it would be rounded with it."""
    adapted = with_adapter(model, adapter)
    return adapted.requires_grad_(False) if is_quantised(model) else merge(adapted).requires_grad_(True)


def with_adapter(model: PreTrainedModel, adapter: str | Path) -> Any:
    """The model under a saved adapter, as PEFT runs it; adapters that it lies on are merged.

    A classifier's head in an adapter that is of another shape than the model's is left out. Raises `ModelError` when model and
    adapters do not fit.
    """
    *below, top = adapters_of(str(adapter))
    if below and is_quantised(model):
        raise ModelError(rounded_away(str(adapter)))
    for other in below:
        model = merge(_under(model, other))
    return _under(model, top)


def _under(model: PreTrainedModel, adapter: str) -> Any:
    from peft import PeftConfig, PeftModel

    if not any((Path(adapter) / f"adapter_model.{kind}").exists() for kind in ("safetensors", "bin")):
        raise ModelError(f"{adapter}: has an adapter_config.json, but no weights (adapter_model.safetensors)")
    try:
        rows = _embedding_rows(model, Path(adapter))
        if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            config = PeftConfig.from_pretrained(str(adapter))
            other = _other_head(model, Path(adapter))
            if other:
                config.modules_to_save = config.task_type = None  # by its task PEFT would look for a head
            adapted = PeftModel.from_pretrained(model, str(adapter), config=config, ignore_mismatched_sizes=other)
    except SafetensorError as error:
        raise ModelError(f"{adapter}: its weight file is damaged or cut off ({error}); copy it again") from error
    except (RuntimeError, ValueError, UserWarning) as error:
        base = model.config.name_or_path
        raise ModelError(f"{adapter}: the adapter does not fit the model {base} ({_shortly(error)})") from error
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.peft_config["default"].peft_type.value
        raise ModelError(f"{adapter}: is of the kind {kind}, which has no weights that could be added to the model's")
    return adapted


def _other_head(model: PreTrainedModel, adapter: Path) -> bool:
    """Whether an adapter has a head for other classes than the model's, or for another task."""
    file = adapter / "adapter_model.safetensors"
    if task_of(model) is None or not file.exists():
        return False
    own = {
        f"base_model.model.{name}.{part}": list(weight.shape)
        for name in head_names(model)
        for part, weight in model.get_submodule(name).named_parameters()
    }
    with safe_open(file, framework="pt") as tensors:
        given = {key: tensors.get_slice(key).get_shape() for key in tensors.keys() if ".lora_" not in key}  # noqa: SIM118
    return any(given.get(key) != shape for key, shape in own.items())


def _shortly(error: Exception) -> str:
    """The first line of an error that says something, of no more than 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), type(error).__name__)[:200]


def _embedding_rows(model: PreTrainedModel, adapter: Path) -> int | None:
    """Rows of the embedding or the head that PEFT saved with an adapter, which it does after a resize; else None."""
    file = adapter / "adapter_model.safetensors"
    if not file.exists():
        return None
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    endings = tuple(f"{name}.{inner}weight" for name in names for inner in ("", "base_layer."))
    with safe_open(file, framework="pt") as tensors:
        found = [key for key in tensors.keys() if key.endswith(endings)]  # noqa: SIM118  (no mapping)
        return int(tensors.get_slice(found[0]).get_shape()[0]) if found else None


def loading_arguments(
    config: ModelConfig, precision: Precision, trained: bool, init_kwargs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that the settings mean; the attention kernel follows from the model's config."""
    given = dict(config.model_init_kwargs if init_kwargs is None else init_kwargs)
    for name in given:
        if name in OWN_NAMES:
            raise ConfigError(
                f"model.model_init_kwargs.{name}: has a setting of its own, model.{OWN_NAMES[name]}; use that"
            )
    kwargs: dict[str, Any] = {"dtype": precision.weights(trained=trained)}
    if config.quantization:
        four_bit = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": precision.compute}
        settings = (four_bit if config.quantization.get("load_in_4bit") else {}) | config.quantization
        kwargs["quantization_config"] = quantization_config(settings, "model.quantization")
        kwargs["device_map"] = {"": device()}
    if config.device_map not in (None, "auto"):
        kwargs["device_map"] = _known_devices(config.device_map)
    if config.max_memory is not None:
        kwargs["max_memory"] = _memory_limits(config.max_memory)
        kwargs.setdefault("device_map", "auto")
    if isinstance(config, rl.ModelConfig):
        kwargs["trust_remote_code"] = config.trust_remote_code
    return kwargs | given


def _known_devices(device_map: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(device_map, str) and device_map in PLACEMENTS:
        return device_map
    for place in device_map.values() if isinstance(device_map, dict) else [device_map]:
        if place != "disk":
            _known_device(place, "model.device_map")
    return device_map


def _memory_limits(given: dict[str | int, str | int]) -> dict[str | int, str | int]:
    limits: dict[str | int, str | int] = {int(key) if str(key).isdigit() else key: size for key, size in given.items()}
    for place, size in limits.items():
        if place != "disk":
            _known_device(place, "model.max_memory")
        try:
            convert_file_size_to_int(size)
        except ValueError:
            raise ConfigError(f"model.max_memory: {size!r} is not a size such as 20GB or 20GiB") from None
    return limits


def _known_device(place: Any, setting: str) -> None:
    """Raises `ConfigError` for what is no device, and for a GPU where there is none."""
    try:
        kind = torch.device(place).type
    except RuntimeError:
        if not isinstance(place, int):
            raise ConfigError(
                f"{setting}: {place!r} is not a device: say cpu, cuda:0, ..., disk (a part's place), or {', '.join(PLACEMENTS)}"
            ) from None
        kind = "cuda"
    if (kind == "cuda" or isinstance(place, int)) and not torch.cuda.is_available():
        raise ConfigError(f"{setting}: names {place!r}, and this machine has no CUDA device; leave it out")


def _attention(config: ModelConfig, model_config: Any, auto_class: Any) -> dict[str, Any]:
    wanted = VARLEN if config.attn_implementation == "varlen" else config.attn_implementation
    if wanted.startswith("flash_attention"):
        require("flash_attn", extra="flash", why=f"attn_implementation: {wanted}")
    model_class = auto_class._model_mapping.get(type(model_config), None)  # None: its code comes from a repository
    implementation, reason = resolve_attention(wanted, device(), model_config, model_class)
    logger.info("attention: %s (%s)", implementation, reason)
    return {"attn_implementation": implementation}


def _config_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that reading a model's config takes too."""
    return {
        name: kwargs[name]
        for name in ("trust_remote_code", "revision", "token", "cache_dir", "subfolder")
        if name in kwargs
    }


def quantization_config(settings: dict[str, Any], name: str) -> BitsAndBytesConfig:
    """`settings`, given as `name`.

    Raises `ConfigError` for a field that is none (transformers takes it and does nothing), and for bad values.
    """
    known = BitsAndBytesConfig().to_dict()
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(f"{name}.{unknown[0]} is not a field of BitsAndBytesConfig ({', '.join(sorted(known))})")
    require("bitsandbytes", extra="quant", why=name)
    try:
        return BitsAndBytesConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error
