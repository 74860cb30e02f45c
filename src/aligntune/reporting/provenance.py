"""What exactly ran? Versions, machine, code, data and command line, so that a result can be traced and repeated.

Nothing here imports a package to learn its version, and secrets in the command line are masked, because the report
page is made to be passed on.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = (
    *("aligntune", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "safetensors"),
    *("numpy", "pydantic", "unsloth", "vllm", "deepspeed", "bitsandbytes", "liger-kernel", "flash-attn", "triton"),
)

_SECRET_NAME = re.compile(r"(?i)((hub|hf|auth|access|api|bearer)[-_]?(token|key)|secret|password|passwd|credentials?)$")
_SECRET_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|gh[opsu]_[A-Za-z0-9]{8,}|[0-9a-f]{40}(?=$|\W))"
)


def collect(
    *,
    seeds: Mapping[str, int] | None = None,
    data: Sequence[Mapping[str, Any]] = (),
    backend: str | None = None,
    backend_reasons: Sequence[str] = (),
    command: Sequence[str] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Everything `provenance.json` holds.

    `data`: one mapping per dataset (`name`, `split`, `rows`, `fingerprint`, ...). `backend_reasons`: why each backend
    tried before was refused. `command`: the command line, by default this process's. `extra`: further facts by name,
    shown on the page after these.
    """
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": mask_secrets(sys.argv if command is None else command),
        "working_directory": os.getcwd(),
        "git": git_state(Path.cwd()),
        "backend": {"name": backend, "reasons": list(backend_reasons)} if backend else None,
        "seeds": dict(seeds or {}),
        "data": [dict(entry) for entry in data],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "accelerators": accelerators(),
        "packages": package_versions(),
        **extra,
    }


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions by distribution name, read from metadata; absent packages are left out."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def accelerators() -> list[str]:
    """Names and memory of the CUDA devices, if this process has already imported torch; else empty."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices]


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and whether tracked files were changed; None outside a repository or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "changed": None if changes is None else bool(changes),
    }


def mask_secrets(arguments: Sequence[str]) -> list[str]:
    """Put `***` for the values of options like `--hub_token X` and `hub_token=X`, and for strings that look like keys."""
    masked, hide_next = [], False
    for argument in arguments:
        name, separator, _ = argument.partition("=")
        if hide_next:
            masked.append("***")
        elif separator and is_secret(name):
            masked.append(f"{name}=***")
        else:
            masked.append(_SECRET_VALUE.sub("***", argument))
        hide_next = not separator and argument.startswith("-") and is_secret(argument)
    return masked


def is_secret(name: str) -> bool:
    """True for settings whose value must not be shown, such as `hub_token` or `api_key`."""
    return bool(_SECRET_NAME.search(name))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
