"""Are these values right? A tree of values becomes checked sections, with errors in a user's words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from aligntune.config.base import Section
from aligntune.config.layers import canonical_entry
from aligntune.config.load import Origin
from aligntune.config.problems import Work, all_names, nearest, places, short
from aligntune.config.rewards import RewardConfig, RewardModelTrainingConfig
from aligntune.config.run import RLRunConfig, SFTRunConfig, run_class, section_classes
from aligntune.config.synonyms import Path, renames
from aligntune.config.words import suggest

LISTS = ("datasets", "rewards")
"""Sections that come several at a time."""


def validate(work: Work) -> SFTRunConfig | RLRunConfig | None:
    tree = dict(work.tree)
    tree["algorithm"] = work.algorithm
    parts: dict[str, Any] = {}
    classes = section_classes(work.algorithm)
    if tree.get("datasets") and not tree.get("dataset", {}).get("name"):
        tree.pop("dataset", None)  # its settings are those of every one of `datasets`
    for section, cls in classes.items():
        if section == "dataset" and "dataset" not in tree:
            continue
        parts[section] = _build(work, cls, tree.pop(section, {}), (section,))
    if "eval_dataset" in tree:
        parts["eval_dataset"] = _build(
            work, classes["dataset"], _inherit(tree.pop("eval_dataset"), work.tree), ("eval_dataset",)
        )
    for name in LISTS:
        if name in tree:
            parts[name] = _build_list(
                work, classes["dataset"] if name == "datasets" else RewardConfig, tree.pop(name), (name,)
            )
    if tree.get("reward_training") is not None:
        parts["reward_training"] = _build(
            work, RewardModelTrainingConfig, tree.pop("reward_training"), ("reward_training",)
        )
    if "dataset" not in work.tree and not work.tree.get("datasets"):
        work.complain(("dataset", "name"), "is required: a file, folder or hub dataset", Origin("default"))
    failed = tuple(name for name, part in parts.items() if part is None or (isinstance(part, list) and None in part))
    return _build(work, run_class(work.algorithm), tree | parts, (), skip=failed)


def _inherit(given: Any, tree: Mapping[str, Any]) -> Any:
    """An evaluation dataset has the settings of `dataset` that it does not give itself."""
    if not isinstance(given, dict):
        return given
    own = ("name", "split", "percent", "max_samples", "subset", "config_name", "weight")
    base = {key: value for key, value in tree.get("dataset", {}).items() if key not in own or "name" not in given}
    return base | given


def _build(work: Work, cls: type[Section], data: Any, at: Path, skip: tuple[str, ...] = ()) -> Any:
    """An instance of `cls`, or None with its problems noted; `skip` names parts whose problems are noted already."""
    if isinstance(data, cls):
        return data
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        seen: set[Path] = set()
        for detail in error.errors(include_url=False):
            if detail["loc"] and detail["loc"][0] in skip:
                continue
            path = (*at, *_setting_path(detail["loc"], detail["type"] == "extra_forbidden"))
            if any(path[: len(one)] == one or one[: len(path)] == path for one in seen):
                continue  # another branch of a union whose first one is reported
            seen.add(path)
            work.complain(path, _explain(work, cls, detail), nearest(work.origins, path) or Origin("default"))
        return None


def _build_list(work: Work, cls: type[Section], data: Any, at: Path) -> list[Any]:
    if not isinstance(data, (list, tuple)):
        work.complain(at, f"should be a list, got {short(data)}", nearest(work.origins, at) or Origin("default"))
        return []
    if cls is RewardConfig:
        items = [item if isinstance(item, (dict, RewardConfig)) else {"type": item} for item in data]
    else:
        base = {} if work.tree.get("dataset", {}).get("name") else work.tree.get("dataset", {})
        items = [{"name": item} if isinstance(item, (str, os.PathLike)) else item for item in data]
        items = [
            base | canonical_entry(work, (*at, index), item, nearest(work.origins, (*at, index)) or Origin("default"))
            if isinstance(item, dict)
            else item
            for index, item in enumerate(items)
        ]
    work.tree[str(at[-1])] = items  # entries, however they were spelt
    return [_build(work, cls, item, (*at, index)) for index, item in enumerate(items)]


def _setting_path(loc: tuple[str | int, ...], unknown: bool) -> Path:
    """pydantic's location without the names of union branches; the last part of an `unknown` one is what the user wrote."""
    end = len(loc) - unknown
    return (*(part for part in loc[:end] if not (isinstance(part, str) and _is_branch(part))), *loc[end:])


def _is_branch(part: str) -> bool:
    return not part.isidentifier() or part in ("str", "int", "float", "bool")


PLAIN_TYPES = {
    "int_type": "should be a whole number", "int_from_float": "should be a whole number", "float_type": "should be a number",
    "bool_type": "should be true or false", "string_type": "should be text", "list_type": "should be a list",
    "dict_type": "should hold settings by name", "model_type": "should hold settings by name",
}  # fmt: skip


def _explain(work: Work, cls: type[Section], detail: Any) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])
        return "is not a setting" + _where_instead(work, cls, name)
    if kind == "missing":
        return "is required"
    text = PLAIN_TYPES.get(kind) or detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return text if kind == "value_error" and not text.startswith("should") else f"{text}, got {short(value)}"


def _where_instead(work: Work, cls: type[Section], name: str) -> str:
    outer, dot, inner = name.partition(".")
    if dot and outer in section_classes(work.algorithm):
        return f": in a file, put {inner} under {outer}:"
    own = [*cls.model_fields]
    for section, section_class in section_classes(work.algorithm).items():
        if section_class is cls:
            own += renames(work.algorithm)[section]
    for path in places(work.algorithm, name):
        return f" here: say {'.'.join(map(str, path))}"
    return suggest(name, own) or suggest(name, all_names(work.algorithm))
