"""The Unsloth backend: found without being imported, since importing it changes transformers and TRL for good.

It trains in a process of its own, where Unsloth is imported before anything it changes (`unsloth_worker`); this process,
and what it later runs on TRL, stays as it is. There its patched TRL trainers are built from the same settings as TRL's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from aligntune.backends.base import Run
from aligntune.backends.versions import installed
from aligntune.config.dump import unimportable
from aligntune.config.enums import AlgorithmType as A
from aligntune.config.enums import PrecisionType
from aligntune.config.run import SFTRunConfig
from aligntune.errors import BackendError
from aligntune.models.files import adapters_of

CAPPED = ("trl", "transformers", "datasets", "torch", "peft")
"""Packages whose versions Unsloth bounds."""

NOT_ON_IT = {
    A.GSPO: "GSPO runs on trl and native only",
    A.PPO: "has no PPO trainer, and ours packs its batches, to whose documents its attention is not held",
    A.NEURAL_MIRROR_GRPO: "its GRPO never calls the loss in which the mirror divergence takes part",
    A.META_ES: "its inner runs are Neural Mirror GRPO, which it cannot train",
}

ELSEWHERE = "Unsloth works in a process of its own: make the trainer by aligntune.api, which starts it"


class UnslothBackend:
    name = "unsloth"

    def available(self) -> str | None:
        """Why Unsloth cannot run on this machine, from its metadata and the GPU; nothing of it is imported."""
        if find_spec("unsloth") is None:
            return "is not installed (pip install 'aligntune[unsloth]')"
        clash = "; ".join(clashes())
        if clash:
            return f"does not fit what is installed: {clash} (pip install 'aligntune[unsloth]' in an environment of its own)"
        return None if has_gpu() else "needs a CUDA GPU, and there is none here"

    def can_run(self, run: Run) -> str | None:
        from aligntune.backends.trl import TRLBackend

        if run.algorithm in NOT_ON_IT:
            return NOT_ON_IT[run.algorithm]
        return next(_refusals(run), None) or TRLBackend().can_run(run)

    def load_policy(self, session: Any, **head: Any) -> Any:
        raise BackendError(ELSEWHERE)

    def build_trainer(self, session: Any, callbacks: Sequence[Any]) -> Any:
        raise BackendError(ELSEWHERE)


def clashes() -> list[str]:
    """Installed versions outside the bounds that Unsloth's own metadata states."""
    from packaging.requirements import Requirement

    found: list[str] = []
    for package in ("unsloth", "unsloth_zoo"):
        for line in _requirements(package):
            wanted = Requirement(line)
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": "huggingface"})
            if wanted.name in CAPPED and applies:
                have = installed(wanted.name)
                if have is None or not wanted.specifier.contains(have, prereleases=True):
                    found.append(f"{wanted.name} {have or 'missing'}, it takes {wanted.specifier}")
    return list(dict.fromkeys(found))


def _requirements(package: str) -> list[str]:
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def has_gpu() -> bool:
    """Whether torch sees a CUDA device (Unsloth allows torch to be imported before it)."""
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _refusals(run: Run) -> Iterator[str]:
    """What of this run Unsloth does otherwise than asked, or not at all."""
    model, train = run.model, run.train
    if run.launch.is_active or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "runs one process"
    if model.precision is PrecisionType.FP32:
        yield "computes in bf16 or fp16, not fp32"
    if model.attn_implementation != "auto":
        yield f"chooses its attention kernels itself (attn_implementation is {model.attn_implementation})"
    for name in ("model_init_kwargs", "max_memory", "sft_path", "model_adapter_name", "ref_adapter_name"):
        if getattr(model, name, None):
            yield f"does not act on model.{name}"
    if len(adapters_of(model.name_or_path)) > 1:
        yield f"reads no adapter that lies on another, as {model.name_or_path} does"
    if model.device_map not in (None, "auto"):
        yield "places the model itself (device_map)"
    other = sorted(set(model.quantization) - {"load_in_4bit", "load_in_8bit"})
    if other:
        yield f"sets quantization.{other[0]} itself; it takes load_in_4bit and load_in_8bit"
    if isinstance(run, SFTRunConfig):
        if run.train.packing or run.train.padding_free:
            yield "its attention is not held to the documents of a packed batch (packing, padding_free)"
        if run.train.activation_offloading:
            yield "offloads activations by its own checkpointing (activation_offloading)"
    lost = unimportable(run)
    if lost:
        yield f"trains in another process, which cannot import {lost[0]}"
    if train.use_liger_kernel:
        yield "has kernels of its own in place of Liger's (use_liger_kernel)"
