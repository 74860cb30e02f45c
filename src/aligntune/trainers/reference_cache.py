"""The reference's log-probabilities of all pairs, computed once and kept on disk.

The key is content: the rows' tokens, the reference's weights and its number format. The same pairs under the same weights
are found again, wherever they came from; any change of either is computed anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets

from aligntune.data.cache import cached_map
from aligntune.trainers.pair_batches import REF_COLUMNS, Pairs
from aligntune.trainers.reference import Reference

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")


def with_reference(
    rows: Dataset, reference: Reference, *, batch_size: int, autocast: torch.dtype | None = None
) -> Dataset:
    """`rows` with the columns `ref_chosen` and `ref_rejected`: a log-probability for each token of the answers.

    `autocast`: the number format of the run's forward passes, None for that of the weights.
    """
    device = next(reference.model.parameters()).device

    def compute(batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        prompts, chosen, rejected = ([list(ids) for ids in batch[name]] for name in TOKENS)
        pairs = Pairs(prompts, chosen, rejected)
        packed = pairs.packed(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            found = reference.log_probs(packed).float().cpu().split(packed.counts)
        lists = [part.tolist() for part in found]
        return dict(zip(REF_COLUMNS, (lists[: len(pairs)], lists[len(pairs) :])))

    number = List(Value("float32"))
    key = {"what": "reference", "weights": weights_fingerprint(reference), "autocast": str(autocast)}
    made = cached_map(
        rows.select_columns(list(TOKENS)), compute, key=key, features=Features(dict.fromkeys(REF_COLUMNS, number)), num_proc=None,
        desc="reference", batch_size=batch_size,
    )  # fmt: skip
    return concatenate_datasets([rows, made], axis=1)


def weights_fingerprint(reference: Reference) -> str:
    """32 hex digits over the names, shapes and values of the weights that the reference uses."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(reference.model.state_dict().items()):
        adapter = ".lora_" in name
        if adapter and (reference.adapter is None or f".{reference.adapter}." not in name):
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
