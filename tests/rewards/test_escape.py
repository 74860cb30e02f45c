"""Does the sandbox hold? Attacks from inside, each followed by a look at what it could have harmed outside."""

from __future__ import annotations

import glob
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aligntune.errors import ConfigError
from aligntune.rewards.sandbox import Limits, Program, Sandbox
from aligntune.rewards.sandbox.guest.zygote import descendants

from . import sandbox_attacks as attacks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guarantees are Linux's")
FAST = Limits(wall_s=3, memory_mb=256, file_mb=2, scratch_mb=4, scratch_files=200, output_kb=64)
SHORT = Limits(wall_s=0.4, memory_mb=256, file_mb=2, scratch_mb=4, scratch_files=200, output_kb=64)
SECRET = "hf_not_a_real_token_9d1f"


class Outside:
    """What an attack could harm, and the check that it did not."""

    def __init__(self, folder: Path, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.nonce = f"escaped{os.getpid()}x{time.monotonic_ns()}"
        self.folder = folder
        self.canary = folder / "canary.txt"
        self.canary.write_text("untouched")
        self.canary.chmod(0o640)
        self.status = self.canary.stat()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)

    def fill(self, code: str) -> str:
        values = {
            "CANARY": self.canary, "OUTSIDE": self.folder, "NONCE": self.nonce, "PARENT": os.getpid(),
            "PORT": self.listener.getsockname()[1], "SECRET": SECRET,
        }  # fmt: skip
        for name, value in values.items():
            code = code.replace(f"@{name}@", str(value))
        return attacks.TRY + code

    def unharmed(self) -> None:
        after = self.canary.stat()
        assert self.canary.read_text() == "untouched"
        assert (after.st_mode, after.st_uid, after.st_nlink) == (self.status.st_mode, self.status.st_uid, 1)
        assert os.listdir(self.folder) == ["canary.txt"]
        homes = ["/tmp", "/var/tmp", "/dev/shm", str(Path.home()), os.getcwd(), "/", sys.prefix]
        assert [path for home in homes for path in glob.glob(f"{home}/*{self.nonce}*")] == []
        with pytest.raises(BlockingIOError):
            self.listener.accept()
        servers = {slot.process.pid for slot in list(self.sandbox._slots.queue) if slot}
        roots = {slot.root for slot in list(self.sandbox._slots.queue) if slot}
        assert [pid for server in servers for pid in descendants(server)] == []
        assert [folder for root in roots for folder in glob.glob(f"{root}/job-*")] == []
        assert self.sandbox.run(Program("print('alive')")).stdout == "alive\n"


LAYERS = {"every layer": (), "seccomp alone": ("landlock", "namespace")}


@pytest.fixture(scope="module", params=LAYERS.values(), ids=LAYERS.keys())
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    os.environ["ALIGNTUNE_TEST_SECRET"] = SECRET
    try:
        made = Sandbox("standard", workers=1, without=request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    with made:
        yield made
    del os.environ["ALIGNTUNE_TEST_SECRET"]


@pytest.fixture
def outside(sandbox: Sandbox, tmp_path: Path) -> Iterator[Outside]:
    made = Outside(tmp_path, sandbox)
    yield made
    made.listener.close()


REFUSED = attacks.PROCESSES | attacks.FILES | attacks.NETWORK


@pytest.mark.parametrize("attack", REFUSED, ids=str)
def test_what_is_forbidden_is_refused(attack: str, outside: Outside) -> None:
    output = outside.sandbox.run(Program(outside.fill(REFUSED[attack]), limits=FAST))
    assert "LEAK" not in output.stdout, output
    assert "WROTE" not in output.stdout, output
    assert output.stdout or attack == "core_dump", output
    assert output.stdout.count("written") <= 1, "only the channel, on which nothing is awaited, is open"
    outside.unharmed()


# What is read depends on Landlock, what is used up on no layer: once is enough.
strongest = pytest.mark.parametrize("sandbox", [()], ids=["every layer"], indirect=True)


@strongest
@pytest.mark.parametrize("attack", attacks.READS, ids=str)
def test_what_is_private_is_not_read(attack: str, outside: Outside) -> None:
    if not outside.sandbox.isolation.guarantees["reads"] and attack != "own_environment":
        pytest.skip("this kernel has no Landlock, and `isolation` says so")
    output = outside.sandbox.run(Program(outside.fill(attacks.READS[attack]), limits=FAST))
    assert output.stdout, output
    assert "LEAK" not in output.stdout, output
    outside.unharmed()


@strongest
@pytest.mark.parametrize("attack", attacks.EXHAUSTION, ids=str)
def test_what_is_used_up_is_bounded(attack: str, outside: Outside) -> None:
    began = time.monotonic()
    output = outside.sandbox.run(Program(outside.fill(attacks.EXHAUSTION[attack]), limits=SHORT))
    assert time.monotonic() - began < SHORT.wall_s + 3
    assert "DONE" not in output.stdout
    assert len(output.stdout) <= SHORT.output_kb << 10
    assert len(output.stderr) <= SHORT.output_kb << 10
    outside.unharmed()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="an instruction of x86")
def test_the_32_bit_gate_is_shut(outside: Outside) -> None:
    output = outside.sandbox.run(Program(outside.fill(attacks.INT_80), limits=FAST))
    assert output.status == "killed"
    assert "LEAK" not in output.stdout
    outside.unharmed()


CONTROL = ("fork_once", "double_fork_daemon", "write_outside", "symlink_through", "read_file", "tcp", "memfd")


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Without the layers the same programs succeed, so their failure above is the layers' doing."""
    with Sandbox("minimal", workers=1, without=("seccomp", "landlock", "namespace")) as sandbox:
        for attack in CONTROL:
            outside = Outside(tmp_path, sandbox)
            output = sandbox.run(Program(outside.fill((REFUSED | attacks.READS)[attack]), limits=FAST))
            assert "LEAK" in output.stdout or "WROTE" in output.stdout, attack
            servers = [slot.process.pid for slot in list(sandbox._slots.queue) if slot]
            assert [pid for server in servers for pid in descendants(server)] == [], "even then nothing is left behind"
            outside.listener.close()


AS_USER = """
import sys
sys.path.insert(0, sys.argv[1])
from aligntune.rewards.sandbox import Check, Program, Sandbox
with Sandbox("standard", workers=1) as sandbox:
    code = "import os, socket\\nfor what in (os.fork, socket.socket, lambda: os.kill(os.getppid(), 9)):\\n"
    code += "    try: what(); print('LEAK')\\n    except OSError: print('refused')"
    print(sandbox.run(Program(code)).stdout, sandbox.check(Check("def f(): return 1", ("assert f() == 1",))).fraction)
"""


def test_an_ordinary_user_is_protected_too() -> None:
    if os.getuid() != 0:
        pytest.skip("every other test here runs as an ordinary user")
    user = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/", "capture_output": True, "text": True}
    source = str(Path(__file__).parents[2] / "src")
    for python in (sys.executable, "/usr/bin/python3"):
        ready = "import os, sys; sys.exit(sys.version_info < (3, 11) or not os.access(sys.argv[1], os.R_OK))"
        try:
            if subprocess.run([python, "-c", ready, source], check=False, **user).returncode:
                continue
        except OSError:
            continue
        run = subprocess.run([python, "-c", AS_USER, source], check=False, timeout=60, **user)
        assert run.stdout == "refused\nrefused\nrefused\n 1.0\n", run
        return
    pytest.skip("no Python here that another user can start")


def test_a_dead_trainer_takes_its_children_along() -> None:
    """The fork server and a running job end when the process that started them is killed outright."""
    program = (
        "import os, signal, threading, time\n"
        "from aligntune.rewards.sandbox import Sandbox, Program, Limits\n"
        "from aligntune.rewards.sandbox.guest.zygote import descendants\n"
        "s = Sandbox('minimal', workers=1)\n"
        "threading.Thread(target=s.run, args=(Program('while True: pass', limits=Limits(wall_s=60)),)).start()\n"
        "while len(descendants(os.getpid())) < 2: time.sleep(0.01)\n"
        "print(*descendants(os.getpid()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    pids = [int(word) for word in run.stdout.split()]
    assert len(pids) == 2, run
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}/cmdline") for pid in pids):
        time.sleep(0.02)
    assert not [pid for pid in pids if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
