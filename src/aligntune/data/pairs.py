"""Which tokens do a preference pair, or a prompt for RL, become?

Pairs: `prompt_ids`, `chosen_ids`, `rejected_ids`; both sides share the prompt's tokens. Prompts: `prompt_ids`, the prompt as it
was read (`asked_of` gives it back), and the other columns, for the rewards.

Lengths, in this order: a prompt over `max_prompt_length` loses its beginning (`keep_end`) or its end (`keep_start`);
a completion over `max_target_length` loses its end; while prompt and the longer completion are together over `max_length`,
the prompt is cut down, to no less than half of `max_length` (a prompt that is within `max_prompt_length` because that was
set is not cut again), and then the completions. Pairs that are equal, have an empty completion, or have no room left for
one are dropped, counted and logged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from aligntune.config import rl
from aligntune.data.cache import cached_map
from aligntune.data.detect import RowReader, row_reader
from aligntune.data.examples import PairExample, PromptExample
from aligntune.data.fingerprint import tokenizer_fingerprint
from aligntune.data.masks import Ids, TokenSpans, encode_spans
from aligntune.data.messages import Message
from aligntune.data.sources import called, column_names, processes
from aligntune.data.template import ChatTemplate, use_template
from aligntune.data.tokenize import EMPTY, KEPT, RowTokenizer, drop_rows, preserved_columns, rows_of
from aligntune.errors import DataError

logger = logging.getLogger(__name__)

EQUAL, NO_ROOM = 3, 4
PAIR_REASONS = {EMPTY: "empty completion", EQUAL: "chosen equals rejected", NO_ROOM: "no room for a completion"}


@dataclass(frozen=True)
class Budget:
    """Lengths in tokens; None: no limit. `truncation_mode`: "keep_end" or "keep_start", the side of a prompt that stays."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_target_length: int | None = None
    truncation_mode: str = "keep_end"

    def cut_prompt(self, ids: Ids, limit: int | None) -> Ids:
        """At most `limit` tokens of a prompt, from the side that `truncation_mode` keeps."""
        if limit is None or len(ids) <= limit:
            return ids
        return ids[len(ids) - limit :] if self.truncation_mode == "keep_end" else ids[:limit]

    def cut_pair(self, prompt: Ids, chosen: Ids, rejected: Ids) -> tuple[Ids, Ids, Ids]:
        """All three within the budget; completions may come out empty when the prompt leaves no room."""
        prompt = self.cut_prompt(prompt, self.max_prompt_length)
        chosen, rejected = chosen[: self.max_target_length], rejected[: self.max_target_length]
        if self.max_length is None:
            return prompt, chosen, rejected
        if self.max_prompt_length is None:
            room = self.max_length - max(len(chosen), len(rejected))
            prompt = self.cut_prompt(prompt, max(room, self.max_length // 2))
        room = max(0, self.max_length - len(prompt))
        return prompt, chosen[:room], rejected[:room]


def tokenize_pairs(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: rl.DatasetConfig,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    max_target_length: int | None = None,
    truncation_mode: str = "keep_end",
    enable_thinking: bool | None = None,
) -> Dataset:
    """Rows with `prompt_ids`, `chosen_ids`, `rejected_ids`, `length` (of the longer side) and `preserve_columns`.

    Completions end with the template's end-of-turn token, or with end-of-sequence for raw text (`task_type: text`).

    Raises:
        DataError: rows of no known format, a row that cannot be read or rendered, or no pair left.
    """
    reader = row_reader(rows, config, "preference")
    if config.task_type == "conversation" or config.chat_template:
        use_template(tokenizer, config.chat_template)
    preserved = preserved_columns(rows, config.preserve_columns)
    budget = Budget(max_length, max_prompt_length, max_target_length, truncation_mode)
    tokenise = PairTokenizer(reader, tokenizer, preserved, enable_thinking, budget)
    ids = List(Value("int32"))
    made = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "length": Value("int32"), "fate": Value("int8")}
    done = cached_map(
        rows,
        tokenise,
        key=_key("pairs", tokenizer, reader, budget, enable_thinking),
        features=Features(made | {name: rows.features[name] for name in preserved}),
        num_proc=processes(config.dataset_num_proc),
        desc="tokenise",
    )
    return drop_rows(done, PAIR_REASONS, called(config))


def tokenize_prompts(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: rl.DatasetConfig,
    *,
    max_prompt_length: int | None,
    truncation_mode: str = "keep_end",
    enable_thinking: bool | None = None,
) -> Dataset:
    """Rows with `prompt_ids`, `prompt_text` (as rendered, before any cut), `prompt_json` (see `asked_of`), `length` and the
    columns for the rewards.

    Kept are `preserve_columns`, or when that is unset all columns. Padding is left to the rollout. Prompts over the budget
    are cut on the side that `truncation_mode` does not keep, counted and logged; empty ones are dropped.

    Raises:
        DataError: rows of no known format, a row that cannot be read or rendered, or no prompt left.
    """
    reader = row_reader(rows, config, "prompt")
    if config.task_type == "conversation" or config.chat_template:
        use_template(tokenizer, config.chat_template)
    everything = [name for name in column_names(rows) if name not in PROMPT_COLUMNS]
    preserved = preserved_columns(rows, config.preserve_columns) if config.preserve_columns is not None else everything
    budget = Budget(max_prompt_length=max_prompt_length, truncation_mode=truncation_mode)
    tokenise = PromptTokenizer(reader, tokenizer, preserved, enable_thinking, budget)
    made = {
        "prompt_ids": List(Value("int32")), "prompt_text": Value("string"), "prompt_json": Value("string"),
        "length": Value("int32"), "uncut": Value("int32"), "fate": Value("int8"),
    }  # fmt: skip
    done = cached_map(
        rows,
        tokenise,
        key=_key("asked prompts", tokenizer, reader, budget, enable_thinking),
        features=Features(made | {name: rows.features[name] for name in preserved}),
        num_proc=processes(config.dataset_num_proc),
        desc="tokenise",
    )
    lengths = done.with_format("numpy")
    cut = int((np.asarray(lengths["uncut"][:]) > np.asarray(lengths["length"][:])).sum())
    if cut:
        logger.warning(
            "%s: cut %d of %d prompts to max_prompt_length %s (%s)",
            called(config),
            cut,
            len(done),
            max_prompt_length,
            truncation_mode,
        )
    return drop_rows(done.remove_columns("uncut"), {EMPTY: "empty prompt"}, called(config))


PROMPT_COLUMNS = ("prompt_ids", "prompt_text", "prompt_json", "length", "uncut", "fate")


def asked_of(row: Mapping[str, Any]) -> str | list[Message]:
    """The prompt of a row of `tokenize_prompts` before rendering: messages, or text where prompts are raw."""
    asked: str | list[Message] = json.loads(row["prompt_json"])
    return asked


def _key(
    what: str, tokenizer: PreTrainedTokenizerBase, reader: RowReader, budget: Budget, thinking: bool | None
) -> Any:
    return {
        "what": what, "tokenizer": tokenizer_fingerprint(tokenizer), "reader": reader.key(), "budget": asdict(budget),
        "enable_thinking": thinking,
    }  # fmt: skip


@dataclass
class PairTokenizer(RowTokenizer):
    """Preference pairs -> the prompt's and both answers' tokens."""

    budget: Budget = Budget()

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        sides = [self._sides(row, index) for row, index in zip(rows_of(batch), indices, strict=True)]
        texts = [text for pair in sides for text in pair.texts]
        spans = [[(pair.start, end)] for pair in sides for end in pair.ends]
        encoded = encode_spans(self.tokenizer, texts, spans)
        made: dict[str, list[Any]] = {
            name: [] for name in ("prompt_ids", "chosen_ids", "rejected_ids", "length", "fate")
        }
        for pair, good, bad in zip(sides, encoded[::2], encoded[1::2], strict=True):
            prompt, chosen, rejected, fate = self._finish(pair, good, bad)
            length = len(prompt) + max(len(chosen), len(rejected))
            for name, value in zip(made, (prompt, chosen, rejected, length, fate), strict=True):
                made[name].append(value)
        return made | self.kept(batch)

    def _sides(self, row: Mapping[str, Any], index: int) -> _Sides:
        example = self.reader(row, index)
        assert isinstance(example, PairExample)
        try:
            return raw_sides(example) if isinstance(example.prompt, str) else chat_sides(example, self.template)
        except DataError as error:
            raise self.error(error, row, index) from None

    def _finish(self, pair: _Sides, good: TokenSpans, bad: TokenSpans) -> tuple[Ids, Ids, Ids, int]:
        split = min(good.ranges[0][0], bad.ranges[0][0])
        prompt = good.ids[:split]
        if not np.array_equal(prompt, bad.ids[:split]):  # a token of the prompt merged with one side's answer
            split = _common(good.ids[:split], bad.ids[:split])
            prompt = good.ids[:split]
        chosen, rejected = good.ids[split : good.ranges[0][1]], bad.ids[split : bad.ranges[0][1]]
        if pair.raw:
            prompt, chosen, rejected = self.ends.begin(prompt), self.ends.end(chosen), self.ends.end(rejected)
        if pair.empty:
            return _nothing(EMPTY)
        if pair.equal or np.array_equal(chosen, rejected):
            return _nothing(EQUAL)
        prompt, chosen, rejected = self.budget.cut_pair(prompt, chosen, rejected)
        if not len(chosen) or not len(rejected):
            return _nothing(NO_ROOM)
        if np.array_equal(chosen, rejected):
            return _nothing(EQUAL)
        return prompt, chosen, rejected, KEPT


@dataclass
class PromptTokenizer(RowTokenizer):
    """Prompts -> tokens after which the policy writes."""

    budget: Budget = Budget()

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        prompts = [self._text(row, index) for row, index in zip(rows_of(batch), indices, strict=True)]
        encoded = encode_spans(self.tokenizer, [text for text, _ in prompts], [[] for _ in prompts])
        whole = [
            self.ends.begin(tokens.ids) if isinstance(asked, str) else tokens.ids
            for tokens, (_, asked) in zip(encoded, prompts, strict=True)
        ]
        ids = [self.budget.cut_prompt(row, self.budget.max_prompt_length) for row in whole]
        made: dict[str, list[Any]] = {
            "prompt_ids": ids,
            "prompt_text": [text for text, _ in prompts],
            "prompt_json": [json.dumps(asked, ensure_ascii=False) for _, asked in prompts],
            "length": list(map(len, ids)),
            "uncut": list(map(len, whole)),
            "fate": [KEPT if text.strip() else EMPTY for text, _ in prompts],
        }
        return made | self.kept(batch)

    def _text(self, row: Mapping[str, Any], index: int) -> tuple[str, str | list[Message]]:
        """The prompt's text, and the prompt before rendering."""
        example = self.reader(row, index)
        assert isinstance(example, PromptExample)
        if isinstance(example.prompt, str):
            return example.prompt, example.prompt
        if not example.prompt or (len(example.prompt) == 1 and not str(example.prompt[0]["content"]).strip()):
            return "", example.prompt
        try:
            return self.template.prompt(example.prompt, example.tools), example.prompt
        except DataError as error:
            raise self.error(error, row, index) from None


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both whole texts of a pair; their answers are the characters [start, ends[i]) of each."""

    texts: tuple[str, str]
    start: int
    ends: tuple[int, int]
    equal: bool
    empty: bool
    raw: bool = False


def raw_sides(pair: PairExample) -> _Sides:
    """Prompt and answers joined as they are."""
    prompt, chosen, rejected = str(pair.prompt), str(pair.chosen), str(pair.rejected)
    texts = (prompt + chosen, prompt + rejected)
    empty = not chosen.strip() or not rejected.strip()
    return _Sides(texts, len(prompt), (len(texts[0]), len(texts[1])), chosen == rejected, empty, raw=True)


def chat_sides(pair: PairExample, template: ChatTemplate) -> _Sides:
    """Both conversations rendered; the answers begin where the first assistant turn after the prompt does."""
    prompt, chosen, rejected = _messages(pair.prompt), _messages(pair.chosen), _messages(pair.rejected)
    empty = not _says_something(chosen) or not _says_something(rejected)
    if empty or chosen == rejected:
        return _Sides(("", ""), 0, (0, 0), chosen == rejected, empty)
    (good, good_turns), (bad, bad_turns) = (
        template.turns([*prompt, *answer], pair.tools, since=len(prompt)) for answer in (chosen, rejected)
    )
    start = min(good_turns[0].start, bad_turns[0].start)
    if good[:start] != bad[:start]:
        raise DataError(
            "the chat template renders the prompt in two ways for chosen and rejected: "
            f"{good[:start]!r:.300} and {bad[:start]!r:.300}"
        )
    return _Sides((good, bad), start, (good_turns[-1].end, bad_turns[-1].end), False, False)


def _messages(value: list[Message] | str) -> list[Message]:
    assert not isinstance(value, str)
    return value


def _says_something(answer: list[Message]) -> bool:
    turns = [message for message in answer if message["role"] == "assistant"]
    return any(str(turn["content"]).strip() or turn.get("tool_calls") for turn in turns)


def _common(one: Ids, other: Ids) -> int:
    """How many tokens both begin with; both have the same length."""
    different = np.flatnonzero(one != other)
    return int(different[0]) if len(different) else len(one)


def _nothing(fate: int) -> tuple[Ids, Ids, Ids, int]:
    none = np.zeros(0, dtype=np.int32)
    return none, none, none, fate
