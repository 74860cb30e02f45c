"""How does the trainer talk to one fork server? It starts it, has children made, and ends them on time.

One slot runs one job at a time; a pool of slots keeps the cores busy. The fork server is given a clean environment, so
no token of the trainer's is in reach, and it ends by itself when this process does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import site
import socket
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

from aligntune.errors import RewardError

from . import scratch
from .limits import Isolation, Limits

GUEST = Path(__file__).parent / "guest"
BOOT = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("guest", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
sys.modules["guest"] = importlib.util.module_from_spec(spec)
from guest.zygote import main
role = main(**json.loads(sys.argv[2]))
if role is not None:
    role()
"""
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",  # an arena a thread would eat the address space
}


class Slot:
    """One fork server. `without` leaves out layers by name (seccomp, landlock, namespace); `preload` names modules."""

    def __init__(self, without: tuple[str, ...] = (), preload: tuple[str, ...] = ()) -> None:
        self.root = tempfile.mkdtemp(prefix="aligntune-sandbox-")
        ours, theirs = socket.socketpair()
        self.control = ours
        options = {
            "control_descriptor": theirs.fileno(),
            "without": list(without),
            "preload": list(preload),
            "packages": packages(),
        }
        command = [sys.executable, "-P", "-s", "-B", "-X", "utf8", "-c", BOOT, str(GUEST), json.dumps(options)]
        with theirs:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=ENVIRONMENT,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._finalizer = weakref.finalize(self, _end, self.process, self.control, self.root, os.getpid())
        self._answer()

    def _answer(self) -> dict[str, Any]:
        data = self.control.recv(1 << 16)
        if not data:
            raise RewardError(f"the sandbox's fork server ended: {self._last_words()}")
        return dict(json.loads(data))

    def _last_words(self) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.stderr is not None
        return self.process.stderr.read().decode(errors="replace")[-2000:] or f"exit {self.process.wait()}"

    def request(self, op: str, descriptors: list[int] | None = None, **arguments: Any) -> dict[str, Any]:
        """One request to the fork server and its answer."""
        message = json.dumps({"op": op, **arguments}).encode()
        try:
            socket.send_fds(self.control, [message], descriptors or [])
        except OSError as error:
            raise RewardError(f"the sandbox's fork server ended: {self._last_words()}") from error
        return self._answer()

    def spawn(self, role: str, descriptors: list[int], limits: Limits, scratch: str, *, cpu: bool = True) -> int:
        """Have a confined child made; `descriptors` are stdin, stdout, stderr and its channels. Returns its pid."""
        answer = self.request("spawn", descriptors, role=role, limits=limits.for_kernel(cpu=cpu), scratch=scratch)
        if "pid" not in answer:
            raise RewardError(f"the sandbox cannot start a process: {answer.get('refused')}")
        return int(answer["pid"])

    def reap(self, pids: list[int], grace_s: float = 0.0) -> list[dict[str, Any]]:
        """End the children, at once or after `grace_s`; how each ended."""
        return list(self.request("reap", pids=pids, grace_s=grace_s)["ended"])

    def isolation(self) -> Isolation:
        """Try the confinement out."""
        folder = scratch.fresh(self.root)
        answer = self.request("probe", limits=Limits().for_kernel(), scratch=folder)
        scratch.remove(folder)
        held, layers = answer["held"], answer["layers"]
        if "error" in held:
            raise RewardError(f"the sandbox cannot be set up: {held['error']}")
        guarantees = {
            name: all(value for attempt, value in held.items() if attempt.split()[0] == name)
            for name in ("network", "writes", "processes", "reads")
        }
        return Isolation(
            guarantees, layers["seccomp"], layers["landlock"], layers["network_namespace"], answer["notes"]
        )

    def close(self) -> None:
        """End the fork server and everything under it; remove its folders. Also done when this process ends."""
        self._finalizer()


def _end(process: subprocess.Popen[bytes], control: socket.socket, root: str, owner: int) -> None:
    control.close()  # the fork server ends at this, and cleans up
    if owner != os.getpid():
        return  # a fork of the trainer shares the server and leaves it alone
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.stderr is not None
    process.stderr.close()
    if os.path.exists(root):
        scratch.remove(root)


def packages() -> list[str]:
    """The folders of installed packages that this process imports from: code may import what is installed."""
    folders = {*site.getsitepackages(), site.getusersitepackages()}
    return [path for path in sys.path if path in folders and os.path.isdir(path)]
