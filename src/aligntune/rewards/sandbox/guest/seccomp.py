"""Which system calls may model-written code make? A seccomp filter that allows a list and refuses the rest.

Refused calls fail with an errno, which Python turns into `OSError`, so ordinary code can handle them. No call that
opens a socket, starts a process or a program, traces or signals another process, or mounts anything is on the list;
io_uring is not either. Numbers are those of the kernel's `unistd.h` for the two architectures below; on others
`supported()` is False and the caller has to say so. The aarch64 column has not been run on hardware.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct
from collections.abc import Callable

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86_64, aarch64); None where the architecture has no such call.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "close": (3, 57), "close_range": (436, 436), "fstat": (5, 80), "stat": (4, None),
    "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "brk": (12, 214), "madvise": (28, 233),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132), "pause": (34, None), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "getdents64": (217, 61), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "fcntl": (72, 25), "flock": (73, 32), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20),
    "epoll_create": (213, None), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getrusage": (98, 165), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getpid": (39, 172),
    "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158),
    "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156), "uname": (63, 160), "sysinfo": (99, 179),
    "getrandom": (318, 278), "futex": (202, 98), "set_robust_list": (273, 99), "get_robust_list": (274, 100),
    "rseq": (334, 293), "exit": (60, 93), "exit_group": (231, 94), "setitimer": (38, 103), "getitimer": (36, 102),
    "alarm": (37, None), "restart_syscall": (219, 128), "membarrier": (324, 283), "fsync": (74, 82),
    "fdatasync": (75, 83), "ftruncate": (77, 46), "fallocate": (285, 47), "fadvise64": (221, 223),
    "sendfile": (40, 71), "copy_file_range": (326, 285), "umask": (95, 166), "recvfrom": (45, 207),
    "shutdown": (48, 210), "getsockname": (51, 204), "getsockopt": (55, 209), "setsockopt": (54, 208),
    "getcpu": (309, 168), "statfs": (137, 43), "fstatfs": (138, 44), "getpriority": (140, 141),
    "getrlimit": (97, 163),
    # paths that change the file system
    "open": (2, None), "openat": (257, 56), "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "utime": (132, None),
    "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    # calls with a rule of their own
    "clone": (56, 220), "clone3": (435, 435), "openat2": (437, 437), "ioctl": (16, 29), "kill": (62, 129),
    "tgkill": (234, 131), "prlimit64": (302, 261), "socketpair": (53, 199), "sendto": (44, 206), "prctl": (157, 167),
}  # fmt: skip

CHANGES_FILES = [
    "creat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "unlink",
    "unlinkat",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
]
# No right of Landlock covers these, so they do nothing and report success: `shutil.copy` and `tempfile` need that.
IGNORED = ["chmod", "fchmod", "fchmodat", "fchmodat2", "utime", "utimes", "utimensat", "futimesat"]

ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LD, JEQ, JGE, AND, RET = 0x20, 0x15, 0x35, 0x54, 0x06
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CLONE_THREAD, AF_UNIX, PR_SET_NAME, PR_GET_NAME = 0x10000, 1, 15, 16
FIONBIO, FIOCLEX = 0x5421, 0x5451
STAND_IN = 0xFEEDF00D

libc = ctypes.CDLL(None, use_errno=True)
Instruction = tuple[int, int, int, int]


def supported() -> bool:
    """Whether this architecture has a table here and the kernel takes filters."""
    if platform.system() != "Linux" or platform.machine() not in AUDIT_ARCH:
        return False
    # No filter at address 0: a kernel that takes filters says EFAULT, one that does not EINVAL.
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0)
    return ctypes.get_errno() == errno.EFAULT


def _refuse(number: int) -> Instruction:
    return (RET, 0, 0, ERRNO | number)


def _when(argument: int, value: int, *, mask: int | None = None, high: int | None = None) -> list[Instruction]:
    """Instructions that fall through when the argument (its low 32 bits under `mask`) is `value`, else refuse.

    `high` also compares the upper half, for pointers.
    """
    low_offset = 16 + 8 * argument
    block: list[Instruction] = [(LD, 0, 0, low_offset)]
    if mask is not None:
        block.append((AND, 0, 0, mask))
    block += [(JEQ, 1, 0, value), _refuse(errno.EPERM)]
    if high is not None:
        block += [(LD, 0, 0, low_offset + 4), (JEQ, 1, 0, high), _refuse(errno.EPERM)]
    return block


def _one_of(argument: int, first: int, second: int, error: int = errno.EPERM) -> list[Instruction]:
    """Fall through when the argument is one of the two, else refuse."""
    return [(LD, 0, 0, 16 + 8 * argument), (JEQ, 2, 0, first), (JEQ, 1, 0, second), _refuse(error)]


def _rules(pid: int, writes: bool) -> dict[str, list[Instruction]]:
    allow: Instruction = (RET, 0, 0, ALLOW)
    read_only = errno.EROFS

    def open_rule(flags_argument: int) -> list[Instruction]:
        if writes:
            return [allow]
        offset = 16 + 8 * flags_argument
        return [(LD, 0, 0, offset), (AND, 0, 0, WRITE_FLAGS), (JEQ, 1, 0, 0), _refuse(read_only), allow]

    rules: dict[str, list[Instruction]] = {
        "open": open_rule(1),
        "openat": open_rule(2),
        "clone": [*_when(0, CLONE_THREAD, mask=CLONE_THREAD), allow],
        "clone3": [_refuse(errno.ENOSYS)],  # its flags lie in memory, out of a filter's sight: libc falls back to clone
        "openat2": [_refuse(errno.ENOSYS)],
        "ioctl": [*_one_of(1, FIONBIO, FIOCLEX, error=errno.ENOTTY), allow],  # sockets set O_NONBLOCK through it
        "kill": [*_when(0, pid), allow],
        "tgkill": [*_when(0, pid), allow],
        "prlimit64": [*_when(0, 0), *_when(2, 0, high=0), allow],  # read one's own limits, set none
        "socketpair": [*_when(0, AF_UNIX), allow],  # asyncio wakes its loop through one
        "sendto": [*_when(4, 0, high=0), allow],  # no address: only over a pair made here
        "prctl": [*_one_of(0, PR_SET_NAME, PR_GET_NAME), allow],
    }
    rules |= {name: [allow] if writes else [_refuse(read_only)] for name in CHANGES_FILES}
    rules |= {name: [_refuse(0)] if writes else [_refuse(read_only)] for name in IGNORED}
    return rules


def program(pid: int, *, writes: bool, machine: str | None = None) -> bytes:
    """The filter as `struct sock_filter[]` for the process `pid`; with `writes` False no file can be changed."""
    template, places = _template(writes, machine or platform.machine())
    code = bytearray(template)
    for place in places:
        struct.pack_into("<I", code, place, pid)
    return bytes(code)


@functools.cache
def _template(writes: bool, machine: str) -> tuple[bytes, list[int]]:
    """The filter with a stand-in for the process's number, and where it stands: building it takes a millisecond."""
    column = list(AUDIT_ARCH).index(machine)
    code: list[Instruction] = [(LD, 0, 0, 4), (JEQ, 1, 0, AUDIT_ARCH[machine]), (RET, 0, 0, KILL_PROCESS)]
    code.append((LD, 0, 0, 0))
    if machine == "x86_64":
        code += [(JGE, 0, 1, 0x40000000), (RET, 0, 0, KILL_PROCESS)]  # the x32 numbering of the same calls
    rules = _rules(STAND_IN, writes)
    for name, numbers in NUMBERS.items():
        number = numbers[column]
        if number is None:
            continue
        block = rules.get(name, [(RET, 0, 0, ALLOW)])
        code += [(JEQ, 0, len(block), number), *block]
    code.append(_refuse(errno.EPERM))
    places = [8 * index + 4 for index, instruction in enumerate(code) if instruction[3] == STAND_IN]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code), places


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def install(code: bytes, check: Callable[[int, str], None]) -> None:
    """Put the calling process under the filter, for good. `check(result, what)` raises on a negative result."""
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(NO_NEW_PRIVS)")
    prog = _Program(len(code) // 8, code)
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(prog), 0, 0), "prctl(SECCOMP)")
