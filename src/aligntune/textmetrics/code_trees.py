"""What does the parser see in a piece of code? Tokens and subtrees, by tree-sitter.

Comments and Python docstrings are cut out before parsing: they are prose, not program.
"""

from __future__ import annotations

import importlib
import keyword
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from aligntune.errors import ConfigError, MissingExtra, require

Node = Any
"""A `tree_sitter.Node`."""

_JAVA = (
    "abstract assert boolean break byte case catch char class const continue default do double else enum extends "
    "final finally float for goto if implements import instanceof int interface long native new package private "
    "protected public return short static strictfp super switch synchronized this throw throws transient try void "
    "volatile while"
)
_JAVASCRIPT = (
    "async await break case catch class const continue debugger default delete do else export extends false "
    "finally for function if import in instanceof let new null of return static super switch this throw true try "
    "typeof undefined var void while with yield"
)
_C = (
    "auto break case char const continue default do double else enum extern float for goto if inline int long "
    "register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while"
)
_CPP = (
    "alignas alignof and asm bool catch class co_await co_return co_yield concept const_cast consteval constexpr "
    "constinit decltype delete dynamic_cast explicit export false friend mutable namespace new noexcept not "
    "nullptr operator or override private protected public reinterpret_cast requires static_assert static_cast "
    "template this thread_local throw true try typeid typename using virtual wchar_t xor"
)
_GO = (
    "break case chan const continue default defer else fallthrough for func go goto if import interface map "
    "package range return select struct switch type var"
)


@dataclass(frozen=True)
class Language:
    """Names of a tree-sitter grammar that CodeBLEU needs. Field names are those of the grammar."""

    package: str
    keywords: frozenset[str]
    assignments: frozenset[str]
    """Nodes whose `left` takes the value of `right` (operands of an augmented assignment are not followed)."""
    declarations: dict[str, tuple[str, str]]
    """Node -> (field of the name, field of its first value)."""
    updates: frozenset[str] = frozenset()
    """Increments: the variable is computed from itself."""
    loops: dict[str, str | None] = field(default_factory=dict)
    """Node -> the field that runs only once, before the loop."""
    iterations: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Node that binds each element of a collection -> (field of the variable, field of the collection)."""
    unpacks: bool = False
    """Whether `a, b = c, d` assigns pairwise."""


LANGUAGES: dict[str, Language] = {
    "python": Language(
        package="tree_sitter_python",
        keywords=frozenset([*keyword.kwlist, "match", "case", "type"]),
        assignments=frozenset(["assignment", "augmented_assignment"]),
        declarations={"default_parameter": ("name", "value")},
        loops={"while_statement": None},
        iterations={"for_statement": ("left", "right")},
        unpacks=True,
    ),
    "java": Language(
        package="tree_sitter_java",
        keywords=frozenset(_JAVA.split()),
        assignments=frozenset(["assignment_expression"]),
        declarations={"variable_declarator": ("name", "value")},
        updates=frozenset(["update_expression"]),
        loops={"for_statement": "init", "while_statement": None, "do_statement": None},
        iterations={"enhanced_for_statement": ("name", "value")},
    ),
    "javascript": Language(
        package="tree_sitter_javascript",
        keywords=frozenset(_JAVASCRIPT.split()),
        assignments=frozenset(["assignment_expression", "augmented_assignment_expression", "assignment_pattern"]),
        declarations={"variable_declarator": ("name", "value")},
        updates=frozenset(["update_expression"]),
        loops={"for_statement": "initializer", "while_statement": None, "do_statement": None},
        iterations={"for_in_statement": ("left", "right")},
    ),
    "c": Language(
        package="tree_sitter_c",
        keywords=frozenset(_C.split()),
        assignments=frozenset(["assignment_expression"]),
        declarations={"init_declarator": ("declarator", "value")},
        updates=frozenset(["update_expression"]),
        loops={"for_statement": "initializer", "while_statement": None, "do_statement": None},
    ),
    "cpp": Language(
        package="tree_sitter_cpp",
        keywords=frozenset([*_C.split(), *_CPP.split()]),
        assignments=frozenset(["assignment_expression"]),
        declarations={
            "init_declarator": ("declarator", "value"),
            "optional_parameter_declaration": ("declarator", "default_value"),
        },
        updates=frozenset(["update_expression"]),
        loops={"for_statement": "initializer", "while_statement": None, "do_statement": None},
        iterations={"for_range_loop": ("declarator", "right")},
    ),
    "go": Language(
        package="tree_sitter_go",
        keywords=frozenset(_GO.split()),
        assignments=frozenset(["assignment_statement", "short_var_declaration", "range_clause"]),
        declarations={"var_spec": ("name", "value"), "const_spec": ("name", "value")},
        updates=frozenset(["inc_statement", "dec_statement"]),
        loops={"for_statement": None},
        unpacks=True,
    ),
}
STRINGS = frozenset(["string", "string_literal", "character_literal", "char_literal", "interpreted_string_literal"])
"""Nodes with inner structure that count as one token."""
_COMMENTS = frozenset(["comment", "line_comment", "block_comment"])


def language(name: str) -> Language:
    """The table of language `name`; an unknown name is a `ConfigError` that lists the known ones."""
    if name not in LANGUAGES:
        raise ConfigError(f"CodeBLEU does not know the language {name!r}; it knows {', '.join(sorted(LANGUAGES))}")
    return LANGUAGES[name]


@cache
def _parser(name: str) -> Any:
    table = language(name)
    tree_sitter = require("tree_sitter", extra="eval", why="CodeBLEU")
    try:
        grammar = importlib.import_module(table.package)
    except ImportError as error:
        package = table.package.replace("_", "-")
        command = "'aligntune[eval]'" if name == "python" else package
        raise MissingExtra(f"CodeBLEU of {name} code needs the package {package}: pip install {command}") from error
    return tree_sitter.Parser(tree_sitter.Language(grammar.language()))


def parse(code: str, name: str) -> Node:
    """Root node of `code` without comments and docstrings. Code with errors still has a tree."""
    source = code.strip().encode("utf-8", errors="replace")
    root = _parser(name).parse(source).root_node
    spans = [(node.start_byte, node.end_byte) for node in _walk(root) if _is_prose(node, name)]
    if not spans:
        return root
    kept, at = [], 0
    for start, end in spans:
        kept.append(source[at:start])
        at = end
    kept.append(source[at:])
    return _parser(name).parse(b"".join(kept)).root_node


def tokens(root: Node) -> list[Node]:
    """The leaves in order, strings whole, without the zero-width tokens of error recovery."""
    return [node for node in _walk(root, into_strings=False) if is_leaf(node) and node.end_byte > node.start_byte]


def is_leaf(node: Node) -> bool:
    return not node.children or node.type in STRINGS


def text(node: Node) -> str:
    return node.text.decode("utf-8", errors="replace")


def subtrees(root: Node, numbers: dict[tuple[Any, ...], int]) -> list[int]:
    """One number per node with children (and the root), equal for equal shapes; identifiers' names do not count.

    `numbers` maps a shape (type, ((field, shape of named child), ...)) to its number and is shared by the trees that
    are compared. Building shapes from numbers keeps the cost linear where S-expressions are quadratic in depth.
    """
    shapes: dict[int, int] = {}
    found = []
    for node in reversed(list(_walk(root))):  # children before parents
        children = tuple(
            (node.field_name_for_child(at), shapes[child.id])
            for at, child in enumerate(node.children)
            if child.is_named or child.is_missing
        )
        shape = (node.type, node.is_missing, children)
        shapes[node.id] = numbers.setdefault(shape, len(numbers))
        if node.children or node.id == root.id:
            found.append(shapes[node.id])
    return found


def _walk(root: Node, into_strings: bool = True) -> list[Node]:
    """All nodes, parents before children, in source order; without recursion, as generated code may nest deeply."""
    order, stack = [], [root]
    while stack:
        node = stack.pop()
        order.append(node)
        if into_strings or node.type not in STRINGS:
            stack.extend(reversed(node.children))
    return order


def _is_prose(node: Node, name: str) -> bool:
    if node.type in _COMMENTS:
        return True
    return name == "python" and node.type == "expression_statement" and [c.type for c in node.children] == ["string"]
