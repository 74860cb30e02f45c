"""Where in a completion is the answer? The conventions that models are asked to follow, in one place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from aligntune.errors import ConfigError

from .words import after_thinking

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_SAID = re.compile(r"(?:final answer|answer|result)\s*(?:is|:|=)\s*:?\s*([^\n]+)", re.IGNORECASE)
_WHOLE = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
_NUMBER = re.compile(
    rf"(?<![\w.^])(?<!\^\{{)[-+]?(?:\d+ +\d+\s?/\s?\d+|(?:(?:{_WHOLE})(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?(?:\s?/\s?\d+)?)"
)
_ONLY = re.compile(
    r"([-+]?) *[$€£]? *(?:(\d+) +(?=\d+ */))?"  # sign, currency, the whole part of a mixed number
    r"((?:\d{1,3}(?:[, \u00a0\u2009\u202f]\d{3})+|\d+)(?:\.\d*)?|\.\d+)([eE][-+]?\d+)?(?: */ *([-+]?\d+))?"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")

EXTRACT = ("whole", "last_line", "boxed", "tag", "hashes", "auto")


def boxed(text: str) -> list[str]:
    r"""The contents of every `\boxed{...}` whose braces balance."""
    found: dict[int, str] = {}
    open_braces: list[int | None] = []  # where the content of a box begins; None for any other brace
    for match in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if match.group() != "}":
            open_braces.append(None if match.group() == "{" else match.end())
        elif open_braces and (start := open_braces.pop()) is not None:
            found[start] = text[start : match.start()]
    return [found[start] for start in sorted(found)]


def tagged(text: str) -> list[str]:
    """The contents of every <answer> element."""
    return [part.strip() for part in _TAG.findall(text)]


def extract(text: str, how: str = "auto") -> str | None:
    """The answer in `text`, or None when it is not marked as `how` says.

    "whole", "last_line", "boxed", "tag" (<answer>), "hashes" (####), or "auto": the last of these marks that is used,
    else what follows "the answer is", else the last line. All but "whole" look only at what follows the thinking.
    """
    if how not in EXTRACT:
        raise ConfigError(f"extract={how!r}: choose one of {', '.join(EXTRACT)}")
    if how == "whole":
        return text.strip()
    text = after_thinking(text)
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    last_line = lines[-1] if lines else None
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


def plain(text: str) -> str:
    r"""Numbers without typography: \frac{1}{2} as 1/2, thin spaces, {,}, \$, \%, emphasis and degrees taken out, minus as -."""
    text = re.sub(rf"(?<=\d)\s*(?={_FRACTION.pattern})", " ", text)  # 2\frac{1}{2}, a mixed number
    text = _FRACTION.sub(r"\1/\2", text.replace("−", "-").replace("{,}", ",").replace("\\%", "%"))
    return re.sub(r"\\[,!; ]|\*\*|\\\$|°", "", text)


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text in order: 1,234.5, -3, 1/2, 2 1/2, 6.02e23, 50% as 50. Exponents (m^2) are none."""
    values = (parse_number(match.group()) for match in _NUMBER.finditer(plain(text).replace("$", "")))
    return [value for value in values if value is not None]


def opening_number(text: str) -> Fraction | None:
    """The number with which a text begins ("72 clips")."""
    match = _NUMBER.match(plain(text).replace("$", "").strip())
    return parse_number(match.group()) if match else None


def parse_number(text: str) -> Fraction | None:
    """The exact value of a number as people write it, or None when `text` is not just a number.

    Commas and spaces stand only between thousands: 1,2 and 1 2 are two numbers, 2 1/2 is a mixed one.
    """
    if len(text) > 400:
        return None
    match = _ONLY.fullmatch(text.strip().strip("$€£ ").rstrip(".%").replace("−", "-"))
    if match is None:
        return None
    sign, mixed, digits, exponent, bottom = match.groups("")
    value = Decimal(re.sub(r"[^\d.]", "", digits) + exponent)
    if abs(value.adjusted()) > 400:
        return None
    if bottom and not int(bottom):
        return None
    whole = int(mixed or 0) + Fraction(value) / int(bottom or 1)
    return -whole if sign == "-" else whole
