"""What is taken from a child before it runs model-written code? Everything, in the order in which it must go.

The fork server leaves the network (`detach_network`); each child then sets its limits, loses its capabilities,
enters a Landlock domain and last a seccomp filter (`enter`). `layers` names what is applied, so that a layer the
kernel refuses can be left out knowingly; nothing here decides whether that is good enough.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
import sysconfig
from dataclasses import dataclass

from . import landlock, seccomp

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
CAPSET = {"x86_64": 126, "aarch64": 91}
MEBIBYTE = 1 << 20
LINUX = os.uname().sysname == "Linux"

libc = ctypes.CDLL(None, use_errno=True)


class ConfinementError(Exception):
    """A layer that was promised could not be applied: the child must not run anything."""


@dataclass
class Layers:
    """What the child is put under. `landlock` is the kernel's version, 0 for none."""

    seccomp: bool = False
    landlock: int = 0
    network_namespace: bool = False

    @property
    def writes(self) -> bool:
        """Whether the scratch folder may be written: only where the rest of the file system is out of reach."""
        return self.landlock > 0 or not self.seccomp


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise ConfinementError(f"{what}: {os.strerror(number)}")


def detach_network() -> str:
    """Leave the network and the user namespace, and with it every capability; returns '' or why it was refused."""
    if not hasattr(libc, "unshare"):
        return "this system has no namespaces"
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) != 0:
        return os.strerror(ctypes.get_errno())
    return ""


def readable_paths() -> list[str]:
    """Python's installation, its packages, the system's libraries and three harmless devices."""
    python = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()}
    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom"]
    own = [path for path in sorted(python) if path not in ("", "/") and not path.endswith("include")]
    return [*own, os.path.dirname(__file__), *system]


def set_limits(limits: dict[str, int], threads: int | None) -> None:
    """Resource limits of this process. `limits` has cpu_s, memory_mb, file_mb, open_files; see `sandbox.Limits`."""
    cpu = limits["cpu_s"]
    wanted = {
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_FSIZE": (limits["file_mb"] * MEBIBYTE,) * 2,
        "RLIMIT_NOFILE": (limits["open_files"],) * 2,
        "RLIMIT_AS": (limits["memory_mb"] * MEBIBYTE,) * 2,
        "RLIMIT_MSGQUEUE": (0, 0),
    }
    if cpu:
        wanted["RLIMIT_CPU"] = (cpu, cpu + 1)
    if threads is not None:
        wanted["RLIMIT_NPROC"] = (threads, threads)
    for name, pair in wanted.items():
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), pair)


def drop_capabilities() -> None:
    """Give up what root (in or out of a container) may do; a process without any capability loses nothing."""
    number = CAPSET.get(os.uname().machine)
    if LINUX and number is not None:
        libc.syscall(ctypes.c_long(number), struct.pack("<Ii", 0x20080522, 0), bytes(24))


def enter(layers: Layers, limits: dict[str, int], scratch: str, readable: list[int]) -> None:
    """Confine the calling process, a fresh child of the fork server, for good.

    Raises `ConfinementError` when a layer named in `layers` cannot be applied.
    """
    if LINUX:
        _check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PDEATHSIG)")
        _check(libc.prctl(seccomp.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(NO_NEW_PRIVS)")
        _check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(DUMPABLE)")
    set_limits(limits, _thread_limit(layers))
    drop_capabilities()
    if layers.landlock:
        folder = os.open(scratch, os.O_PATH | os.O_CLOEXEC)
        null = landlock.open_paths(["/dev/null"])
        landlock.confine(layers.landlock, readable, [folder, *null], _check)
    if layers.seccomp:
        seccomp.install(seccomp.program(os.getpid(), writes=layers.writes), _check)


def _thread_limit(layers: Layers) -> int | None:
    """RLIMIT_NPROC counts a user's processes; only in a namespace of our own (Linux 5.14) are those only ours."""
    if not layers.network_namespace:
        return None
    major, minor = (int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    return 64 if (major, minor) >= (5, 14) else None
