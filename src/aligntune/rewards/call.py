"""How is a reward called? With the arguments it names, on every sample of a batch, and what it returns is checked."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import inspect
import logging
import math
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligntune.errors import AlignTuneError, RewardError

from .base import COLUMN_SYNONYMS, RESERVED, Reward
from .samples import Batch

log = logging.getLogger(__name__)

CONCURRENT = 32
"""Calls of an async per-sample reward that are under way at once."""

Score = float | None


@dataclass(frozen=True)
class Signature:
    """Which parameters of the function are filled from where."""

    reserved: list[str]
    columns: list[str]  # required: parameters without a default that are not reserved
    defaults: dict[str, Any]  # what `params` may set
    keyword_only: frozenset[str]  # set by `params` alone, never by a column of that name
    takes_rest: bool  # has **kwargs, which gets every column

    @classmethod
    def of(cls, reward: Reward) -> Signature:
        reserved, columns, defaults, keyword_only, rest = [], [], {}, set(), False
        try:
            parameters = reward.parameters
        except ValueError as error:  # some functions written in C
            raise RewardError(f"reward {reward.name!r}: {error}; wrap it in a function of your own") from error
        for name, parameter in parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                rest = True
            elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                raise RewardError(
                    f"reward {reward.name!r}: parameter {name!r} is positional, but rewards are called by argument name"
                )
            elif name in RESERVED:
                reserved.append(name)
            elif parameter.default is parameter.empty:
                columns.append(name)
            else:
                defaults[name] = parameter.default
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keyword_only.add(name)
        return cls(reserved, columns, defaults, frozenset(keyword_only), rest)


@dataclass(frozen=True)
class Failure:
    """A sample on which the reward raised."""

    sample: int
    error: Exception


class Caller:
    """A reward with its params, ready to be called.

    `params` are checked here: an unknown one is a `RewardError` with the closest name. The params' key `columns` maps
    a parameter to the dataset column that fills it.
    """

    def __init__(self, reward: Reward, params: Mapping[str, Any] | None = None) -> None:
        self.reward = reward
        self.signature = Signature.of(reward)
        for name, given in (
            ("params", params),
            ("params.columns", isinstance(params, Mapping) and params.get("columns")),
        ):
            if given and not isinstance(given, Mapping):
                raise RewardError(
                    f"reward {reward.name!r}: {name} is {given!r}: give names with values, {{name: value}}"
                )
        params = dict(params or {})
        self.renamed: dict[str, str] = dict(params.pop("columns", None) or {})
        self.params = params
        self._check_params()

    def _check_params(self) -> None:
        signature, name = self.signature, self.reward.name
        for given in self.params:
            if given in signature.defaults or (signature.takes_rest and given not in RESERVED):
                continue
            known = sorted(signature.defaults)
            if given in signature.columns:
                hint = f"it is a dataset column; to read another one: params: {{columns: {{{given}: other_column}}}}"
            elif close := difflib.get_close_matches(given, known, n=1):
                hint = f"did you mean {close[0]!r}?"
            else:
                hint = f"it takes: {', '.join(known) or 'none'}"
            raise RewardError(f"reward {name!r} has no param {given!r}: {hint}")
        for given in self.renamed:
            if given not in (*signature.columns, *signature.defaults):
                raise RewardError(f"reward {name!r} reads no column {given!r}; it reads {signature.columns or 'none'}")

    def __call__(self, batch: Batch, on_error: str = "raise") -> tuple[list[Score], list[Failure]]:
        """Score every sample. With `on_error` "null" a sample on which the function raises scores None and is listed.

        Raises:
            RewardError: a missing column; a result that is no score; with "raise" also any exception of the function.
        """
        if not len(batch):  # a process whose draw of prompts was empty
            return [], []
        arguments = self._arguments(batch)
        if self.reward.batched:
            results, failures = self._whole(batch, arguments)
        else:
            results, failures = self._one_by_one(batch, arguments)
        for failure in failures:
            if isinstance(failure.error, AlignTuneError) and not isinstance(failure.error, RewardError):
                raise failure.error  # a missing package or a wrong setting is met by every sample: never a null
            if on_error == "raise":
                hint = "Fix the function, or set on_error: null to count such samples and go on without their score"
                raise RewardError(f"reward {self._raised(batch, failure)}\n{hint}") from failure.error
        if failures:
            told = len(failures), len(batch), self._raised(batch, failures[0])
            log.warning("%d of %d completions count as null; the first: reward %s", *told)
        failed = {failure.sample for failure in failures}
        scores = [None if i in failed else self._score(batch, i, result) for i, result in enumerate(results)]
        return scores, failures

    def _arguments(self, batch: Batch) -> dict[str, Sequence[Any] | None]:
        """Per parameter the list of its N values; None where the reserved argument is not there and has a default."""
        signature = self.signature
        arguments: dict[str, Sequence[Any] | None] = {}
        for name in signature.reserved:
            values = self._reserved(batch, name)
            if values is None and self.reward.parameters[name].default is inspect.Parameter.empty:
                raise RewardError(f"reward {self.reward.name!r} needs {name}, which is not there in this run")
            if values is not None:
                arguments[name] = values
        for name in signature.columns:
            arguments[name] = batch.columns[self._column(batch, name)]
        for name in signature.defaults:
            column = self.renamed.get(name, name)
            if name in self.renamed and column not in batch.columns:
                raise RewardError(self._no_column(batch, column))
            if name not in self.params and name not in signature.keyword_only and column in batch.columns:
                arguments[name] = batch.columns[column]
        if signature.takes_rest:
            taken = {*arguments, *self.params, *RESERVED}
            arguments |= {name: values for name, values in batch.columns.items() if name not in taken}
        return arguments

    def _reserved(self, batch: Batch, name: str) -> Sequence[Any] | None:
        if name == "tokenizer":
            return None if batch.tokenizer is None else [batch.tokenizer] * len(batch)
        return {
            "prompt": batch.prompt_texts,
            "completion": batch.completion_texts,
            "prompts": batch.prompts,
            "completions": batch.completions,
            "messages": batch.conversations,
            "completion_ids": batch.completion_ids,
        }[name]

    def _column(self, batch: Batch, name: str) -> str:
        candidates = [self.renamed[name]] if name in self.renamed else COLUMN_SYNONYMS.get(name, (name,))
        for candidate in candidates:
            if candidate in batch.columns:
                return candidate
        raise RewardError(self._no_column(batch, *candidates))

    def _no_column(self, batch: Batch, *names: str) -> str:
        wanted = " or ".join(repr(name) for name in names)
        return (
            f"reward {self.reward.name!r} needs the column {wanted}; the dataset has: "
            f"{', '.join(batch.columns) or 'no further columns'}. Name yours with params: "
            f"{{columns: {{{names[0]}: your_column}}}}, or rename it with column_mapping"
        )

    def _whole(self, batch: Batch, arguments: dict[str, Any]) -> tuple[list[Any], list[Failure]]:
        tokenizer = {"tokenizer": batch.tokenizer} if "tokenizer" in arguments else {}
        lists = {name: list(values) for name, values in arguments.items()} | tokenizer
        try:
            result = self.reward.function(**lists, **self.params)
            if inspect.isawaitable(result):
                result = run_coroutine(_await(result))
        except Exception as error:  # noqa: BLE001 - the boundary to a user's function: reported with its sample
            return [None] * len(batch), [Failure(i, error) for i in range(len(batch))]
        values = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(values, list | tuple) or len(values) != len(batch):
            size = f"{len(values)} scores" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
            raise RewardError(
                f"reward {self.reward.name!r} returned {size} for {len(batch)} completions: return a list with one "
                "number or None for each"
            )
        return self._split(list(values))

    def _split(self, values: list[Any]) -> tuple[list[Any], list[Failure]]:
        """A batched reward may put an exception in a sample's place: that sample failed, the others did not."""
        failures = [Failure(i, value) for i, value in enumerate(values) if isinstance(value, Exception)]
        return [None if isinstance(value, Exception) else value for value in values], failures

    def _one_by_one(self, batch: Batch, arguments: dict[str, Any]) -> tuple[list[Any], list[Failure]]:
        rows = [{name: values[i] for name, values in arguments.items()} for i in range(len(batch))]
        results: list[Any] = []
        for row in rows:
            try:
                results.append(self.reward.function(**row, **self.params))
            except Exception as error:  # noqa: BLE001 - the same boundary
                results.append(error)
        if any(inspect.isawaitable(result) for result in results):  # begun only now
            results = run_coroutine(_gather(results))
        return self._split(results)

    def _raised(self, batch: Batch, failure: Failure) -> str:
        error = failure.error
        return f"{self.reward.name!r} raised {type(error).__name__}: {error}\n{batch.excerpt(failure.sample)}"

    def _score(self, batch: Batch, index: int, result: Any) -> Score:
        """The result as a float, or a `RewardError` that says what to return."""
        if result is None:
            return None
        with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
            result = result.item()  # a number of numpy or torch
        if isinstance(result, bool | int | float) and math.isfinite(result):
            return self._in_range(batch, index, float(result))
        raise RewardError(
            f"reward {self.reward.name!r} returned {result!r:.100} (a {type(result).__name__}) for "
            f"{batch.excerpt(index)}\nReturn a finite number (higher is better), or None where it does not apply"
        )

    def _in_range(self, batch: Batch, index: int, score: float) -> float:
        low, high = self.reward.range
        if (low is not None and score < low - 1e-6) or (high is not None and score > high + 1e-6):
            raise RewardError(
                f"reward {self.reward.name!r} returned {score}, outside its range [{low}, {high}], for "
                f"{batch.excerpt(index)}\nCorrect the function or the range in its decorator"
            )
        return score


async def _await(awaitable: Any) -> Any:
    return await awaitable


async def _gather(results: list[Any]) -> list[Any]:
    """Results with those that are awaitable awaited, so many at once; an exception stands in its own place."""
    limit = asyncio.Semaphore(CONCURRENT)

    async def one(result: Any) -> Any:
        if not inspect.isawaitable(result):
            return result
        async with limit:
            return await result

    return await asyncio.gather(*(one(result) for result in results), return_exceptions=True)


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end, also where this thread already runs an event loop (a notebook, an async trainer)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    box: list[Callable[[], Any]] = []

    def work() -> None:
        try:
            result = asyncio.run(coroutine)
            box.append(lambda: result)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            caught = error

            def again() -> Any:
                raise caught

            box.append(again)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return box[0]()
