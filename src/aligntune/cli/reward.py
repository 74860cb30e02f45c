"""`reward list`, `test`, `score` and `train`: what rewards say, whether they can be trusted, and models of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from aligntune.cli.outputs import check_output

reward_app = typer.Typer(help="Reward functions and reward models.", no_args_is_help=True)

Data = Annotated[str, typer.Argument(help="JSON or JSONL file, folder or hub dataset.")]
Prompt = Annotated[str, typer.Option(help="Column of the prompts.")]
Limit = Annotated[int | None, typer.Option(help="At most this many rows.", min=1)]


def add_to(app: typer.Typer) -> None:
    app.add_typer(reward_app, name="reward")


@reward_app.command("list")
def list_rewards(name: Annotated[str | None, typer.Argument(help="One reward, in full.")] = None) -> None:
    """Show all rewards, or one in full: definition, range, source, columns, params, and its examples with their scores."""
    from aligntune.rewards import table

    if name is not None:
        print(table.text(name))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table("reward", "measures", "range")
    for row in table.rows():
        low, high = ("" if bound is None else f"{bound:g}" for bound in row["range"])
        shown.add_row(row["name"], row["summary"], f"{low}..{high}" if low or high else "any")
    Console().print(shown)


@reward_app.command("test")
def check_rewards(
    rewards: Annotated[
        str, typer.Argument(help="Names or addresses (file.py:function) with commas between, or a YAML list.")
    ],
    data: Data,
    gold: Annotated[str, typer.Option(help="Column of the gold answers.")] = "completion",
    prompt: Prompt = "prompt",
    limit: Limit = None,
) -> None:
    """Run rewards over gold and wrong answers; exit code 1 if gold does not score full marks."""
    from aligntune.rewards.validate import validate

    chosen = _rewards(rewards)
    _state_isolation(chosen)
    columns = _columns(data, limit)
    checks = validate(chosen, _column(columns, prompt), _column(columns, gold), columns)
    for check in checks:
        print(f"{check.name}: {'passed' if check.passed else 'FAILED: ' + check.problem}")
        for kind, found in check.distributions.items():
            mean = "-" if found.mean is None else f"{found.mean:.4f}"
            spread = " ".join(f"{value:g}" for value in found.quantiles)
            print(f"  {kind:16} n={found.count:<6} none={found.nulls:<6} mean={mean:8} quartiles: {spread}")
        for finding in [*check.gold_below_full, *check.wrong_at_full]:
            print(f"    row {finding.row} ({finding.kind}) scores {finding.score}: {finding.completion[:100]!r}")
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@reward_app.command("score")
def score(
    what: Annotated[str, typer.Argument(help="Folder or hub name of a reward model, or rewards as in `test`.")],
    data: Data,
    completion: Annotated[str, typer.Option(help="Column of the completions.")] = "completion",
    prompt: Prompt = "prompt",
    limit: Limit = None,
    output: Annotated[Path | None, typer.Option(help="File for the scored rows, one JSON object a line.")] = None,
) -> None:
    """Score the completions of a dataset."""
    if output is not None:
        check_output(output)
    columns = _columns(data, limit)
    prompts, said = _column(columns, prompt, optional=True), _column(columns, completion)
    found: list[Any]
    if _is_model(what):
        from aligntune.rewards.model import load

        found = load(what)(prompts, said)
    else:
        rewards = _rewards(what)
        _state_isolation(rewards)
        found = rewards.score(prompts, said, columns).total
    if output is not None:
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        lines = [json.dumps(row | {"score": value}, ensure_ascii=False) for row, value in zip(rows, found, strict=True)]
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    present = [value for value in found if value is not None]
    mean = f"{sum(present) / len(present):.4f}, {min(present):.4f} to {max(present):.4f}" if present else "-"
    print(f"{len(found)} rows, {len(found) - len(present)} without a score; mean {mean}")


@reward_app.command("train")
def train(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="YAML with reward_training (texts labelled by reward functions).")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Preference pairs: prompt, chosen, rejected; perhaps margin.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Pairs: the model that gets the head.")] = None,
    output: Annotated[str, typer.Option(help="Pairs: folder for the model.")] = "reward-model",
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    learning_rate: float = 1e-5,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1)] = 1,
    micro_batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Pairs: most tokens of a pass; longer batches are cut.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1)] = 1024,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Pairs: train a LoRA adapter of this rank.")] = None,
    centering: Annotated[float, typer.Option(min=0, help="Pairs: weight of (r_chosen + r_rejected)^2.")] = 0.0,
    eval_interval: Annotated[
        int | None, typer.Option(min=1, help="Pairs: steps between evaluations. Unset: an epoch.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the rows, above 0 and below 1, that is measured, not trained on.")
    ] = 0.1,
    best_metric: Annotated[
        str, typer.Option(help="Held-out metric whose best weights are kept; none keeps the last ones.")
    ] = "loss",
    seed: int = 42,
    limit: Limit = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train a reward model on texts (a config) or on preference pairs (--pairs DATA --base MODEL)."""
    from aligntune.config.base import LoraSettings
    from aligntune.errors import ConfigError

    if (config is None) == (pairs is None):
        raise ConfigError("reward train: give a YAML with reward_training, or --pairs DATA --base MODEL")
    from aligntune.trainers.reward_model import RewardTraining, train_on_pairs, train_on_texts

    common: dict[str, Any] = {
        "seed": seed, "held_out": held_out, "best_metric": None if best_metric == "none" else best_metric,
        "resume": resume, "overwrite": overwrite,
    }  # fmt: skip
    if config is not None:
        for name in set(ctx.params) - {"config", *common}:
            if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE":
                raise ConfigError(f"reward train: --{name.replace('_', '-')} is for --pairs; set it in {config}")
        done = train_on_texts(_training(config), **common)
    else:
        if base is None:
            raise ConfigError("reward train --pairs: name the model that gets the head with --base")
        lora = None if lora_rank is None else LoraSettings(lora_rank, 2 * lora_rank, 0.0, None, False)
        settings = RewardTraining(
            base, output, epochs, learning_rate, batch_size, gradient_accumulation_steps, max_length, lora,
            micro_batch_tokens=micro_batch_tokens, eval_interval=eval_interval, centering=centering, **common,
        )  # fmt: skip
        done = train_on_pairs(_pairs(pairs or "", limit), settings, source=pairs)
    print("  ".join(f"{name} {value:.4g}" for name, value in done.metrics.items()))
    print(f"model: {done.folder}")


def _training(path: Path) -> Any:
    import yaml
    from pydantic import ValidationError

    from aligntune.config.rewards import RewardModelTrainingConfig
    from aligntune.errors import ConfigError

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return RewardModelTrainingConfig.model_validate((content or {}).get("reward_training", content))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{path}: is not a YAML mapping with reward_training: {error}") from error
    except ValidationError as error:
        wrong = [f"reward_training.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(wrong)) from error


def _pairs(data: str, limit: int | None) -> list[dict[str, Any]]:
    from aligntune.config.rl import DatasetConfig
    from aligntune.data import load_rows, row_reader

    source = DatasetConfig(name=data, max_samples=limit)
    rows: Any = load_rows(source, seed=42)
    read = row_reader(rows, source, "preference")
    found = []
    for place, row in enumerate(rows):
        pair: Any = read(row, place)
        found.append(
            {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "margin": row.get("margin")}
        )
    return found


def _rewards(text: str) -> Any:
    from aligntune.rewards import RewardSet

    if text.endswith((".yaml", ".yml")):
        import yaml

        from aligntune.errors import ConfigError

        try:
            content = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{text}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{text}: is not YAML: {error}") from error
        rewards = content.get("rewards") if isinstance(content, dict) else content
        if not isinstance(rewards, list | str):
            raise ConfigError(f"{text}: has no list of rewards, with or without the key `rewards`")
        return RewardSet(rewards)
    return RewardSet([name.strip() for name in text.split(",") if name.strip()])


def _state_isolation(rewards: Any) -> None:
    for name, statement in rewards.isolation().items():
        print(f"{name} runs code; {statement}")


def _is_model(what: str) -> bool:
    from aligntune.models.files import model_folder

    folder = Path(model_folder(what))
    return (
        (folder / "config.json").exists()
        or (folder / "adapter_config.json").exists()
        or ("/" in what and ":" not in what and "," not in what and not what.endswith((".yaml", ".yml")))
    )


def _columns(data: str, limit: int | None) -> dict[str, list[Any]]:
    from aligntune.config.sft import DatasetConfig
    from aligntune.data import load_rows

    rows: Any = load_rows(DatasetConfig(name=data, max_samples=limit), seed=42)
    return {name: list(rows[name]) for name in rows.column_names}


def _column(columns: dict[str, list[Any]], name: str, *, optional: bool = False) -> list[Any]:
    from aligntune.errors import DataError

    if name in columns:
        return columns[name]
    if optional:
        return [""] * len(next(iter(columns.values())))
    raise DataError(f"no column {name!r}; there are {', '.join(columns)}: name it with an option (see --help)")
