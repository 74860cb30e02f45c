"""`validate`, `explain`, `config schema`, `config reference`: looking at a config without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aligntune.cli.overrides import TAKES_OVERRIDES, ConfigFile, split
from aligntune.config.load import Origin
from aligntune.errors import ConfigError, RewardError

if TYPE_CHECKING:
    from aligntune.config.resolve import Resolved

config_app = typer.Typer(help="JSON schema and reference page of all settings.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.command("validate", context_settings=TAKES_OVERRIDES)(validate)
    app.command("explain", context_settings=TAKES_OVERRIDES)(explain)
    app.add_typer(config_app, name="config")


def validate(ctx: typer.Context, file: ConfigFile = None) -> None:
    """Check a config: every problem at once, with file and line."""
    from aligntune.config.resolve import resolve

    source, overrides = split(file, ctx.args)
    found = resolve(source, overrides=overrides)
    _check_rewards(found)
    given, derived = found.counts()
    print(f"{source or 'config'}: valid ({found.config.algorithm.value}, {given} settings given, {derived} derived)")


def _check_rewards(found: Resolved) -> None:
    """ConfigError that names every reward that is not there, or that has no such param, or none that could evolve so."""
    from aligntune.config.algorithms import MetaESConfig
    from aligntune.config.problems import Problem, nearest, report
    from aligntune.rewards import RewardSet

    config: Any = found.config
    problems = []
    for at, entry in enumerate(getattr(config, "rewards", [])):
        try:
            RewardSet([entry])
        except (ConfigError, RewardError) as error:
            problems.append(Problem((), str(error), nearest(found.origins, ("rewards", at)) or Origin("default")))
    if problems:
        raise ConfigError(report(problems))
    training = getattr(config, "reward_training", None)
    if isinstance(config.train, MetaESConfig):
        _check_evolution(config, config.train)
    if training is not None:
        RewardSet(training.reward_functions, training.reward_weights)


def _check_evolution(config: Any, train: Any) -> None:
    from aligntune.config.derive import reward_models
    from aligntune.rewards import RewardSet
    from aligntune.rewards.base import get as get_reward
    from aligntune.rewards.evolved import RewardGenes

    verifier = None if train.verifier is None else get_reward(train.verifier).name
    if train.target != "mirror" and config.reward_training is None and not reward_models(config):
        RewardGenes(RewardSet(config.rewards), train.evolved_params, verifier)


def explain(
    ctx: typer.Context,
    file: ConfigFile = None,
    all_settings: Annotated[
        bool, typer.Option("--all/--set", help="Every setting, or only those that are set.")
    ] = True,
) -> None:
    """Print every resolved value with where it comes from."""
    from aligntune.config.dump import origin_rows
    from aligntune.config.resolve import resolve

    source, overrides = split(file, ctx.args)
    rows = [
        row for row in origin_rows(resolve(source, overrides=overrides)) if all_settings or row["origin"] != "default"
    ]
    widths = [min(48, max(len(row[key]) for row in rows)) for key in ("path", "value")]
    for row in rows:
        print(f"{row['path']:<{widths[0]}}  {row['value']:<{widths[1]}}  {row['origin']}")


@config_app.command()
def schema(output: Annotated[Path | None, typer.Option(help="File to write; unset: the screen.")] = None) -> None:
    """JSON schema of a run file, for completion in editors."""
    from aligntune.config.reference import json_schema

    _write(json.dumps(json_schema(), indent=2) + "\n", output)


@config_app.command()
def reference(output: Annotated[Path | None, typer.Option(help="File to write; unset: the screen.")] = None) -> None:
    """The page that documents every setting (docs/reference.md)."""
    from aligntune.config.reference import reference_page

    _write(reference_page(), output)


def _write(text: str, output: Path | None) -> Any:
    if output is None:
        print(text, end="")
    else:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {output}: cannot be written ({error.strerror})") from error
        print(f"wrote {output}")
