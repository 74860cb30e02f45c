"""Which files may model-written code reach? A Landlock domain: read Python's own folders, write the scratch folder.

Landlock (Linux 5.13, no privilege needed) confines a process for good. Beyond files, version 4 refuses TCP, and
version 6 signals and abstract unix sockets that lead out of the domain; a process in a domain cannot trace one
outside it. Landlock does not hide names: `stat` still tells whether a path exists and how large it is.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Callable, Iterable

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SYM, REFER, TRUNCATE, IOCTL_DEV = (
    1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12, 1 << 13, 1 << 14, 1 << 15,
)  # fmt: skip
ALL_OF_VERSION_1 = (1 << 13) - 1
TCP, SCOPES = 3, 3  # bind | connect; abstract unix sockets | signals

syscall = ctypes.CDLL(None, use_errno=True).syscall
syscall.restype = ctypes.c_long


def version() -> int:
    """The kernel's Landlock version, 0 where there is none."""
    if os.uname().sysname != "Linux":
        return 0
    return max(0, _syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _syscall(number: int, *arguments: object) -> int:
    return int(syscall(ctypes.c_long(number), *arguments))


def open_paths(paths: Iterable[str]) -> list[int]:
    """`O_PATH` descriptors of those paths that exist, without those that lie below another."""
    real = sorted({os.path.realpath(path) for path in paths if os.path.exists(path)})
    tops = [path for path in real if not any(path.startswith(other + "/") for other in real)]
    return [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in tops]


def confine(abi: int, readable: Iterable[int], writable: Iterable[int], check: Callable[[int, str], None]) -> None:
    """Enter the domain. `readable` and `writable` are `O_PATH` descriptors; the caller has set no_new_privs."""
    handled = ALL_OF_VERSION_1 | (REFER if abi >= 2 else 0) | (TRUNCATE if abi >= 3 else 0)
    handled |= IOCTL_DEV if abi >= 5 else 0
    attributes = struct.pack("<QQQ", handled, TCP if abi >= 4 else 0, SCOPES if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    check(ruleset, "landlock_create_ruleset")
    read = READ_FILE | READ_DIR
    write = read | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
    for descriptors, rights in ((readable, read), (writable, write)):
        for descriptor in descriptors:
            of_file = READ_FILE | WRITE_FILE | TRUNCATE
            allowed = rights & handled & (-1 if stat.S_ISDIR(os.fstat(descriptor).st_mode) else of_file)
            rule = struct.pack("<Qi", allowed, descriptor)
            check(_syscall(ADD_RULE, ruleset, 1, rule, 0), "landlock_add_rule")
    check(_syscall(RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
