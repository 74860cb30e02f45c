"""Which modules get a LoRA adapter (arXiv 2106.09685), and how does PEFT lay it around the model?"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aligntune.config.base import LoraSettings
from aligntune.errors import ModelError
from aligntune.models.files import ON_TOP

logger = logging.getLogger(__name__)


def add_lora(model: Any, lora: LoraSettings, *, head: bool = False) -> Any:
    """The model with a new LoRA adapter; with `head`, the classification head trains too and is saved with the adapter."""
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config"):
        raise ModelError(rounded_away(model.lies_on[-1]))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,  # type: ignore[arg-type]
        target_modules=lora_targets(model, lora),
        modules_to_save=head_names(model) if head else None,
        task_type=task_of(model) if head else "CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    _leave_inputs_to_autocast(adapted)
    _save_what_it_needs(adapted)
    return adapted


def _save_what_it_needs(model: Any) -> None:
    """Every saved adapter, a trainer's checkpoints too, names what it lies on (`models.files`); PEFT names the base alone."""
    below = getattr(model, "lies_on", None)
    if below is not None:
        model.peft_config["default"].base_model_name_or_path = ON_TOP.join(below)
    model.save_pretrained = partial(_save_adapter, model)


def _save_adapter(
    model: Any,
    folder: str | Path,
    *,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
    **_: Any,
) -> None:
    """Write the adapter that is trained to the folder itself, with the embedding where rows were added to it, and beside it what
    the model's `beside` holds (content by file name): an adapter has no config that could say it.

    PEFT would write all adapters, one that has a name to a folder of that name, and look for new rows at the base, which it
    cannot always read.
    """
    from peft import get_peft_model_state_dict

    if not is_main_process:
        return
    name, folder = model.active_adapter, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, state_dict, name, save_embedding_layers=has_new_rows(model))
    whole = {
        key: weight.contiguous().clone() for key, weight in weights.items()
    }  # a file holds no two names of one weight
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[name].save_pretrained(folder)
    for file, content in getattr(model, "beside", {}).items():
        (folder / file).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def has_new_rows(model: Any) -> bool:
    """Whether the embedding has rows that were added since the model was loaded."""
    return bool(getattr(model, "new_rows", False))


def merge(model: Any) -> Any:
    """The base of a PEFT model with its adapter added into the weights, in place."""
    if parts_ends(model):
        untie(model.get_base_model())
    return model.merge_and_unload()


def is_quantised(model: Any) -> bool:
    """Whether weights were quantised when the model was loaded, by a setting or in its files."""
    return getattr(model, "hf_quantizer", None) is not None


def rounded_away(adapter: str) -> str:
    """Why `adapter` cannot be merged into a quantised model, and what to do."""
    return (
        f"{adapter}: lies on a model that is quantised here, where adding an adapter to the weights rounds most of it away; "
        f"write the whole model first (aligntune export {adapter} FOLDER), and give that folder in its place"
    )


def parts_ends(model: Any) -> bool:
    """Whether a LoRA adapter lies on the embedding or the head of a model that uses one weight for both: merged, they are two."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    return is_tied(base) and any(isinstance(end, BaseTunerLayer) for end in _ends(base))


def untie(model: Any) -> None:
    """Give the head a weight of its own, here and where the model is saved."""
    head = _wrapped(model.get_output_embeddings())
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _ends(model: Any) -> tuple[Any, Any]:
    """Embedding and head (or None), as the adapter has wrapped them."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def is_tied(model: Any) -> bool:
    """Whether embedding and head use one weight, below their adapters if they have any."""
    embedding, head = map(_wrapped, _ends(model))
    return head is not None and embedding.weight is head.weight


def _wrapped(module: Any) -> Any:
    """The module that a LoRA layer lies around; without one the module itself."""
    return getattr(module, "base_layer", module)


def _leave_inputs_to_autocast(model: Any) -> None:
    """PEFT copies the input of every adapter to the adapter's float32, which autocast then copies back: under autocast, which
    brings both to its own format, the copies are left out. The same numbers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._cast_input_dtype = MethodType(_cast_input, module)  # type: ignore[method-assign]


def _cast_input(layer: Any, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if x is not None and torch.is_autocast_enabled(x.device.type):
        return x
    cast: Tensor | None = type(layer)._cast_input_dtype(layer, x, dtype)
    return cast


def task_of(model: Any) -> str | None:
    """PEFT's name for what the head does; by it PEFT keeps adapters off the head."""
    name = type(model).__name__
    tasks = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for ending, task in tasks.items() if name.endswith(ending)), None)


def lora_targets(model: Any, lora: LoraSettings) -> list[str] | str:
    """The modules that get an adapter: those named, else PEFT's choice for the architecture, else all linear layers."""
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    wanted = lora.target_modules
    if isinstance(wanted, list):
        missing = [name for name in wanted if name.rsplit(".", 1)[-1] not in present]
        if not missing:
            return wanted
        if lora.strict_targets:
            linear = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)})
            raise ModelError(
                f"target_modules: the model has no {', '.join(missing)}; its linear layers are {', '.join(linear)}"
            )
    elif wanted is not None:
        return wanted
    return _architecture_default(model) or "all-linear"


def _architecture_default(model: Any) -> list[str] | None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    found = DEFAULTS.get(model.config.model_type)
    return list(found) if found is not None else None


def _is_linear(module: Any) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def head_names(model: Any) -> list[str]:
    """The head's module names: the direct children outside the base model that hold parameters."""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
