"""Which metrics are there, and which does a config ask for? One decorated function per metric of answers.

A metric is called with `predictions`, `references`, and those of the rows' columns that it names (all of them if it takes
`**columns`). It returns a dict: a number per name, or one per row, whose mean is the metric. What a metric needs is checked
at the start of a run, so that nothing missing shows up as a zero at its end.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from aligntune.config.best_metric import ANSWER_METRICS, not_a_metric
from aligntune.data.functions import find_function
from aligntune.errors import ConfigError, DataError, ModelError, require
from aligntune.textmetrics import Encoder, load_encoder

if TYPE_CHECKING:
    from aligntune.config.sft import EvaluationConfig

logger = logging.getLogger(__name__)

MetricFunction = Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class EncoderSource:
    """An encoder that a metric needs: the config field with its name, the name, and what loading it takes."""

    setting: str
    name: str = ""
    word_prefix_space: bool = False
    loaded: Encoder | None = None

    def load(self) -> EncoderSource:
        """With the encoder loaded, on the CPU. Raises `ModelError` that names the setting."""
        if self.loaded is not None:
            return self
        try:
            encoder = load_encoder(self.name, device="cpu", word_prefix_space=self.word_prefix_space)
        except ModelError as error:
            raise ModelError(f"{self.setting}: {error}") from error
        return replace(self, loaded=encoder)


@dataclass
class Metric:
    """A metric of answers. `produces`: the names it gives, or None if only a call can tell (custom metrics)."""

    name: str
    function: MetricFunction
    setting: str
    produces: tuple[str, ...] | None = None
    packages: tuple[str, ...] = ()
    encoder: EncoderSource | None = None

    def check(self, columns: Collection[str] = ()) -> None:
        """Import the packages, load the encoder, and see that the rows have the columns it names.

        Raises:
            MissingExtra: a package is not installed.
            ModelError: the encoder cannot be loaded.
            ConfigError: it asks for a column that the rows do not have.
        """
        for package in self.packages:
            require(package, extra="eval", why=self.setting)
        missing = [name for name, needed in self._wanted(columns).items() if needed and name not in columns]
        if missing:
            raise ConfigError(
                f"{self.setting}: the metric {self.name!r} takes {', '.join(missing)}, and the rows have "
                f"{', '.join(sorted(columns)) or 'no further columns'}; name the columns in preserve_columns"
            )
        if self.encoder is not None:
            self.encoder = self.encoder.load()

    def __call__(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
        device: str | None = None,
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The metrics, and those among them that have a score per row. An encoder visits `device` for the call."""
        columns = columns or {}
        arguments: dict[str, Any] = {name: columns[name] for name in self._wanted(columns) if name in columns}
        if self.encoder is None:
            return self._read(self.function(predictions, references, **arguments), len(predictions))
        self.encoder = self.encoder.load()
        assert self.encoder.loaded is not None, "load() has just filled it"
        with self.encoder.loaded.on(device):
            result = self.function(predictions, references, encoder=self.encoder.loaded, **arguments)
        return self._read(result, len(predictions))

    def _wanted(self, columns: Collection[str]) -> dict[str, bool]:
        """Column names the function takes after predictions and references, and whether it must have them."""
        parameters = list(inspect.signature(self.function).parameters.values())
        wanted = {
            p.name: p.default is p.empty for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        if self.encoder is not None:
            wanted.pop("encoder", None)
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            wanted = dict.fromkeys(columns, False) | wanted
        return wanted

    def _read(self, result: Any, rows: int) -> tuple[dict[str, float], dict[str, list[float]]]:
        if not isinstance(result, Mapping) or not all(isinstance(name, str) for name in result):
            raise ConfigError(
                f"{self.setting}: the metric {self.name!r} returned {result!r:.200}; it should return a dict by name"
            )
        means: dict[str, float] = {}
        by_row: dict[str, list[float]] = {}
        for name, value in result.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                by_row[name] = [self._number(name, item) for item in value]
                if len(value) != rows:
                    raise ConfigError(f"{self.setting}: {name!r} has {len(value)} scores for {rows} rows")
                means[name] = math.fsum(by_row[name]) / rows
            else:
                means[name] = self._number(name, value)
        return means, by_row

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, Real) or hasattr(value, "item"):
            return float(value)
        raise ConfigError(f"{self.setting}: {name!r} of the metric {self.name!r} is {value!r:.100}, not a number")


REGISTRY: dict[str, Metric] = {}
"""The metrics of answers that a config can switch on, by name."""


def metric(
    name: str,
    *,
    setting: str,
    packages: Sequence[str] = (),
    encoder: EncoderSource | None = None,
) -> Callable[[MetricFunction], MetricFunction]:
    """Register a metric: `setting` is the `EvaluationConfig` switch, `packages` what it
    imports, `encoder` the config field that names the encoder it is given as `encoder`."""

    def register(function: MetricFunction) -> MetricFunction:
        REGISTRY[name] = Metric(name, function, setting, ANSWER_METRICS[setting], tuple(packages), encoder)
        return function

    return register


def metrics_from_config(config: EvaluationConfig, *, has_references: bool = True) -> list[Metric]:
    """The metrics of answers that `config` asks for, its custom ones last; perplexity needs no answers and is not here.

    Rows without references cannot have such metrics: those on by default are then off (logged once).

    Raises:
        ConfigError: rows without references and a metric that was asked for; an unknown custom metric; two alike.
    """
    from aligntune.evaluation import text_metrics  # noqa: F401  (fills the registry)

    chosen = [replace(entry) for entry in REGISTRY.values() if getattr(config, entry.setting)]
    if not has_references:
        asked = [entry.setting for entry in chosen if config.is_set(entry.setting)]
        asked += ["custom_metrics"] if config.custom_metrics else []
        if asked:
            raise ConfigError(
                f"{', '.join(asked)} compare answers with references, and the evaluation rows have none: use rows with a prompt "
                "and a completion, or turn them off"
            )
        if chosen:
            logger.info(
                "no %s: the evaluation rows have no reference answers", ", ".join(entry.name for entry in chosen)
            )
        return []
    for entry in chosen:
        if entry.encoder is not None:
            entry.encoder = replace(entry.encoder, name=getattr(config, entry.encoder.setting))
    return chosen + custom_metrics(config.custom_metrics or [])


def custom_metrics(addresses: Iterable[Any]) -> list[Metric]:
    """The metrics that functions or their addresses name."""
    found = [find_function(address, "custom_metrics") for address in addresses]
    names = [getattr(function, "__name__", type(function).__name__) for function in found]
    return [Metric(name, function, "custom_metrics") for name, function in zip(names, found, strict=True)]


def check_best_metric(name: str, metrics: Iterable[Metric], others: Iterable[str] = ("loss", "perplexity")) -> str:
    """`name` as the trainer logs it, with "eval_" in front; `others` are metrics that need no answers.

    Raises:
        ConfigError: nothing gives this metric. (A custom metric may give any name, so with one nothing is refused.)
    """
    plain = name.removeprefix("eval_")
    metrics = list(metrics)
    known = {*others, *(produced for entry in metrics for produced in entry.produces or ())}
    if plain not in known and all(entry.produces is not None for entry in metrics):
        raise ConfigError(f"metric_for_best_model: {not_a_metric(name, known)}")
    return f"eval_{plain}"


def compute(
    metrics: Sequence[Metric],
    predictions: Sequence[str],
    references: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    device: str | None = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """All metrics together, and the scores per row of those that have them.

    Raises:
        DataError: an empty reference.
        ConfigError: two metrics give the same name.
    """
    blank = [at for at, text in enumerate(references) if not text.strip()]
    if blank:
        raise DataError(f"reference {blank[0]} is empty: there is nothing to compare the answer with")
    totals: dict[str, float] = {}
    by_row: dict[str, list[float]] = {}
    for entry in metrics:
        try:
            means, rows = entry(predictions, references, columns, device)
        except Exception as error:
            error.add_note(f"in the metric {entry.name!r} ({entry.setting})")
            raise
        twice = sorted(means.keys() & totals.keys())
        if twice:
            raise ConfigError(
                f"{entry.setting}: the metric {entry.name!r} gives {', '.join(twice)}, which another metric gives too"
            )
        totals |= means
        by_row |= rows
    return totals, by_row
