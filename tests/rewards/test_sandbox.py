"""What does a verdict mean? Tests and code in two processes: values cross, cheats do not."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.errors import ConfigError, RewardError
from aligntune.rewards.sandbox import Check, Isolation, Limits, Program, Sandbox, Verdict
from aligntune.rewards.sandbox.guest import seccomp, wire

SHORT = Limits(wall_s=0.5)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox("standard", workers=2) as made:
        yield made


def check(sandbox: Sandbox, code: str, *tests: str, **options: Any) -> Verdict:
    return sandbox.check(Check(code, tests, **options))


# --- programs ---------------------------------------------------------------------------------------------------


def test_a_program_reads_prints_and_ends(sandbox: Sandbox) -> None:
    output = sandbox.run(Program("import sys; print(input()[::-1]); print('e', file=sys.stderr); sys.exit(3)", "abc\n"))
    assert (output.stdout, output.stderr, output.exit_code, output.status) == ("cba\n", "e\n", 3, "error")


def test_the_end_of_a_program_is_pythons(sandbox: Sandbox) -> None:
    code = (
        "import atexit, threading, time\n"
        "atexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('thread'))).start()\n"
        "if __name__ == '__main__': print('main')"
    )
    assert sandbox.run(Program(code)).stdout == "main\nthread\nlast\n"


def test_an_uncaught_error_is_shown(sandbox: Sandbox) -> None:
    output = sandbox.run(Program("1/0"))
    assert output.status == "error"
    assert output.exit_code == 1
    assert "ZeroDivisionError" in output.stderr


def test_the_scratch_folder_is_writable_and_fresh(sandbox: Sandbox) -> None:
    code = "import os, tempfile; print(os.listdir()); open('a', 'w').write('x'); print(os.listdir(), tempfile.mkdtemp() != '')"
    first, second = sandbox.run_all([Program(code)] * 2)
    assert first.stdout == second.stdout == "[]\n['a'] True\n"


def test_asyncio_and_common_modules_work(sandbox: Sandbox) -> None:
    code = (
        "import asyncio, shutil, dataclasses, csv, sqlite3\n"
        "async def f(): await asyncio.sleep(0); return 7\n"
        "open('a', 'w').write('x'); shutil.copy('a', 'b')\n"
        "print(asyncio.run(f()), sqlite3.connect(':memory:').execute('select 1').fetchone()[0], open('b').read())"
    )
    assert sandbox.run(Program(code)).stdout == "7 1 x\n"


def test_a_timeout_is_a_timeout(sandbox: Sandbox) -> None:
    output = sandbox.run(Program("print(1, flush=True)\nwhile True: pass", limits=SHORT))
    assert (output.status, output.stdout) == ("timeout", "1\n")


def test_output_is_cut(sandbox: Sandbox) -> None:
    assert len(sandbox.run(Program("print('x' * 5000)", limits=Limits(output_kb=1))).stdout) == 1024


def test_the_same_code_gives_the_same_output(sandbox: Sandbox) -> None:
    outputs = sandbox.run_all([Program("import random; print({'a', 'b', 'c'}, hash('x'), random.random())")] * 4)
    assert len({output.stdout for output in outputs}) == 1


# --- verdicts ---------------------------------------------------------------------------------------------------


def test_statements_count_one_by_one(sandbox: Sandbox) -> None:
    verdict = check(sandbox, "def f(x): return x + 1", "assert f(1) == 2", "assert f(1) == 3", "assert f('a')")
    assert (verdict.passed, verdict.total, verdict.status) == (1, 3, "ok")
    assert verdict.failures[0] == ""
    assert verdict.failures[1] == "assertion failed"
    assert "TypeError" in verdict.failures[2]
    assert verdict.fraction == pytest.approx(1 / 3)


def test_check_of_a_candidate_with_helpers_of_the_prompt(sandbox: Sandbox) -> None:
    prompt = "def double(x):\n    return 2 * x\n\n\ndef quadruple(x):\n    '''4x, by double.'''\n"
    tests = "def check(candidate):\n    assert candidate(3) == 12\n    assert double(candidate(1)) == 8\n"
    options = {"kind": "check", "setup": prompt, "entry_point": "quadruple"}
    assert check(sandbox, prompt + "    return double(double(x))\n", tests, **options).fraction == 1
    assert check(sandbox, prompt + "    return 4\n", tests, **options).fraction == 0
    # the tests use the prompt's own `double`, so overwriting it does not help
    cheat = prompt + "    return 12\ndef double(x): return 8\n"
    assert check(sandbox, cheat, tests, **options).fraction == 0


FUNCTIONS = """
import unittest
from solution import Stack, EmptyError

def test_push():
    stack = Stack(); stack.push(1); stack.push(2)
    assert stack.pop() == 2 and len(stack) == 1

def test_empty():
    try: Stack().pop()
    except EmptyError as error: assert isinstance(error, IndexError) and 'empty' in str(error)
    else: assert False

class TestStack(unittest.TestCase):
    def test_repr(self):
        self.assertEqual(repr(Stack()), 'Stack([])')
    def test_iterates(self):
        stack = Stack(); stack.push('a')
        self.assertEqual(list(stack), ['a'])
        self.assertIn('a', stack)
        self.assertIsInstance(stack, Stack)
"""
STACK = """
class EmptyError(IndexError): pass
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self):
        if not self.items: raise EmptyError('empty stack')
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __contains__(self, x): return x in self.items
    def __repr__(self): return f'Stack({self.items})'
"""


def test_functions_and_unittest_classes_over_the_codes_objects(sandbox: Sandbox) -> None:
    verdict = check(sandbox, STACK, FUNCTIONS, kind="functions")
    assert verdict.failures == ("", "", "", ""), verdict
    chosen = check(
        sandbox, STACK, FUNCTIONS, kind="functions", names=("test_push", "TestStack.test_repr", "test_absent")
    )
    assert chosen.names == ("test_push", "TestStack.test_repr", "test_absent")
    assert chosen.passed == 2


def test_shared_classes_travel_by_value_however_deep(sandbox: Sandbox) -> None:
    node = "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n"
    code = node + (
        "def reverse(head):\n    last = None\n    while head:\n        head.next, last, head = last, head, head.next\n    return last\n"
    )
    setup = node + (
        "def chain(values):\n    head = None\n    for v in reversed(values): head = Node(v, head)\n    return head\n"
        "def values(head):\n    out = []\n    while head: out.append(head.value); head = head.next\n    return out\n"
    )
    verdict = check(
        sandbox, code, "assert values(reverse(chain(range(5000)))) == list(range(4999, -1, -1))", setup=setup
    )
    assert verdict.fraction == 1, verdict


def test_callbacks_and_recursion_through_them(sandbox: Sandbox) -> None:
    code = "def apply(f, n):\n    return 1 if n == 0 else n * f(n - 1)\ndef pick(key, xs): return sorted(xs, key=key)"
    tests = (
        "assert apply(lambda n: apply(lambda m: 1, n), 3) == 6",
        "assert pick(lambda x: -x, [1, 3, 2]) == [3, 2, 1]",
    )
    assert check(sandbox, code, *tests).failures == ("", "")


def test_arguments_are_copies_unless_asked(sandbox: Sandbox) -> None:
    code = "def f(x, d):\n    x.sort(); d['n'] = len(x)"
    test = "x, d = [3, 1], {}\nf(x, d)\nassert x == [1, 3] and d == {'n': 2}"
    assert check(sandbox, code, test).fraction == 0
    assert check(sandbox, code, test, in_place=True).fraction == 1


def test_generators_and_lazy_objects(sandbox: Sandbox) -> None:
    code = "def squares(n):\n    for i in range(n): yield i * i\ndef pairs(): return zip([1], [2])"
    assert check(sandbox, code, "assert list(squares(3)) == [0, 1, 4]", "assert dict(pairs()) == {1: 2}").failures == (
        "",
        "",
    )


def test_a_timeout_keeps_the_results_before_it(sandbox: Sandbox) -> None:
    verdict = check(
        sandbox,
        "def f(x):\n    while x: pass\n    return 0",
        "assert f(0) == 0",
        "assert f(1)",
        "assert f(0) == 0",
        limits=SHORT,
    )
    assert (verdict.passed, verdict.total, verdict.status) == (1, 3, "timeout")


def test_broken_tests_are_told_from_wrong_code(sandbox: Sandbox) -> None:
    assert "SyntaxError" in check(sandbox, "def f(): return 1", "assert f( == 1").broken
    assert check(sandbox, "def f(: return 1", "assert f() == 1").broken == ""


# --- cheats: each tries to pass `assert f(2) == 5` and the like without computing it ------------------------------

CHEATS = {
    "exit_at_once": "import sys; sys.exit(0)",
    "exit_hard": "import os; os._exit(0)",
    "exit_when_called": "import os\ndef f(x): os._exit(0)",
    "system_exit_when_called": "def f(x): raise SystemExit(0)",
    "interrupt_when_called": "def f(x): raise KeyboardInterrupt",
    "skip": "import unittest\ndef f(x): raise unittest.SkipTest('no')",
    "at_exit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 0",
    "equal_to_everything": "class E:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\ndef f(x): return E()",
    "equal_integer": "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return E(4)",
    "equal_list": "class E(list):\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "less_than_everything": "class E:\n    def __sub__(self, o): return self\n    __rsub__ = __abs__ = lambda self, *a: self\n    def __lt__(self, o): return True\n    __le__ = __gt__ = __ge__ = __lt__\ndef f(x): return E()",
    "class_that_lies": "class E:\n    __class__ = int\n    def __eq__(self, o): return True\ndef f(x): return E()",
    "builtins_patched": "import builtins\nbuiltins.abs = builtins.isinstance = lambda *a: True\nbuiltins.AssertionError = ValueError\ndef f(x): return 4",
    "assert_disabled": "import ast, sys\nsys.flags = None\n__debug__\ndef f(x): return 4",
    "own_check": "def check(candidate): pass\ndef f(x): return 4\nassert_equal = lambda *a: None",
    "shadowed_builtins": "abs = len = all = any = isinstance = lambda *a: 0\ndef f(x): return 4",
    "tests_in_memory": "import gc\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, str) and '== 5' in o: return 5\n    return 4",
    "tests_in_frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        if '== 5' in repr(frame.f_locals) + repr(frame.f_globals): return 5\n        frame = frame.f_back\n    return 4",
    "tests_in_modules": "import sys\ndef f(x):\n    return 5 if 'tests' in sys.modules or any('== 5' in repr(vars(m)) for m in list(sys.modules.values()) if m and hasattr(m, '__dict__')) else 4",
    "tests_in_raw_memory": "import ctypes\ndef f(x):\n    n = id(f) & ~0xfffff\n    return 5 if b'f(2) == ' + b'5' in ctypes.string_at(n, 1 << 18).replace(b\"b'f(2)\", b'') else 4",
    "forged_verdict": "import json, os, struct\nfor body in ({'test': 't', 'failure': ''}, {'ended': 1, 'failure': ''}):\n    data = json.dumps(body).encode()\n    for fd in range(64):\n        try: os.write(fd, struct.pack('>I', len(data)) + data)\n        except OSError: pass\ndef f(x): return 4",
    "forged_answer_stream": "import json, os, struct\ndata = json.dumps({'gives': [True, []]}).encode()\nfor fd in range(3, 64):\n    try: os.write(fd, (struct.pack('>I', len(data)) + data) * 9)\n    except OSError: pass\ndef f(x): return 4",
    "forged_builtins_name": "import sys\nclass T(Exception): pass\nglobals().update({'__builtins__': T, 'AssertionError': T, 'print': T})\ndef f(x): return 4",
    "hostile_frames": "import os, struct\nbad = b'[' * 100000\nfor fd in range(3, 64):\n    try: os.write(fd, struct.pack('>I', len(bad)) + bad)\n    except OSError: pass\ndef f(x): return 4",
    "huge_frame": "import os, struct\nfor fd in range(3, 64):\n    try: os.write(fd, b'\\xff' * 8)\n    except OSError: pass\ndef f(x): return 4",
    "guest_patched": "import sys\nfor name, module in list(sys.modules.items()):\n    if name.startswith('guest'):\n        module.__dict__.update(send=print, receive=print, encode=lambda *a: [True, []])\ndef f(x): return 4",
    "patched_json": "import json\njson.dumps = lambda *a, **k: '{\"gives\":[5,[]]}x'\ndef f(x): return 4",
    "reaches_into_callbacks": "def f(x):\n    try: return x.__globals__\n    except AttributeError: return 4",
    "unprintable_error": "class E(Exception):\n    def __str__(self): raise SystemExit(0)\ndef f(x): raise E()",
    "loops_forever": "def f(x):\n    while True: pass",
    "kills_the_tests": "import os, signal\ndef f(x):\n    for pid in range(max(2, os.getpid() - 4), os.getpid() + 5):\n        if pid != os.getpid():\n            try: os.kill(pid, signal.SIGKILL)\n            except OSError: pass\n    return 4",
}  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS, ids=str)
def test_cheats_score_nothing(cheat: str, sandbox: Sandbox) -> None:
    with_all = (
        "assert f(2) == 5",
        "assert abs(f(2) - 5) < 1e-6",
        "x = f(2)\nassert x >= 5 and x <= 5",
        "assert f(2) in (5,)",
    )
    verdict = check(sandbox, CHEATS[cheat], *with_all, limits=SHORT)
    assert (verdict.passed, verdict.total) == (0, 4), verdict
    tests = "def check(candidate):\n    assert candidate(2) == 5\n"
    verdict = check(sandbox, CHEATS[cheat], tests, kind="check", entry_point="f", limits=SHORT)
    assert verdict.fraction == 0, verdict
    assert check(sandbox, "def f(x): return 5", *with_all).fraction == 1


# --- the wire ---------------------------------------------------------------------------------------------------


def roundtrip(value: object) -> Any:
    def no(*_: object) -> Any:
        raise AssertionError("a plain value needs no handle")

    import json

    return wire.decode(json.loads(json.dumps(wire.encode(value, lambda item: None, no))), no, no)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False) | st.fractions() | st.dates() | st.decimals(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
    | st.sets(st.integers() | st.text()) | st.frozensets(st.tuples(st.integers(), st.text())),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(plain)
def test_plain_values_arrive_as_they_were(value: object) -> None:
    back = roundtrip(value)
    assert back == value
    assert type(back) is type(value)


def test_other_values_arrive_too() -> None:
    for value in (
        1 << 5000,
        -(1 << 64),
        math.inf,
        Counter("aab"),
        deque([1, 2], 3),
        range(1, 9, 2),
        int,
        bytearray(b"x"),
    ):
        assert roundtrip(value) == value
    assert math.isnan(roundtrip(math.nan))
    assert (
        roundtrip([Fraction(1, 3), Decimal("1.10"), datetime.datetime(2024, 1, 2, 3)])[1].as_tuple()
        == Decimal("1.10").as_tuple()
    )


def test_sharing_and_cycles_survive() -> None:
    loop: list[Any] = [[1]]
    loop += [loop[0], loop]
    back = roundtrip(loop)
    assert back[0] is back[1]
    assert back[2] is back


def test_depth_is_no_matter() -> None:
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    back, depth = roundtrip(deep), 0
    while back:
        back, depth = back[0], depth + 1
    assert depth == 20_000


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(max_size=2), lambda x: st.lists(x, max_size=4), max_leaves=12))
def test_malformed_values_are_refused_or_plain(data: Any) -> None:
    with contextlib.suppress(wire.ProtocolError):
        wire.decode(data, {}.__getitem__, lambda side, number: None)


# --- isolation levels ---------------------------------------------------------------------------------------------


def test_less_isolation_than_asked_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"isolation='standard' cannot be had(.|\n)*network(.|\n)*isolation='minimal'"
    ):
        Sandbox("standard", workers=1, without=("seccomp", "landlock", "namespace"))
    with pytest.raises(ConfigError, match="choose one of strict, standard, minimal"):
        Sandbox("paranoid", workers=1)


def test_the_statement_says_what_is_missing() -> None:
    guarantees = {"network": True, "writes": False, "processes": True, "reads": False}
    text = str(Isolation(guarantees, True, 0, False, {}))
    assert "held: network, processes" in text
    assert "writes: NOT held" in text
    assert "no Landlock" in text


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="memory_mb=0"):
        Limits(memory_mb=0)


def test_both_architectures_have_a_filter() -> None:
    for machine in seccomp.AUDIT_ARCH:
        code = seccomp.program(1234, writes=True, machine=machine)
        assert len(code) % 8 == 0
        assert len(code) // 8 < 4096
        assert (1234).to_bytes(4, "little") in code
        assert seccomp.STAND_IN.to_bytes(4, "little") not in code


def test_jobs_from_many_threads_do_not_mix(sandbox: Sandbox) -> None:
    results: dict[int, str] = {}

    def one(n: int) -> None:
        results[n] = sandbox.run(Program(f"print({n})")).stdout

    threads = [threading.Thread(target=one, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: f"{n}\n" for n in range(16)}


def test_a_lost_fork_server_is_replaced(sandbox: Sandbox) -> None:
    with Sandbox("minimal", workers=1) as own:
        slot = own._slots.queue[0]
        assert slot is not None
        os.kill(slot.process.pid, 9)
        slot.process.wait()
        with pytest.raises(RewardError, match="fork server ended"):
            own.run(Program("print(1)"))
        assert own.run(Program("print(1)")).stdout == "1\n"
