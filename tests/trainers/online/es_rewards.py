"""Rewards of the Meta-ES tests, in a module that worker processes can import."""

from __future__ import annotations


def digits(completion: str, *, scale: float = 1.0, least: int = 0) -> float:
    """Share of characters that are digits, scaled; 0 below `least` digits."""
    count = sum(character.isdigit() for character in completion)
    return scale * count / max(1, len(completion)) if count >= least else 0.0


def longer(completion: str) -> float:
    """Length against five characters, at most 1."""
    return min(1.0, len(completion) / 5)


def letters(completion: str) -> float:
    """The verifier: a number that tells answers apart."""
    return sum(map(ord, completion)) % 17 / 16


def never(completion: str) -> float:
    """A verifier that nothing pleases."""
    return 0.0


def timed(completion: str, *, timeout_s: float = 1.0) -> float:
    """The time limit it was given, in units of 10 s."""
    return timeout_s / 10


def broken(completion: str) -> float:
    """Raises whatever it is given."""
    raise ValueError("no score today")


def breaks(completion: str, *, limit: float = 1.0) -> float:
    """Raises where its evolved limit is high: some candidates fail, others do not."""
    if limit > 1.2:
        raise ValueError(f"limit {limit} is too high")
    return len(completion) / 10
