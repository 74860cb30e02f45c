"""Where in a completion is the answer? The conventions that models are asked to follow, in one place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from aligntune.errors import ConfigError

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_SAID = re.compile(r"(?:final answer|answer|result)\s*(?:is|:|=)\s*:?\s*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?:\s?/\s?\d+)?"
)

EXTRACT = ("whole", "last_line", "boxed", "tag", "hashes", "auto")


def boxed(text: str) -> list[str]:
    r"""The contents of every `\boxed{...}` whose braces balance."""
    found = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, start = 1, match.end()
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                found.append(text[start:end])
                break
    return found


def tagged(text: str) -> list[str]:
    """The contents of every <answer> element."""
    return [part.strip() for part in _TAG.findall(text)]


def extract(text: str, how: str = "auto") -> str | None:
    """The answer in `text`, or None when it is not marked as `how` says.

    "whole", "last_line", "boxed", "tag" (<answer>), "hashes" (####), or "auto": the last of these marks that is used,
    else what follows "the answer is", else the last line.
    """
    if how not in EXTRACT:
        raise ConfigError(f"extract={how!r}: choose one of {', '.join(EXTRACT)}")
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    last_line = lines[-1] if lines else None
    if how == "whole":
        return text.strip()
    if how == "last_line":
        return last_line
    marks: dict[str, Callable[[str], list[str]]] = {"boxed": boxed, "tag": tagged, "hashes": _HASHES.findall}
    if how != "auto":
        found = marks[how](text)
        return found[-1].strip() if found else None
    for find in (tagged, boxed, _HASHES.findall, _SAID.findall):
        if found := find(text):
            return str(found[-1]).strip()
    return last_line


def normalise(text: str, *, ignore_case: bool = True, ignore_punctuation: bool = True) -> str:
    """Compatibility characters folded, white space collapsed; on request lower case and no punctuation or articles.

    With both, this is SQuAD's normalisation (Rajpurkar et al. 2016).
    """
    text = unicodedata.normalize("NFKC", text)
    if ignore_case:
        text = text.casefold()
    if ignore_punctuation:
        text = "".join(" " if unicodedata.category(character)[0] == "P" else character for character in text)
        text = re.sub(r"\b(a|an|the)\b", " ", text, flags=re.IGNORECASE)
    return " ".join(text.split())


def alternatives(answer: object) -> list[str]:
    """The accepted answers: one, or a list of them, as text."""
    if isinstance(answer, list | tuple | set):
        return [str(part) for part in answer]
    return [str(answer)]


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text in order: 1,234.5, -3, 1/2, 6.02e23, 50% as 50."""
    found = []
    for match in _NUMBER.finditer(text.replace("−", "-").replace("$", "").replace("\\%", "%")):
        value = parse_number(match.group(0))
        if value is not None:
            found.append(value)
    return found


def parse_number(text: str) -> Fraction | None:
    """The exact value of a number as people write it, or None when `text` is not just a number."""
    cleaned = text.strip().strip("$€£ ").rstrip(".%").replace("−", "-").replace(",", "").replace(" ", "")
    if len(cleaned) > 400:
        return None
    top, slash, bottom = cleaned.partition("/")
    try:
        value = Decimal(top)
        if not value.is_finite() or abs(value.adjusted()) > 400:
            return None
        whole = Fraction(value)
        return whole / int(bottom) if slash else whole
    except (InvalidOperation, ValueError, ZeroDivisionError):
        return None
