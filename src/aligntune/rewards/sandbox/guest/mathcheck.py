"""Are two mathematical expressions equal? math-verify's answer, asked for in a confined process.

math-verify stops itself by `signal.alarm`, which only a main thread may use; here the time is the caller's matter.
"""

from __future__ import annotations


def check(gold: str, answer: str) -> dict[str, object]:
    """`gold`: whether the gold answer could be read at all; `equal`: whether the answer equals it."""
    from math_verify import parse, verify

    wanted = parse(gold, parsing_timeout=None)
    given = parse(answer, parsing_timeout=None)
    return {"gold": bool(wanted), "equal": bool(wanted) and bool(verify(wanted, given, timeout_seconds=None))}
