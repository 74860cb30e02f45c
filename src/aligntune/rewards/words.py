"""How does a text fall into words and sentences? Shared by the rewards on shape and tone; no model, no download."""

from __future__ import annotations

import re
from functools import lru_cache

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+(?:['’][^\W{CJK}]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"')\]]*\s+|(?<=[。！？])")
_LIST_ITEM = re.compile(r"\s{0,12}(?:[-*•]|\d{1,3}[.)])\s")
_FENCE = re.compile(r"^( {0,3})(```+|~~~+)[^\n]*\n(.*?)(?:^ {0,3}\2[`~]*\s*$|\Z)", re.DOTALL | re.MULTILINE)
_SUFFIX = re.compile(r"(?:ational|ization|fulness|ously|ing|edly|ies|ied|ed|es|ly|s)$")

_FUNCTION_WORDS = (
    "a about after all also am an and any are as at be because been before being both but by can could did do does "
    "doing down during each few for from further had has have having he her here hers him his how i if in into is "
    "it its itself just me more most my no nor not now of off on once only or other our out over own same she "
    "should so some such than that the their them then there these they this those through to too under until up "
    "very was we were what when where which while who whom why will with would you your yours "
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""The closed-class words of English: articles, pronouns, prepositions, conjunctions, auxiliaries."""


def words(text: str) -> list[str]:
    """Lower-cased words; a Chinese or Japanese character is a word of its own."""
    return [word.lower() for word in _WORD.findall(text)]


def sentences(text: str) -> list[str]:
    """Sentences and list items outside code blocks."""
    parts = (part for block in paragraphs(text) for part in _SENTENCE_END.split(block))
    return [part.strip() for part in parts if _WORD.search(part)]


def paragraphs(text: str) -> list[str]:
    """Blocks between empty lines, with list items as blocks of their own; code blocks are left out."""
    blocks: list[list[str]] = [[]]
    for line in _FENCE.sub("\n\n", text).splitlines():
        if not line.strip() or _LIST_ITEM.match(line):
            blocks.append([])
        blocks[-1].append(line)
    joined = ("\n".join(block).strip() for block in blocks)
    return [block for block in joined if _WORD.search(block)]


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced code block; one that is never closed ends with the text.

    Lines lose the indentation of the fence (CommonMark 4.5), so that a block in a list is code that runs.
    """
    found = []
    for match in _FENCE.finditer(text):
        info = match.group(0).split("\n", 1)[0].strip("`~ \t").split()
        indent, _, content = match.groups()
        if indent:
            content = re.sub(rf"^ {{1,{len(indent)}}}", "", content, flags=re.MULTILINE)
        found.append((info[0].lower() if info else "", content))
    return found


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; all of a text without one."""
    return text.rpartition("</think>")[2]


def block_in(blocks: list[tuple[str, str]], languages: tuple[str, ...]) -> str | None:
    """The last of `fenced_blocks` in one of the languages, else the last one that names none: where some are named, the
    others are output. None without either."""
    named = [content for language, content in blocks if language in languages]
    found = named or [content for language, content in blocks if not language]
    return found[-1] if found else None


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A word without its English inflection, crudely: enough to see that two forms belong together."""
    short = _SUFFIX.sub("", word)
    return short if len(short) >= 3 else word


def content_stems(text: str) -> list[str]:
    """Stems of the words that carry content, numbers included."""
    return [stem(word) for word in words(text) if word not in FUNCTION_WORDS]


def ngrams(items: list[str], order: int) -> list[tuple[str, ...]]:
    """All runs of `order` items."""
    return list(zip(*(items[start:] for start in range(order)), strict=False))


def clamp(value: float, low: float = 0.0, high: float = 1.0) -> float:
    """`value` limited to [low, high]."""
    return max(low, min(high, value))
