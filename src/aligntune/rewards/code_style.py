"""How is the code written? Read off the syntax tree: nothing is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

from .base import adversarial, bad, good, reward
from .code import extract_code, is_filler, parse

CLEAN = '''
def mean(values):
    """Arithmetic mean of the values."""
    return sum(values) / len(values)
'''
MESSY = """
from math import *
def Mean(Values=[]):
    try:
        return eval("sum(Values)") / len(Values)
    except:
        return None
"""

Definition = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(tree: ast.Module) -> list[Definition]:
    return [node for node in ast.walk(tree) if isinstance(node, Definition)]


def _long_lines(tree: ast.Module, code: str) -> bool:
    return any(len(line) > 100 for line in code.splitlines())


def _bad_names(tree: ast.Module, code: str) -> bool:
    names = [(node.name, r"_*[a-z][a-z0-9_]*_*$") for node in _functions(tree)]
    names += [(node.name, r"_?[A-Z][A-Za-z0-9]*$") for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return any(not re.match(pattern, name) for name, pattern in names)


def _bare_except(tree: ast.Module, code: str) -> bool:
    return any(isinstance(node, ast.ExceptHandler) and node.type is None for node in ast.walk(tree))


def _mutable_default(tree: ast.Module, code: str) -> bool:
    literal = (ast.List, ast.Dict, ast.Set)
    defaults = [part for node in _functions(tree) for part in (*node.args.defaults, *node.args.kw_defaults)]
    return any(isinstance(part, literal) for part in defaults)


def _star_import(tree: ast.Module, code: str) -> bool:
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(part.name == "*" for node in imports for part in node.names)


def _eval_or_exec(tree: ast.Module, code: str) -> bool:
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(isinstance(name, ast.Name) and name.id in ("eval", "exec") for name in calls)


def _long_function(tree: ast.Module, code: str) -> bool:
    return any((node.end_lineno or node.lineno) - node.lineno >= 60 for node in _functions(tree))


FAULTS: dict[str, Callable[[ast.Module, str], bool]] = {
    "a line over 100 characters": _long_lines,
    "a name against PEP 8": _bad_names,
    "a bare except": _bare_except,
    "a mutable default argument": _mutable_default,
    "a star import": _star_import,
    "eval or exec": _eval_or_exec,
    "a function of 60 lines or more": _long_function,
}


@reward(
    "code_style",
    range=(0, 1),
    source="PEP 8 and common lint rules",
    heuristic=True,
    aliases=["code_quality"],
    examples=[
        good(CLEAN),
        bad(MESSY, 2 / 7),
        adversarial("pass", 0.0, note="no code, no style"),
    ],
)
def code_style(completion: str) -> float:
    """Share of seven faults that the code does not have; 0 when it does not parse or does nothing.

    They are: long lines, names against PEP 8, bare except, mutable defaults, star imports, eval or exec, functions of
    60 lines or more.
    """
    code = extract_code(completion)
    tree = parse(code)
    if tree is None or all(is_filler(node) for node in tree.body):
        return 0.0
    return sum(not fault(tree, code) for fault in FAULTS.values()) / len(FAULTS)


_PLACEHOLDER = re.compile(
    r"\b(TODO|FIXME|XXX)\b|your code here|implement (?:this|me)|rest of (?:the )?code", re.IGNORECASE
)


def _is_stub(node: Definition) -> bool:
    body = [part for part in node.body if not is_filler(part)]
    raises = [part for part in body if isinstance(part, ast.Raise) and "NotImplementedError" in ast.dump(part)]
    return len(body) == len(raises)


@reward(
    "code_completeness",
    range=(0, 1),
    heuristic=True,
    examples=[
        good(CLEAN),
        bad("def mean(values):\n    pass\n"),
        adversarial('def mean(values):\n    """Return the mean, computed by summing and dividing."""\n', 0.0, note="promised in the docstring only"),
        adversarial("def mean(values):\n    # TODO: handle the empty list\n    return sum(values)\n", 0.0, note="a mark left behind"),
    ],
)  # fmt: skip
def code_completeness(completion: str) -> float:
    """Share of the functions that have a body; 0 with a TODO or "your code here" anywhere, or without any code."""
    code = extract_code(completion)
    tree = parse(code)
    if tree is None or _PLACEHOLDER.search(code):
        return 0.0
    functions = _functions(tree)
    if not functions:
        return float(any(not is_filler(node) for node in tree.body))
    return sum(not _is_stub(node) for node in functions) / len(functions)


@reward(
    "code_documentation",
    range=(0, 1),
    heuristic=True,
    examples=[
        good(CLEAN),
        bad("def mean(values):\n    return sum(values) / len(values)\n"),
        adversarial('def mean(values):\n    """."""\n    return 0\n', 0.0, note="a docstring without words"),
    ],
)
def code_documentation(completion: str) -> float | None:
    """Share of functions and classes with a docstring of at least two words; None when the code has neither."""
    tree = parse(extract_code(completion))
    if tree is None:
        return 0.0
    defined = [node for node in ast.walk(tree) if isinstance(node, Definition | ast.ClassDef)]
    if not defined:
        return None
    return sum(len((ast.get_docstring(node) or "").split()) >= 2 for node in defined) / len(defined)
