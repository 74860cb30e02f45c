"""Does the code work, and how is it written? Tests run in the sandbox; style and syntax are read off the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Any

from aligntune.errors import RewardError

from .base import adversarial, bad, good, reward
from .samples import Text, completion_text, prompt_text
from .sandbox.jobs import Check, Output, Program, Verdict
from .sandbox.limits import Limits
from .words import after_thinking, block_in, fenced_blocks

PYTHON = ("python", "py", "python3")
UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError)  # what `ast.parse` raises on hostile source


def extract_code(text: str) -> str:
    """The last Python code block of an answer (after its thinking), or the whole text when there is none.

    A block without a language counts where no block says that it is Python: beside one that does, it is output.
    """
    text = after_thinking(text)
    blocks = fenced_blocks(text)
    python = block_in(blocks, PYTHON)
    if python is not None:
        return python
    return blocks[-1][1] if blocks else text


def parse(code: str) -> ast.Module | None:
    """The syntax tree, or None when the code is not Python."""
    if len(code) > 200_000:
        return None
    try:
        return ast.parse(code)
    except UNREADABLE:
        return None


def program(prompt: str, completion: str, entry_point: str | None) -> str:
    """The code to run: the answer's, after the prompt's when that is code which the answer continues or repeats.

    A continuation that runs on after the function (base models do) is cut at its first line that stands on the margin
    when it does not parse whole.
    """
    code = extract_code(completion)
    head = setup_of(prompt, entry_point)
    if not head:
        return code
    if entry_point is not None and re.search(rf"^(async )?def {re.escape(entry_point)}\b", code, re.MULTILINE):
        return f"{head}\n{code}"
    if parse(prompt + code) is not None:
        return prompt + code
    body = re.split(r"\n(?=[^\s#])", code)[0]
    return prompt + body


def setup_of(prompt: str, entry_point: str | None) -> str:
    """The prompt as code that runs by itself (imports, helpers, the stub), or '' when it is not code."""
    if entry_point is None or f"def {entry_point}" not in prompt:
        return ""
    return next((text for text in (prompt, f"{prompt}\n    pass\n") if parse(text) is not None), "")


def as_check(code: str, tests: Any, setup: str, entry_point: str | None, in_place: bool, limits: Limits) -> Check:
    """A dataset's tests as a job, by their shape: a list of statements (MBPP), `check(candidate)` (HumanEval), test
    functions or classes, or plain statements, of which each assert is a test."""
    kind, sources = "statements", tests
    if isinstance(tests, str):
        if entry_point is not None and re.search(r"^def check\(", tests, re.MULTILINE):
            kind, sources = "check", [tests]
        elif re.search(r"^(def test|class \w+\(.*TestCase)", tests, re.MULTILINE):
            kind, sources = "functions", [tests]
        else:
            sources = list(_asserts(tests))
    if not isinstance(sources, list | tuple) or not all(isinstance(source, str) for source in sources):
        raise RewardError(f"tests are source code, a text or a list of texts, not {type(tests).__name__}")
    return Check(code, tuple(sources), kind, setup, entry_point, in_place=in_place, limits=limits)  # type: ignore[arg-type]


def _asserts(tests: str) -> Iterator[str]:
    tree = parse(tests)
    if tree is None:
        yield tests  # the sandbox reports it as broken
        return
    pending: list[str] = []
    for node in tree.body:
        pending.append(ast.get_source_segment(tests, node) or "")
        if isinstance(node, ast.Assert):
            yield "\n".join(pending)
            pending = []
    if pending:
        yield "\n".join(pending)


def _score(verdict: Verdict, partial: bool) -> Any:
    if verdict.broken:
        return RewardError(f"the tests of this sample do not run: {verdict.broken}. Correct or drop the row")
    return verdict.fraction if partial else float(verdict.fraction == 1)


ADD = "def add(a, b):\n    return a + b"
ADD_TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


@reward(
    "code_execution",
    range=(0, 1),
    source="HumanEval, arXiv 2107.03374; MBPP, arXiv 2108.07732",
    aliases=["code_correctness", "code_verifiable", "mbpp", "mbpp_reward", "humaneval"],
    examples=[
        good(f"```python\n{ADD}\n```", tests=ADD_TESTS),
        good("    return a + b\n", prompt="def add(a, b):\n", tests="def check(candidate):\n    assert candidate(1, 2) == 3\n", entry_point="add"),
        bad("```python\ndef add(a, b):\n    return 3\n```", tests=ADD_TESTS),
        bad("```python\ndef add(a, b):\n    return 3\n```", 0.5, params={"partial": True}, tests=ADD_TESTS),
        adversarial("```python\nimport sys\nsys.exit(0)\n```", 0.0, tests=ADD_TESTS, note="leaving before the tests"),
        adversarial(
            "```python\nclass E:\n    def __eq__(self, other): return True\ndef add(a, b):\n    return E()\n```",
            0.0, tests=ADD_TESTS, note="an object equal to everything",
        ),
    ],
)  # fmt: skip
def code_execution(
    prompts: list[Text],
    completions: list[Text],
    tests: list[Any],
    entry_point: Any = None,
    setup: Any = None,
    *,
    partial: bool = False,
    in_place: bool = False,
    timeout_s: float = 10.0,
    memory_mb: int = 512,
    isolation: str = "standard",
) -> list[Any]:
    """1 if the code passes every test of its row in the sandbox; `partial`: the share of tests it passes.

    `tests`: a list of assert statements, or source with `check(candidate)` (then `entry_point`), test functions or
    unittest classes. `setup`: trusted code the tests need. Arguments are copies unless `in_place`.
    """
    from .sandbox import shared

    limits = Limits(wall_s=timeout_s, memory_mb=memory_mb)
    names, setups = _column(entry_point, len(completions)), _column(setup, len(completions))
    jobs = []
    for prompt, completion, test, name, trusted in zip(prompts, completions, tests, names, setups, strict=True):
        asked = prompt_text(prompt)
        code = program(asked, completion_text(completion), name)
        jobs.append(as_check(code, test, trusted or setup_of(asked, name), name, in_place, limits))
    return [_score(verdict, partial) for verdict in shared(isolation).check_all(jobs)]


def _column(values: Any, size: int) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else [values] * size


@reward(
    "unit_tests",
    range=(0, 1),
    examples=[
        good(f"```python\n{ADD}\n```", tests="def test_add():\n    assert add(1, 2) == 3", test_names=["test_add"]),
        bad(
            f"```python\n{ADD}\n```", 0.5, test_names=["test_add", "test_more"],
            tests="def test_add():\n    assert add(1, 2) == 3\ndef test_more():\n    assert add(1, 1) == 3",
        ),
        adversarial(
            "```python\ndef test_add(): pass\ndef add(a, b): return 0\n```", 0.0, test_names=["test_add"],
            tests="def test_add():\n    assert add(1, 2) == 3", note="its own test of that name",
        ),
    ],
)  # fmt: skip
def unit_tests(
    completions: list[Text],
    tests: list[str],
    test_names: Any = None,
    *,
    strict: bool = False,
    module: str = "solution",
    timeout_s: float = 10.0,
    memory_mb: int = 512,
    isolation: str = "standard",
) -> list[Any]:
    """Share of the named test functions and unittest methods that pass; `strict`: 1 only if all do.

    The tests find the code's names in their namespace, or import them from `module`. Without the column `test_names`
    every test counts.
    """
    from .sandbox import shared

    limits = Limits(wall_s=timeout_s, memory_mb=memory_mb)
    jobs = [
        Check(
            extract_code(completion_text(completion)),
            (source,),
            "functions",
            names=tuple(names) if names else None,
            module=module,
            limits=limits,
        )
        for completion, source, names in zip(completions, tests, test_names or [None] * len(tests), strict=True)
    ]
    return [_score(verdict, not strict) for verdict in shared(isolation).check_all(jobs)]


@reward(
    "stdin_stdout",
    range=(0, 1),
    source="the tests of APPS and Codeforces: input in, expected output out",
    examples=[
        good("```python\nprint(sum(map(int, input().split())))\n```", inputs=["1 2\n", "3 4\n"], outputs=["3\n", "7\n"]),
        bad("```python\nprint(3)\n```", 0.5, inputs=["1 2\n", "3 4\n"], outputs=["3\n", "7\n"]),
        adversarial("```python\nprint('3\\n7')\n```", 0.0, inputs=["1 2\n", "3 4\n"], outputs=["3\n", "7\n"], note="every output at once"),
    ],
)  # fmt: skip
def stdin_stdout(
    completions: list[Text],
    inputs: list[list[str]],
    outputs: list[list[str]],
    *,
    strict: bool = False,
    timeout_s: float = 10.0,
    memory_mb: int = 512,
    isolation: str = "standard",
) -> list[float]:
    """Share of the inputs for which the program prints the expected words; `strict`: 1 only if all do.

    Outputs are compared word by word, so that spaces and line ends do not matter.
    """
    from .sandbox import shared

    limits = Limits(wall_s=timeout_s, memory_mb=memory_mb)
    codes = [extract_code(completion_text(completion)) for completion in completions]
    jobs = [Program(code, given, limits) for code, row in zip(codes, inputs, strict=True) for given in row]
    results = iter(shared(isolation).run_all(jobs))
    shares = [_share(row, results) for row in outputs]
    return [float(share == 1) if strict else share for share in shares]


def _share(expected: Sequence[str], results: Iterator[Output]) -> float:
    right = [
        result.status == "ok" and result.stdout.split() == wanted.split() for wanted, result in zip(expected, results)
    ]
    return sum(right) / len(right) if right else 0.0


@reward(
    "code_runs",
    range=(0, 1),
    heuristic=True,
    examples=[
        good("```python\nprint(sum(range(10)))\n```"),
        bad("```python\nprint(undefined)\n```"),
        adversarial("```python\n# nothing here\n```", 0.0, note="no code cannot fail"),
    ],
)
def code_runs(
    completions: list[Text], *, timeout_s: float = 10.0, memory_mb: int = 512, isolation: str = "standard"
) -> list[float]:
    """1 if the code has a statement and runs to its end without an error; says nothing of what it computes."""
    from .sandbox import shared

    codes = [extract_code(completion_text(completion)) for completion in completions]
    limits = Limits(wall_s=timeout_s, memory_mb=memory_mb)
    results = shared(isolation).run_all([Program(code, limits=limits) for code in codes])
    return [
        float(result.status == "ok" and _has_code(parse(code))) for result, code in zip(results, codes, strict=True)
    ]


def _has_code(tree: ast.Module | None) -> bool:
    return tree is not None and any(not is_filler(node) for node in tree.body)


def is_filler(node: ast.stmt) -> bool:
    """`pass`, `...` and strings that stand alone."""
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


@reward(
    "code_syntax",
    range=(0, 1),
    source="CPython's parser",
    examples=[
        good(f"```python\n{ADD}\n```"),
        bad("```python\ndef add(a, b) return a + b\n```"),
        adversarial("```python\n# just a comment\n```", 0.0, note="nothing to be wrong"),
        adversarial("(" * 5000, 0.0, note="nesting that breaks parsers"),
    ],
)
def code_syntax(completion: str) -> float:
    """1 if the code parses as Python and has at least one statement that does something."""
    return float(_has_code(parse(extract_code(completion))))


@reward(
    "code_format",
    range=(0, 1),
    examples=[
        good(f"Here it is:\n```python\n{ADD}\n```"),
        bad(ADD),
        adversarial("```python\n```", 0.0, note="an empty block"),
    ],
)
def code_format(completion: str, *, language: str = "python", blocks: int = 1) -> float:
    """1 if the answer (after its thinking) has exactly `blocks` closed code blocks of that language, none empty."""
    text = after_thinking(completion)
    found = fenced_blocks(text)
    closed = len(re.findall(r"^ {0,3}```", text, re.MULTILINE)) == 2 * len(found)
    return float(closed and len(found) == blocks and all(name == language and body.strip() for name, body in found))


@reward(
    "codebleu",
    range=(0, 1),
    source="Ren et al. 2020, arXiv 2009.10297",
    examples=[
        good(f"```python\n{ADD}\n```", (0.99, 1.0), reference=ADD),
        bad("```python\nprint('hello')\n```", (0.0, 0.3), reference=ADD),
        adversarial("a b return def add + , ( ) :", (0.0, 0.5), reference=ADD, note="its tokens, shuffled"),
    ],
)
def codebleu(completions: list[Text], reference: list[Any], *, language: str = "python") -> list[float]:
    """CodeBLEU against reference code: n-grams, weighted keywords, syntax trees and data flow."""
    from aligntune.textmetrics import codebleu as score

    codes = [extract_code(completion_text(completion)) for completion in completions]
    return [score([code], [wanted], language).codebleu for code, wanted in zip(codes, reference, strict=True)]
