"""Which versions was this package tested with? The numbers of constraints.txt and constraints-low.txt, in one table."""

from __future__ import annotations

from importlib import metadata

TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.13.0", "2.13.0"),
    "transformers": ("5.17.0", "5.24.0"),
    "trl": ("1.14.2", "1.16.0"),
    "peft": ("0.21.2", "0.21.2"),
    "datasets": ("4.8.5", "5.2.0"),
    "accelerate": ("1.15.0", "1.15.0"),
}
"""Package -> (in the oldest tested set, in the newest)."""

BROKEN: dict[tuple[str, str], str] = {("trl", "1.15.0"): "its SFT, DPO and GRPO trainers fail on the CPU"}
"""(package, version) -> what is wrong with it."""


def installed(package: str) -> str | None:
    """The installed version without its local part, or None."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def judge(package: str, have: str | None) -> tuple[str, str | None]:
    """(what to say about an installed version, the version to install in its place or None)."""
    low, high = TESTED[package]
    tested = low if low == high else f"{low} to {high}"
    if have is None:
        return f"missing; tested with {tested}", high
    if (package, have) in BROKEN:
        return f"{have}: {BROKEN[package, have]}; tested with {tested}", high
    if _numbers(have) < _numbers(low):
        return f"{have} is older than what is tested ({tested})", high
    if _numbers(have) > _numbers(high):
        return f"{have} is newer than what is tested ({tested})", None
    return have if have in (low, high) else f"{have}, between the tested {tested}", None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
