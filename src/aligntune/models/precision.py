"""Which number formats does a run use on this device?"""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from aligntune.config.enums import PrecisionType

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
"""The formats of 16 bits, which tensor cores and flash kernels take."""


@dataclass(frozen=True)
class Precision:
    """`compute` is the format of matrix products. Trained weights stay in float32 (mixed precision) or, when `split`, have
    the compute format too, and their optimiser keeps what is missing to float32."""

    compute: torch.dtype
    split: bool = False

    @property
    def autocasts(self) -> bool:
        """Whether trained weights are converted for every product."""
        return self.compute is not self.weights(trained=True)

    @property
    def name(self) -> str:
        return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.compute]

    def weights(self, *, trained: bool) -> torch.dtype:
        """Format of the weights: float32 masters when they are trained, the compute format when frozen (LoRA's base)."""
        return torch.float32 if trained and not self.split else self.compute


def device() -> torch.device:
    """The accelerator of this process if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None else torch.device("cpu")


def resolve_precision(wanted: PrecisionType) -> Precision:
    """The precision that `wanted` means on this device; a bf16 that is not fast there becomes fp32, with one log line."""
    on = device()
    if wanted is PrecisionType.FP32:
        return Precision(torch.float32)
    if wanted is PrecisionType.FP16:
        if on.type == "cpu":
            logger.info("precision fp16 needs a GPU (its gradient scaler does not run on the CPU): using fp32")
            return Precision(torch.float32)
        return Precision(torch.float16)
    if bf16_is_fast(on.type):
        return Precision(torch.bfloat16)
    if wanted is PrecisionType.BF16:
        logger.info("precision bf16 is not fast on this %s: using fp32", "CPU" if on.type == "cpu" else on.type)
    return Precision(torch.float32)


@cache
def bf16_is_fast(device_type: str) -> bool:
    """Whether the device has bf16 matrix instructions."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        return "amx_bf16" in _cpu_flags()
    return device_type in ("mps", "xpu")


def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not info.exists():
        return frozenset()
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
