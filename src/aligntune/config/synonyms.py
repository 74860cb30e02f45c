"""Which names mean the same setting? The only place that knows.

`RENAMES` are further spellings of one field. A `Group` joins fields that each have a row in the reference: the value of
whichever is given goes to the canonical one, and the others are made to show the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aligntune.config.applies import GROUP_RELATIVE
from aligntune.config.enums import AlgorithmType

Path = tuple[str | int, ...]

SHARED_TRAIN = {
    "num_epochs": "epochs", "num_train_epochs": "epochs", "batch_size": "per_device_batch_size",
    "per_device_train_batch_size": "per_device_batch_size", "optim": "optimizer", "lr_scheduler_type": "lr_scheduler",
}  # fmt: skip

RENAMES: dict[str, dict[str, dict[str, str]]] = {
    "sft": {
        "model": {"model_name": "name_or_path", "lora_r": "lora_rank", "lora_target_modules": "target_modules",
                  "use_peft": "peft_enabled"},
        "dataset": {"dataset_name": "name", "config": "subset", "config_name": "subset",
                    "field_mappings": "column_mapping"},
        "train": SHARED_TRAIN | {"eval_steps": "eval_interval", "save_steps": "save_interval"},
        "logging": {"logging_steps": "log_interval"},
        "evaluation": {},
        "launch": {},
    },
    "rl": {
        "model": {"model_name": "name_or_path", "lora_rank": "lora_r", "target_modules": "lora_target_modules",
                  "peft_enabled": "use_peft"},
        "dataset": {"dataset_name": "name", "config": "config_name", "subset": "config_name"},
        "train": SHARED_TRAIN | {"log_interval": "logging_steps"},
        "logging": {},
        "launch": {},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What one value says of the canonical setting: its value, or a value that it rules out."""

    value: Any = None
    rules_out: tuple[Any, ...] = ()


def same(value: Any) -> Reading:
    return Reading(value)


def _flag(name: str, *rules_out: str) -> Callable[[Any], Reading]:
    """A boolean whose True means `name` and whose False rules `name` (and `rules_out`) out."""

    def read(value: Any) -> Reading:
        if value is True:
            return Reading(name)
        return Reading(rules_out=(name, *rules_out)) if value is False else Reading()

    return read


@dataclass(frozen=True)
class Group:
    """Fields that say the same thing. `members` maps each path to how its value reads.

    `otherwise` is the canonical value when the default is ruled out and nothing else is said; `show` gives a member's
    own value for a canonical one (None: leave it alone).
    """

    canonical: Path
    members: dict[Path, Callable[[Any], Reading]]
    otherwise: Any = None
    show: dict[Path, Callable[[Any], Any]] | None = None

    def shown(self, member: Path, value: Any) -> Any:
        return (self.show or {}).get(member, lambda canonical: canonical)(value)


def _equals(canonical: Path, *others: Path) -> Group:
    return Group(canonical, dict.fromkeys((canonical, *others), same))


def _is(word: str) -> Callable[[Any], bool]:
    return lambda value: value == word


BACKEND_FLAGS = {("model", "use_unsloth"): "unsloth", ("train", "use_trl"): "trl"}
"""True chooses the backend; False adds it to `skip_backends`."""


def _precision() -> Group:
    members: dict[Path, Callable[[Any], Reading]] = {
        ("model", "precision"): same,
        ("train", "bf16"): _flag("bf16"),
        ("train", "fp16"): _flag("fp16"),
    }
    return Group(
        ("model", "precision"), members, otherwise="fp32",
        show={("train", "bf16"): _is("bf16"), ("train", "fp16"): _is("fp16")},
    )  # fmt: skip


def _attention() -> Group:
    flag = ("train", "use_flash_attention_2")
    return Group(
        ("model", "attn_implementation"),
        {("model", "attn_implementation"): same, flag: _flag("flash_attention_2", "auto")},
        otherwise="sdpa",
        show={flag: lambda value: None if value == "auto" else value == "flash_attention_2"},
    )


SFT_GROUPS = [
    _equals(("dataset", "text_column"), ("dataset", "dataset_text_field")),
    _equals(("dataset", "dataset_num_proc"), ("train", "dataset_num_proc")),
    _equals(
        ("model", "gradient_checkpointing"),
        ("model", "use_gradient_checkpointing"),
        ("train", "gradient_checkpointing"),
    ),
    _equals(("logging", "loggers"), ("logging", "report_to")),
    _precision(),
    _attention(),
]

RL_GROUPS = [
    _equals(("dataset", "field_mappings"), ("dataset", "column_mapping")),
    _equals(("dataset", "truncation_mode"), ("train", "truncation_mode")),
    _equals(("train", "padding_free"), ("dataset", "padding_free")),
    _equals(("train", "eval_interval"), ("train", "eval_steps")),
    _equals(("train", "save_interval"), ("train", "save_steps")),
    _equals(("logging", "loggers"), ("logging", "report_to")),
]


def groups(algorithm: AlgorithmType) -> list[Group]:
    """The groups in force for `algorithm`."""
    if algorithm is AlgorithmType.SFT:
        return SFT_GROUPS
    if algorithm is AlgorithmType.DPO:
        return [
            *RL_GROUPS,
            _equals(("dataset", "precompute_ref_log_probs"), ("train", "precompute_ref_log_probs")),
        ]
    found = [*RL_GROUPS, _equals(("train", "max_completion_length"), ("train", "response_length"))]
    if algorithm in GROUP_RELATIVE:
        found.append(_equals(("train", "kl_coef"), ("train", "grpo_beta"), ("train", "beta")))
    return found


def dataset_groups(algorithm: AlgorithmType, at: Path) -> list[Group]:
    """The groups that lie within `dataset`, for another dataset of the run, whose settings are under `at`."""
    return [
        _equals(
            *(
                (*at, name)
                for _, name in (group.canonical, *(path for path in group.members if path != group.canonical))
            )
        )
        for group in groups(algorithm)
        if all(section == "dataset" for section, _ in group.members)
    ]


def mirrors(algorithm: AlgorithmType, datasets: int = 0) -> list[tuple[Path, tuple[Path, ...]]]:
    """(a field that shows what another one holds, the fields that may hold it); so many `datasets` there are."""
    found: list[tuple[Path, tuple[Path, ...]]] = [(path, (("backend",), ("skip_backends",))) for path in BACKEND_FLAGS]
    others: list[Path] = [("eval_dataset",), *(("datasets", at) for at in range(datasets))]
    for group in [*groups(algorithm), *(group for at in others for group in dataset_groups(algorithm, at))]:
        found += [(path, (group.canonical,)) for path in group.members if path != group.canonical]
    return found


def renames(algorithm: AlgorithmType) -> dict[str, dict[str, str]]:
    """Section -> further spelling -> field name."""
    return RENAMES["sft" if algorithm is AlgorithmType.SFT else "rl"]
