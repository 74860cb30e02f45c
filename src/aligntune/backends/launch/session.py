"""A run whose training takes place in other processes, used as if it took place here."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from aligntune.backends.launch.job import Job, Unavailable
from aligntune.backends.launch.plan import LaunchPlan, launch_plan
from aligntune.backends.launch.supervise import Processes, search_path
from aligntune.config.dump import plain_tree
from aligntune.config.resolve import Resolved, resolve
from aligntune.errors import BackendError, ConfigError
from aligntune.reporting import RunDirectory
from aligntune.stopping import told_to_stop

logger = logging.getLogger(__name__)

LAUNCHED = "ALIGNTUNE_LAUNCHED"
"""Set in every process that was started for a run, so that it does not start others."""


class RemoteSession:
    """`train` starts the processes, passes their output on, raises what they raised and returns their metrics.

    Everything else is answered by a session in this process: of the data before training, and of the saved model after.
    """

    def __init__(
        self, resolved: Resolved, backend: Any, reasons: Sequence[str], local: Any, plan: Callable[[Job], LaunchPlan],
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """`local`: the backend that answers in this process, and trains when `backend` turns out not to be available and
        the run allows a fallback; `plan`: from the job to the commands that run it, with `environment`."""
        self.resolved = resolved
        self.config: Any = resolved.config
        self.backend: str = backend.name
        self.reasons = list(reasons)
        self.metrics: dict[str, float] = {}
        self.directory = RunDirectory(self.config.logging.output_dir)
        self._local_backend = local
        self._plan = plan
        self._environment = environment
        self._trained = False

    def train(self, resume: str | bool | None = None, overwrite: bool = False) -> dict[str, float]:
        """As `Session.train`; Ctrl-C stops every process and is raised here."""
        job = Job(self.directory.path / "launch")
        job.write(self.resolved, self.backend, self.reasons, {"resume": resume, "overwrite": overwrite})
        plan = self._plan(job)
        for path, text in plan.files.items():
            path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{plan.shown()}\n")
        sys.stdout.flush()
        if "slurm" in plan.commands:
            return self._submit(plan)
        try:
            self.metrics = _run(plan, job, self._environment)
        except Unavailable as error:
            return self._fall_back(error, resume, overwrite)
        self._trained = True
        vars(self).pop("_here", None)
        return self.metrics

    def _fall_back(self, error: Unavailable, resume: str | bool | None, overwrite: bool) -> dict[str, float]:
        if not self.config.fallback:
            raise error
        logger.warning("backend %s: %s; using %s", self.backend, error, self._local_backend.name)
        self.reasons.append(f"{self.backend}: {error}")
        self.backend = self._local_backend.name
        vars(self).pop("_here", None)
        self.metrics = self._here.train(resume, overwrite)
        return self.metrics

    def save_model(self, path: str | Path | None = None, *, merge: bool = False) -> Path:
        """As `Session.save_model`: a copy of the saved model, or with `merge` its full weights in bfloat16."""
        folder = Path(path) if path is not None else self.directory.model
        if merge:
            from aligntune.models.use import export

            export(str(self.directory.model), folder)
        elif folder != self.directory.model:
            shutil.copytree(self.directory.model, folder, dirs_exist_ok=True)
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool = True, merge: bool = False) -> str:
        """As `Session.push_to_hub`."""
        from aligntune.models.save import push_folder

        merged = self.directory.path / "merged"
        return push_folder(self.save_model(merged if merge else None, merge=merge), repo_id, private=private)

    def evaluate(self) -> dict[str, float]:
        """As `Session.evaluate`, in this process."""
        self.metrics = self._here.evaluate()
        return self.metrics

    def predict(self, inputs: Any, **options: Any) -> list[Any]:
        """As `Session.predict`, in this process."""
        found: list[Any] = self._here.predict(inputs, **options)
        return found

    def preview(self, rows: int = 3) -> list[list[Any]]:
        """As `Session.preview`."""
        found: list[list[Any]] = self._here.preview(rows)
        return found

    def describe(self) -> str:
        """As `Session.describe`, with the command."""
        plan = self._plan(Job(self.directory.path / "launch"))
        return f"{self._here.describe()}\nstarted by: {plan.shown()}"

    def __getattr__(self, name: str) -> Any:
        """`model`, `tokenizer`, `train_rows` and the like: those of this process."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._here, name)

    @cached_property
    def _here(self) -> Any:
        """The session of this process: of the run, or of what it saved."""
        from aligntune.api import session_class

        resolved = self.resolved
        if self._trained:
            tree, _ = plain_tree(self.resolved)
            tree["model"] = {**tree.get("model", {}), "name_or_path": str(self.directory.model)}
            resolved = resolve(tree)
        session = session_class(resolved)(resolved, self._local_backend, self.reasons)
        session.backend = self.backend
        return session

    def _submit(self, plan: LaunchPlan) -> dict[str, float]:
        command = plan.commands["slurm"]
        if shutil.which(command[0]) is None:
            raise ConfigError(
                f"launch.launcher: slurm needs sbatch, which is not here; the script is written: submit {command[1]} where it is"
            )
        subprocess.run(command, check=True)
        return {}


def _run(plan: LaunchPlan, job: Job, more: Mapping[str, str]) -> dict[str, float]:
    environment = {LAUNCHED: "1", "PYTHONPATH": search_path(), **more}
    with told_to_stop(), Processes(plan.commands, environment) as processes:
        code = processes.wait()
    error, last = job.first_error(), "".join(processes.last_lines)
    if type(error) is BackendError and last:  # a rank that was killed is only felt by the others, as a lost connection
        raise BackendError(f"{error}\nthe last lines of the processes:\n{last}")
    if error is not None:
        raise error
    if code:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise BackendError(
            f"a process of the run {how} without reporting an error (out of memory?)"
            + (f"; its last lines:\n{last}" if last else "")
        )
    metrics: dict[str, float] = job.result()["metrics"]
    return metrics


def is_launched() -> bool:
    """Whether this process was started as one of a run's, by us or by a launcher of the user's."""
    return any(name in os.environ for name in (LAUNCHED, "RANK", "LOCAL_RANK"))


def launched_session(resolved: Resolved, backend: Any, reasons: Sequence[str]) -> RemoteSession:
    """The session of a run with a `launch` section."""

    def plan(job: Job) -> LaunchPlan:
        import torch

        gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        worker = ["-m", "aligntune.backends.launch.worker", str(job.file)]
        return launch_plan(resolved.config, worker, job.folder, gpus=gpus)

    return RemoteSession(resolved, backend, reasons, backend, plan)


def unsloth_session(resolved: Resolved, backend: Any, reasons: Sequence[str]) -> RemoteSession:
    """The session of a run on Unsloth: one child process that imports it first."""
    from aligntune.backends.select import backends, why_not

    known = [each for each in backends().values() if each.name != backend.name]
    local = next((each for each in known if why_not(each, resolved.config) is None), known[-1])
    cache = RunDirectory(resolved.config.logging.output_dir).path / "launch" / "unsloth_compiled_cache"
    environment = {"UNSLOTH_COMPILE_LOCATION": str(cache), "UNSLOTH_DISABLE_STATISTICS": "1"}

    def plan(job: Job) -> LaunchPlan:
        command = [sys.executable, "-m", "aligntune.backends.unsloth_worker", str(job.file)]
        return LaunchPlan({"localhost": command}, {})

    return RemoteSession(resolved, backend, reasons, local, plan, environment)
