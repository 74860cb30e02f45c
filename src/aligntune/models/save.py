"""What is written of a model so that it can be used? Weights or adapter, tokenizer, chat template, generation config, card."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from aligntune.errors import ModelError
from aligntune.models.lora import has_new_rows, is_quantised
from aligntune.models.lora import merge as merge_lora

logger = logging.getLogger(__name__)


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    merge: bool = False,
    card: Mapping[str, Any] | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write `model` (a PEFT model: its adapter, or with `merge` the merged weights) and all that generation needs.

    `state`: the gathered weights of a model that is sharded over processes; it cannot be merged in place.

    An adapter that was trained on top of another is written with both merged in, for others to read: they know no adapters on
    adapters. Of a sharded model it is written alone, on what it lies on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    below = getattr(model, "lies_on", None)
    if below is not None and hasattr(model, "peft_config") and not merge and state is None:
        logger.info("the adapter was trained on top of %s, so the model is written with both merged in", below[-1])
        merge = True
    set_generation_tokens(model, tokenizer)
    if merge and hasattr(model, "peft_config"):
        if state is not None:
            raise ModelError(
                "a model that is sharded over processes cannot be merged: save its adapter, then aligntune export"
            )
        merged(model).save_pretrained(folder)
    else:
        model.save_pretrained(folder, **({} if state is None else {"state_dict": dict(state)}))
    if hasattr(model, "peft_config") and not merge and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(model_card(card), encoding="utf-8")


def load_weights(model: Any, folder: Path) -> None:
    """Read the weights that `save_pretrained` wrote to `folder` into the live model (a PEFT model: its adapter)."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    set_weights(model, state, str(folder))


def own_weights(model: Any) -> dict[str, torch.Tensor]:
    """The live weights that `load_weights` replaces, by their names in a model folder; of a sharded model, this process's part."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        rows = has_new_rows(model)
        found: dict[str, torch.Tensor] = get_peft_model_state_dict(
            model, adapter_name=model.active_adapter, save_embedding_layers=rows
        )
        return found
    return dict(model.state_dict())


def set_weights(model: Any, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Put `state`, named as `own_weights`, into the live model. If it is sharded, every process must call it; all get the first's.

    Raises `ModelError` when weights are missing that the model has; `source` says there where they were looked for.
    """
    own = own_weights(model)
    placed = {name: _placed_as(weight, own.get(name)) for name, weight in state.items()}
    missing = set(own) - set(placed) - set(getattr(model, "all_tied_weights_keys", None) or {})
    if missing:
        raise ModelError(f"{source}: has no weights for {', '.join(sorted(missing))}")
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, placed, adapter_name=model.active_adapter)
    else:
        model.load_state_dict(placed, strict=False)


def _placed_as(weight: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(own, DTensor) or isinstance(weight, DTensor):
        return weight
    return distribute_tensor(weight.to(own.device), own.device_mesh, own.placements)


def merged(model: Any) -> Any:
    """A copy of a PEFT model with its adapter added into the weights; the model itself stays as it is. Raises `ModelError` for a
    quantised one."""
    import copy

    if is_quantised(model.get_base_model()):
        raise ModelError("a quantised model cannot be merged, which rounds the adapter away: save its adapter, then aligntune export")  # fmt: skip
    return merge_lora(copy.deepcopy(model))


def set_generation_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation stop where training taught it to: the tokenizer's end token joins the generation config's."""
    config: GenerationConfig | None = getattr(model, "generation_config", None)
    if config is None or tokenizer.eos_token_id is None:
        return
    known = config.eos_token_id
    ends = [] if known is None else list(known) if isinstance(known, (list, tuple)) else [known]
    if tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    config.pad_token_id = tokenizer.pad_token_id
    if not config.do_sample:  # sampling settings without sampling do not pass transformers' own check on saving
        config.temperature = config.top_p = config.top_k = None


def model_card(card: Mapping[str, Any]) -> str:
    """README.md of a model folder: what it is, from what, and how good."""
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in card["metrics"].items())
    table = f"\n| metric | value |\n|---|---|\n{metrics}\n" if metrics else ""
    datasets = ", ".join(f"`{name}`" for name in card["datasets"])
    return (
        "---\nlibrary_name: transformers\ntags: [aligntune]\n---\n"
        f"# {Path(card['base_model']).name}, {card['algorithm']}\n\n"
        f"Trained from `{card['base_model']}` by {card['algorithm']} on {datasets} with AlignTune (backend {card['backend']}).\n"
        f"{table}"
    )


def push_folder(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a model folder to the hub; returns the repository's address."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(folder_path=str(folder), repo_id=repo_id)
    return str(url)
