"""How do editors and readers learn the settings? The JSON schema and `docs/reference.md`, both from the classes."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import create_model
from pydantic.fields import FieldInfo

from aligntune.config import applies, rl, sft
from aligntune.config.algorithms import TRAINING_CLASSES
from aligntune.config.base import OneOf, Section
from aligntune.config.enums import AlgorithmType
from aligntune.config.launch import LaunchConfig
from aligntune.config.rewards import RewardConfig, RewardModelSourceConfig, RewardModelTrainingConfig
from aligntune.config.run import RLRunConfig, RunConfig, SFTRunConfig
from aligntune.config.synonyms import RENAMES

TABLES: list[tuple[str, str, str, type[Section]]] = [
    ("Every run", "run", "", RunConfig),
    ("Every run: launch", "run", "launch", LaunchConfig),
    ("SFT: model", "sft", "model", sft.ModelConfig),
    ("SFT: dataset", "sft", "dataset", sft.DatasetConfig),
    ("SFT: train", "sft", "train", sft.TrainingConfig),
    ("SFT: evaluation", "sft", "evaluation", sft.EvaluationConfig),
    ("SFT: logging", "sft", "logging", sft.LoggingConfig),
    ("RL: model", "rl", "model", rl.ModelConfig),
    ("RL: dataset", "rl", "dataset", rl.DatasetConfig),
    ("RL: train", "rl", "train", rl.TrainingConfig),
    ("RL: logging", "rl", "logging", rl.LoggingConfig),
    ("RL: logging.sample_logging", "rl", "", rl.SampleLoggingConfig),
    ("RL: one entry of rewards", "rl", "", RewardConfig),
    ("RL: reward_training", "rl", "", RewardModelTrainingConfig),
    ("RL: model.reward_model_source", "rl", "", RewardModelSourceConfig),
]


def json_schema() -> dict[str, Any]:
    """JSON schema of a run file: one branch per algorithm, told apart by `algorithm`."""
    branches: list[type[Section]] = [_with_algorithm(SFTRunConfig, AlgorithmType.SFT)]
    for algorithm, train_class in TRAINING_CLASSES.items():
        run = create_model(f"{train_class.__name__}Run", __base__=RLRunConfig, train=(train_class, train_class()))
        branches.append(_with_algorithm(run, algorithm))
    definitions: dict[str, Any] = {}
    options = []
    for branch in branches:
        schema = branch.model_json_schema(ref_template="#/$defs/" + branch.__name__ + ".{model}")
        for name, part in schema.pop("$defs", {}).items():
            definitions[f"{branch.__name__}.{name}"] = part
        options.append(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "AlignTune run",
        "oneOf": options,
        "$defs": definitions,
    }


def _with_algorithm(run: type[Any], algorithm: AlgorithmType) -> type[Any]:
    return create_model(f"{algorithm.value}_run", __base__=run, algorithm=(Literal[algorithm.value], ...))  # type: ignore[arg-type]


def reference_page() -> str:
    """`docs/reference.md`, generated; CI fails when the file differs."""
    parts = [
        "# Settings\n\nGenerated from the config classes by `aligntune config reference`; do not edit.\n\n"
        "Any setting can be given in YAML, as an argument of `create_sft_trainer` / `create_rl_trainer`, or on the command "
        "line as `section.name=value`. Names that mean the same are listed under *also*.\n"
    ]
    for title, side, section, cls in TABLES:
        parts.append(_table(title, cls, _aliases(side, section), _users(section) if side == "rl" else {}))
    for algorithm, train_class in TRAINING_CLASSES.items():
        own = [name for name in train_class.model_fields if name in train_class.__annotations__]
        inherited = [name for name in train_class.model_fields if name not in rl.TrainingConfig.model_fields]
        names = list(dict.fromkeys([*own, *inherited]))
        if names:
            parts.append(_table(f"RL: train, {algorithm.value}", train_class, {}, {}, names))
    return "\n".join(parts)


def _aliases(side: str, section: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for alias, name in RENAMES.get(side, {}).get(section, {}).items():
        found.setdefault(name, []).append(alias)
    return found


def _users(section: str) -> dict[str, str]:
    """Field -> the algorithms that take it, where not all do."""
    return {
        name: ", ".join(sorted(algorithm.value for algorithm in algorithms))
        for (part, name), algorithms in applies.APPLIES.items()
        if part == section
    }


def _table(
    title: str, cls: type[Section], aliases: dict[str, list[str]], users: dict[str, str], names: list[str] | None = None
) -> str:
    lines = [
        f"## {title}\n",
        f"{(cls.__doc__ or '').strip()}\n",
        "| setting | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, info in cls.model_fields.items():
        if names is not None and name not in names:
            continue
        text = " ".join((info.description or _inherited(cls, name)).split())
        if name in aliases:
            text += f" *Also:* {', '.join(f'`{alias}`' for alias in aliases[name])}."
        if name in users:
            text += f" *Taken by:* {users[name]}."
        lines.append(f"| `{name}` | {_escape(type_name(info))} | {_escape(_default(info))} | {_escape(text)} |")
    return "\n".join(lines) + "\n"


def _inherited(cls: type[Section], name: str) -> str:
    return next((base.model_fields[name].description or "" for base in cls.__mro__[1:]
                 if issubclass(base, Section) and name in base.model_fields and base.model_fields[name].description), "")  # fmt: skip


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "see its table"
    return f"`{value.value if hasattr(value, 'value') else value!r}`".replace("'", '"')


def type_name(info: FieldInfo) -> str:
    """A setting's type in words that a reader of YAML knows."""
    words = next((item.words for item in info.metadata if isinstance(item, OneOf)), None)
    return " \\| ".join(f"`{word}`" for word in words).replace("\\|", "|") if words else _name(info.annotation)


def _name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        words = next((item.words for item in get_args(annotation)[1:] if isinstance(item, OneOf)), None)
        return " | ".join(f"`{word}`" for word in words) if words else _name(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_name(part) for part in get_args(annotation) if part is not type(None)))
    if origin is list:
        return f"list of {_name(get_args(annotation)[0])}"
    if origin is dict:
        return "dict"
    if annotation is Any:
        return "any"
    return getattr(annotation, "__name__", str(annotation))


def walk() -> Iterator[tuple[str, str, str, FieldInfo]]:
    """(side, class name, setting, field) of every setting, for tests and tools."""
    for _, side, _, cls in TABLES:
        for name, info in cls.model_fields.items():
            yield side, cls.__name__, name, info
    for algorithm, train_class in TRAINING_CLASSES.items():
        for name, info in train_class.model_fields.items():
            yield algorithm.value, train_class.__name__, name, info
