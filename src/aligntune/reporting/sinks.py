"""Which experiment trackers hear of a run? TensorBoard, Weights & Biases, Trackio and MLflow, each one small class.

They are written here and not taken from a trainer library, so that every backend reports the same names
(`train/loss`, `eval/accuracy`) and a resumed run continues its own curve. The JSON lines need none of them.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aligntune.errors import ConfigError, require
from aligntune.reporting.events import Sink
from aligntune.reporting.run import RunDirectory
from aligntune.reporting.trail import dumps

logger = logging.getLogger(__name__)


def open_loggers(
    names: str | Sequence[str],
    *,
    explicit: bool,
    run: RunDirectory,
    run_name: str | None = None,
    project: str = "aligntune",
    config: Mapping[str, Any] | None = None,
) -> list[Sink]:
    """The sinks for `loggers` / `report_to`: names, `none`, or `all` (every installed one).

    `explicit`: the user asked for them, so that a missing package raises `MissingExtra`; a default that is not
    installed is left out with one log line. Raises `ConfigError` for an unknown name.
    """
    opened: list[Sink] = []
    for name in logger_names(names):
        if not explicit and importlib.util.find_spec(name) is None:
            logger.info("%s is not installed, so the run is not logged there: pip install 'aligntune[%s]'", name, name)
            continue
        opened.append(LOGGERS[name](run, run_name or run.path.name, project, config or {}))
    return opened


def check_loggers(names: str | Sequence[str], *, explicit: bool) -> None:
    """Raise what `open_loggers` would raise for a name, before anything is written."""
    for name in logger_names(names):
        if explicit:
            require(name, extra=name, why=f"logger '{name}'")


def logger_names(names: str | Sequence[str]) -> list[str]:
    """`report_to` as a list of known names, in order, each once."""
    wanted = [names] if isinstance(names, str) else list(names)
    if "all" in wanted:
        return [name for name in LOGGERS if importlib.util.find_spec(name) is not None]
    found: list[str] = []
    for name in wanted:
        if name.lower() == "none":
            continue
        if name.lower() not in LOGGERS:
            close = difflib.get_close_matches(name.lower(), LOGGERS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(LOGGERS)}, all, none"
            raise ConfigError(f"unknown logger '{name}': {hint}")
        if name.lower() not in found:
            found.append(name.lower())
    return found


class LoggerSink(Sink):
    """What trackers share: scalar names by split, samples of one step held back until the step is over."""

    def __init__(self) -> None:
        self._samples: list[Mapping[str, Any]] = []
        self._samples_step = 0

    def metrics(self, step: int, values: Mapping[str, Any], split: str) -> None:
        self._flush_samples()
        scalars = {f"{split}/{name}": float(value) for name, value in values.items() if _is_scalar(value)}
        if scalars:
            self.log_scalars(step, scalars)

    def sample(self, step: int, sample: Mapping[str, Any]) -> None:
        if step != self._samples_step:
            self._flush_samples()
        self._samples_step = step
        self._samples.append(sample)

    def close(self, failed: bool = False) -> None:
        self._flush_samples()
        self.finish(failed)

    def _flush_samples(self) -> None:
        if self._samples:
            pending, self._samples = self._samples, []
            self.log_samples(self._samples_step, pending)

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send finite or infinite numbers by full name."""
        raise NotImplementedError

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Send all samples of one step."""
        raise NotImplementedError

    def finish(self, failed: bool) -> None:
        """End the run at the tracker, as finished or failed."""
        raise NotImplementedError


class TensorBoardSink(LoggerSink):
    """Event files in `tensorboard/` of the run directory."""

    name = "tensorboard"

    def __init__(self, run: RunDirectory, run_name: str, project: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        require("tensorboard", extra="tensorboard", why="logger 'tensorboard'")
        from torch.utils.tensorboard import SummaryWriter

        purge = run.resumed_from + 1 if run.resumed_from else None  # hide what a killed run wrote after its checkpoint
        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge)
        self._writer.add_text("config", _code(dumps(config, indent=2)), global_step=run.resumed_from)

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        for index, sample in enumerate(samples):
            self._writer.add_text(f"samples/{index}", _code(dumps(sample, indent=2)), global_step=step)

    def finish(self, failed: bool) -> None:
        self._writer.close()


class WandbSink(LoggerSink):
    """One Weights & Biases run, the same one after a resume. Offline with `WANDB_MODE=offline`, as ever.

    The step is logged as a value and made the x axis, because wandb drops rows whose own step goes back, which a
    resumed run does.
    """

    name = "wandb"

    def __init__(self, run: RunDirectory, run_name: str, project: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._wandb = require("wandb", extra="wandb", why="logger 'wandb'")
        self._run = self._wandb.init(
            project=project,
            name=run_name,
            dir=str(run.path),
            config=dict(config),
            id=_remembered(run, self.name),
            resume="allow",
        )
        _remember(run, self.name, self._run.id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        self._run.log({"samples": self._wandb.Table(**_as_table(samples)), "step": step})

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class TrackioSink(LoggerSink):
    """A local Trackio run: the wandb interface without a server."""

    name = "trackio"

    def __init__(self, run: RunDirectory, run_name: str, project: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._trackio = require("trackio", extra="trackio", why="logger 'trackio'")
        earlier = _remembered(run, self.name)
        name = (
            earlier or f"{run_name}-{uuid.uuid4().hex[:6]}"
        )  # it finds runs by name, and takes the newest of that name
        resume = "allow" if earlier else "never"
        self._trackio.init(project=project, name=name, config=json.loads(dumps(config)), resume=resume)
        _remember(run, self.name, name)

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._trackio.log(dict(scalars), step=step)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        self._trackio.log({"samples": self._trackio.Table(**_as_table(samples))}, step=step)

    def finish(self, failed: bool) -> None:
        self._trackio.finish()


class MlflowSink(LoggerSink):
    """One MLflow run, at the tracking server that MLflow itself is told of (`MLFLOW_TRACKING_URI`)."""

    name = "mlflow"

    def __init__(self, run: RunDirectory, run_name: str, project: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._mlflow = require("mlflow", extra="mlflow", why="logger 'mlflow'")
        self._mlflow.set_experiment(project)
        earlier = _remembered(run, self.name)
        active = self._mlflow.start_run(run_id=earlier, run_name=None if earlier else run_name)
        _remember(run, self.name, active.info.run_id)
        self._mlflow.log_text(dumps(config, indent=2), "config.json")

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({_mlflow_name(name): value for name, value in scalars.items()}, step=step)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        self._mlflow.log_text("".join(dumps(sample) + "\n" for sample in samples), f"samples/step_{step:07d}.jsonl")

    def finish(self, failed: bool) -> None:
        self._mlflow.end_run(status="FAILED" if failed else "FINISHED")


LOGGERS: dict[str, Callable[[RunDirectory, str, str, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "trackio": TrackioSink,
    "mlflow": MlflowSink,
}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and not math.isnan(value)


def _as_table(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(name for sample in samples for name in sample))
    return {"columns": columns, "data": [[_cell(sample.get(name, "")) for name in columns] for sample in samples]}


def _cell(value: Any) -> str | int | float:
    return value if isinstance(value, (str, int, float)) else dumps(value)


def _mlflow_name(name: str) -> str:
    """MLflow allows letters, digits and `_-. /:`; `pass@1` becomes `pass_1`."""
    return "".join(letter if letter.isalnum() or letter in "_-. /:" else "_" for letter in name)


def _code(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _remembered(run: RunDirectory, name: str) -> str | None:
    """The tracker's own id of this run, when this session continues it."""
    if not run.resumed_from or not run.loggers.exists():
        return None
    return json.loads(run.loggers.read_text(encoding="utf-8")).get(name)


def _remember(run: RunDirectory, name: str, identity: str) -> None:
    known = json.loads(run.loggers.read_text(encoding="utf-8")) if run.loggers.exists() else {}
    run.write_json(run.loggers.name, {**known, name: identity})
