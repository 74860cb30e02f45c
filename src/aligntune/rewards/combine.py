"""How do several rewards become one number? Raw score, shield, normalise, clip, weight, sum; every stage is kept.

A reward that is None for a sample leaves that sample's sum alone (the other weights are not scaled up). A sample for
which every reward is None has the total None: it has no reward, and the trainer leaves it out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from aligntune.errors import RewardError

from .base import Reward, get
from .call import Caller, Score
from .normalise import Reduce, RunningNormaliser
from .samples import Batch, Text

Stage = list[Score]
FIELDS = ("type", "weight", "params", "shield", "clip", "normalize", "on_error")


@dataclass
class Entry:
    """One reward of the sum, with the settings of `RewardConfig`."""

    reward: Reward
    caller: Caller
    weight: float = 1.0
    shield: bool = False
    clip: float | None = None
    normaliser: RunningNormaliser | None = None
    on_error: str | None = None
    name: str = ""


@dataclass
class Stages:
    """One reward's scores of a batch after each stage; a stage that is not configured repeats the one before it."""

    raw: Stage
    shielded: Stage
    normalised: Stage
    clipped: Stage
    weighted: Stage
    errors: int = 0


@dataclass
class Scores:
    """`total[i]` is the reward of sample i, None where none applied. `metrics` is flat, ready to be logged."""

    total: list[Score]
    by_reward: dict[str, Stages]
    metrics: dict[str, float] = field(default_factory=dict)


class RewardSet:
    """Several rewards, scored together.

    `configs`: names, callables, dicts with the fields of `RewardConfig`, or `RewardConfig` objects. `weights` replaces
    theirs. `on_error` ("raise" or "null") holds for entries that do not set their own. `reduce` gathers the moments
    of normalised rewards from all processes (see `RunningNormaliser`).

    Raises:
        RewardError: an unknown reward, param or field; weights of the wrong number, negative or not finite.
    """

    __name__ = "reward"  # TRL names a reward function's metrics by it

    def __init__(
        self,
        configs: Sequence[Any],
        weights: Sequence[float] | None = None,
        tokenizer: Any = None,
        on_error: str = "raise",
        reduce: Reduce | None = None,
    ) -> None:
        if isinstance(configs, str | Mapping) or callable(configs):
            configs = [configs]
        if not configs:
            raise RewardError("no reward is configured: name at least one (`aligntune reward list` shows all)")
        if on_error not in ("raise", "null"):
            raise RewardError(f"on_error={on_error!r}: choose 'raise' or 'null'")
        self.tokenizer, self.on_error = tokenizer, on_error
        self.entries = [_entry(config, reduce) for config in configs]
        self._set_weights(weights)
        self._name_entries()

    def _set_weights(self, weights: Sequence[float] | None) -> None:
        if weights is not None:
            if len(weights) != len(self.entries):
                raise RewardError(f"{len(weights)} weights for {len(self.entries)} rewards: give one for each")
            for entry, weight in zip(self.entries, weights, strict=True):
                entry.weight = _number(entry.reward, "weight", weight)
        for entry in self.entries:
            if not math.isfinite(entry.weight) or entry.weight < 0:
                raise RewardError(
                    f"reward {entry.reward.name!r} has the weight {entry.weight}: weights are finite and at least 0. "
                    "To punish something, use a reward that falls with it"
                )

    def _name_entries(self) -> None:
        seen: dict[str, int] = {}
        for entry in self.entries:
            count = seen[entry.reward.name] = seen.get(entry.reward.name, 0) + 1
            entry.name = entry.reward.name if count == 1 else f"{entry.reward.name}_{count}"

    @property
    def names(self) -> list[str]:
        """The rewards' names in the metrics: a reward used twice is `name` and `name_2`."""
        return [entry.name for entry in self.entries]

    def isolation(self) -> dict[str, str]:
        """How the code that each reward runs is confined on this machine; no entry for rewards that run none.

        Raises:
            ConfigError: a reward asks for more (its param `isolation`) than can be had here.
        """
        from .sandbox import shared

        found = {}
        for entry in self.entries:
            level = entry.caller.params.get("isolation", entry.caller.signature.defaults.get("isolation"))
            if level is not None and not entry.reward.custom:
                found[entry.name] = f"isolation {level}: {shared(level).isolation}"
        return found

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Sequence[Any]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        update: bool = True,
    ) -> Scores:
        """Score N samples. `update` False leaves the running means as they are (evaluation)."""
        batch = Batch(prompts, completions, columns or {}, completion_ids, self.tokenizer)
        flagged = _flags(batch) if any(entry.shield for entry in self.entries) else [False] * len(batch)
        by_reward = {entry.name: self._stages(entry, batch, flagged, update) for entry in self.entries}
        total = [_sum(column) for column in zip(*(stages.weighted for stages in by_reward.values()), strict=True)]
        scores = Scores(total, by_reward)
        for entry in self.entries:
            scores.metrics |= _metrics(entry, by_reward[entry.name], flagged)
        scores.metrics |= _summary("reward", total) | {"reward/null": _null_share(total)}
        return scores

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], completion_ids: Any = None, **columns: Any
    ) -> list[Score]:
        """The totals, with the signature of a TRL reward function: metrics go to TRL's `log_metric`."""
        log_metric = columns.pop("log_metric", None)
        lists = {name: values for name, values in columns.items() if isinstance(values, list | tuple)}
        scores = self.score(prompts, completions, lists, completion_ids)
        if log_metric is not None:
            for name, value in scores.metrics.items():
                log_metric(name, value)
        return scores.total

    def _stages(self, entry: Entry, batch: Batch, flagged: list[bool], update: bool) -> Stages:
        raw, failures = entry.caller(batch, entry.on_error or self.on_error)
        shielded = [_shield(score, flag and entry.shield) for score, flag in zip(raw, flagged, strict=True)]
        normalised = shielded
        if entry.normaliser is not None:
            if update:
                entry.normaliser.update([score for score in shielded if score is not None])
            normalised = _each(entry.normaliser, shielded)
        bound = entry.clip
        clipped = normalised if bound is None else _each(lambda score: max(-bound, min(bound, score)), normalised)
        weighted = _each(lambda score: entry.weight * score, clipped)
        return Stages(raw, shielded, normalised, clipped, weighted, len(failures))

    def state_dict(self) -> dict[str, list[float]]:
        """The running moments of the normalised rewards, by name; JSON-ready."""
        return {entry.name: list(entry.normaliser.state) for entry in self.entries if entry.normaliser is not None}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue from `state_dict()`; another set of normalised rewards is a `RewardError`."""
        normalised = {entry.name: entry.normaliser for entry in self.entries if entry.normaliser is not None}
        if set(state) != set(normalised):
            raise RewardError(
                f"the saved reward state is of {sorted(state) or 'no rewards'}, this run normalises "
                f"{sorted(normalised) or 'none'}: resume with the same rewards"
            )
        for name, normaliser in normalised.items():
            count, mean, squares = state[name]
            normaliser.state = (count, mean, squares)


def _entry(config: Any, reduce: Reduce | None) -> Entry:
    fields = _fields(config)
    if not isinstance(fields["type"], str | Reward) and not callable(fields["type"]):
        raise RewardError(f"rewards: {fields['type']!r} is no reward: give a name, a callable or a path to one")
    found = get(fields["type"])
    weight = _number(found, "weight", fields.get("weight", 1.0))
    clip, on_error = fields.get("clip"), fields.get("on_error")
    if clip is not None and not _number(found, "clip", clip) > 0:
        raise RewardError(f"reward {found.name!r}: clip={clip} must be above 0; scores are limited to [-clip, clip]")
    if on_error not in (None, "raise", "null"):
        raise RewardError(f"reward {found.name!r}: on_error={on_error!r}: choose 'raise' or 'null'")
    return Entry(
        reward=found,
        caller=Caller(found, fields.get("params")),
        weight=float(weight),
        shield=bool(fields.get("shield", False)),
        clip=clip,
        normaliser=RunningNormaliser(reduce) if fields.get("normalize") else None,
        on_error=on_error,
    )


def _number(found: Reward, name: str, value: Any) -> Any:
    if not isinstance(value, Real):
        raise RewardError(f"reward {found.name!r}: {name}={value!r} must be a number")
    return value


def _fields(config: Any) -> Mapping[str, Any]:
    if not isinstance(config, Mapping) and not hasattr(config, "model_fields_set"):
        return {"type": config}
    if isinstance(config, Mapping):
        for key in config:
            if key not in FIELDS:
                close = difflib.get_close_matches(key, FIELDS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(FIELDS)}"
                raise RewardError(f"a reward entry has no field {key!r}: {hint}")
        if "type" not in config:
            raise RewardError("a reward entry needs `type`: the name of a reward, a callable or a path to one")
        return config
    fields = {name: getattr(config, name) for name in FIELDS}
    if "on_error" not in config.model_fields_set:
        del fields["on_error"]  # the set's own holds
    return fields


def _flags(batch: Batch) -> list[bool]:
    from .safety import flagged

    return [flagged(text) for text in batch.completion_texts]


def _shield(score: Score, flag: bool) -> Score:
    return min(score, 0.0) if flag and score is not None else score


def _each(function: Callable[[float], float], scores: Stage) -> Stage:
    return [None if score is None else function(score) for score in scores]


def _sum(scores: Sequence[Score]) -> Score:
    present = [score for score in scores if score is not None]
    return math.fsum(present) if present else None


def _metrics(entry: Entry, stages: Stages, flagged: list[bool]) -> dict[str, float]:
    """`rewards/<name>/mean` and `/std` are those of the raw score; later stages are named by what they are."""
    prefix = f"rewards/{entry.name}"
    metrics = _summary(prefix, stages.raw)
    metrics[f"{prefix}/null"] = _null_share(stages.raw)
    metrics[f"{prefix}/errors"] = float(stages.errors)
    if entry.shield:
        metrics |= _summary(f"{prefix}/shielded", stages.shielded)
        metrics[f"{prefix}/flagged"] = sum(flagged) / len(flagged) if flagged else 0.0
    if entry.normaliser is not None:
        metrics |= _summary(f"{prefix}/normalised", stages.normalised)
    if entry.clip is not None:
        metrics |= _summary(f"{prefix}/clipped", stages.clipped)
    return metrics | _summary(f"{prefix}/weighted", stages.weighted)


def _summary(prefix: str, scores: Stage) -> dict[str, float]:
    """Mean and population std of the scores that are there; nothing when there are none, rather than a zero."""
    present = [score for score in scores if score is not None]
    if not present:
        return {}
    mean = math.fsum(present) / len(present)
    std = math.sqrt(math.fsum((score - mean) ** 2 for score in present) / len(present))
    return {f"{prefix}/mean": mean, f"{prefix}/std": std}


def _null_share(scores: Stage) -> float:
    return sum(score is None for score in scores) / len(scores) if scores else 0.0
