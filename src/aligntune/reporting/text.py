"""How are numbers, times and sizes written for people? Shared by the console and the report page.

These functions are for reading only; the JSON lines keep every digit.
"""

from __future__ import annotations

import math

LABELS = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "memory_gib": "Peak memory",
    "num_tokens": "Tokens seen",
    "mean_token_accuracy": "Token accuracy",
    "kl": "KL to the reference",
    "bleu": "BLEU",
    "mcc": "MCC",
    "f1": "F1",
}
"""Metric names whose label is not just the name with spaces."""

PERCENT = ("accuracy", "accuracies", "pass@", "exact_match", "win_rate", "clipped_ratio")
_TIMING_ENDS = ("_per_second", "_seconds", "_time", "runtime", "memory_gib", "elapsed_s")


def is_timing(name: str) -> bool:
    """True for metrics that measure the machine, not the run: they differ between two equal runs.

    Everything else in `metrics.jsonl` is the same for a run that was killed and resumed.
    """
    return name.startswith(("perf/", "timing/")) or name.endswith(_TIMING_ENDS)


def label(name: str) -> str:
    """`mean_token_accuracy` -> `Token accuracy`, `rewards/format` -> `Rewards / format`."""
    if name in LABELS or "@" in name:
        return LABELS.get(name, name)
    words = name.replace("_", " ").replace("/", " / ").strip()
    return words[:1].upper() + words[1:]


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits and no noise: 0.3333, 12,345, 2e-05, "not finite"."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 1e-3 or abs(value) >= 1e9:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def short(value: float) -> str:
    """A large count in at most five characters: 950, 12.3k, 4.56M."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            scaled = value / limit
            decimals = 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0
            return f"{scaled:.{decimals}f}{suffix}"
    return f"{value:.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as `0.8s`, `42s`, `3m 05s`, `2h 07m`, `4d 03h`."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def metric(name: str, value: float | None, digits: int = 4) -> str:
    """A metric's value in its own unit."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if name.endswith("_per_second"):
        return f"{short(value)}/s"
    if name == "memory_gib":
        return f"{value:.3g} GiB"
    if name == "num_tokens":
        return short(value)
    return number(value, digits)


def value_text(name: str, value: float, digits: int = 4) -> str:
    """A value as the page writes it: shares as percentages, the rest in the metric's unit."""
    if any(part in name for part in PERCENT) and 0 <= value <= 1:
        return f"{value * 100:.1f}%"
    return metric(name, value, digits)
