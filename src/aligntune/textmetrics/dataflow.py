"""Where does each variable's value come from? The data-flow graph that CodeBLEU compares.

Guo et al. 2021 (GraphCodeBERT, arXiv 2009.08366, section 3) define the graph: the occurrences of variables are its
nodes, and an edge says that the value of one comes from, or is computed from, others. Extraction is by node types
(`code_trees.LANGUAGES`), in one pass with loop bodies read twice, so that a value can flow round the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from aligntune.textmetrics.code_trees import Language, Node, is_leaf, language, parse, text, tokens

COMES_FROM, COMPUTED_FROM = "comesFrom", "computedFrom"
States = dict[str, list[int]]
"""Variable -> positions of the tokens that may have set it last."""


class Flow(NamedTuple):
    """The value of `name` at token `position` has `relation` to `sources`, which stand at `origins`."""

    name: str
    position: int
    relation: str
    sources: list[str]
    origins: list[int]


Edge = tuple[str, str, tuple[str, ...]]
"""A flow without positions, its variables renamed in order of appearance."""


def data_flow(code: str, name: str) -> list[Edge]:
    """The renamed flows of `code`, in order of position. Code nested beyond Python's recursion limit has none."""
    root = parse(code, name)
    places = {(node.start_byte, node.end_byte): at for at, node in enumerate(tokens(root))}
    try:
        flows = _Reader(language(name), places).read(root, {})
    except RecursionError:
        return []
    return _rename(_merge(flows))


def _merge(flows: list[Flow]) -> list[Flow]:
    """One flow per position, and only those that have a source or are one."""
    used = {origin for flow in flows for origin in flow.origins} | {flow.position for flow in flows if flow.sources}
    merged: dict[int, Flow] = {}
    for flow in sorted(flows, key=lambda flow: flow.position):
        if flow.position not in used:
            continue
        seen = merged.get(flow.position)
        if seen is None:
            merged[flow.position] = flow
        else:
            sources = list(dict.fromkeys(seen.sources + flow.sources))
            merged[flow.position] = seen._replace(sources=sources)
    return list(merged.values())


def _rename(flows: list[Flow]) -> list[Edge]:
    names: dict[str, str] = {}
    edges = []
    for flow in flows:
        for name in [*flow.sources, flow.name]:
            names.setdefault(name, f"var_{len(names)}")
        edges.append((names[flow.name], flow.relation, tuple(names[source] for source in flow.sources)))
    return edges


@dataclass
class _Reader:
    """Walks a tree in execution order, carrying for each variable where it was last set."""

    table: Language
    places: dict[tuple[int, int], int]
    second_pass: bool = False

    def read(self, node: Node, states: States) -> list[Flow]:
        """The flows of `node`; `states` is brought up to date in place."""
        kind, table = node.type, self.table
        if is_leaf(node):
            return self._leaf(node, states)
        if kind in table.declarations:
            return self._declaration(node, *table.declarations[kind], states)
        if kind in table.assignments:
            return self._assignment(node.child_by_field_name("left"), node.child_by_field_name("right"), states)
        if kind == "for_in_clause":
            return self._assignment(node.child_by_field_name("left"), node.children[-1], states, unpack=False)
        if kind in table.updates:
            return self._bind(self._variables(node), self._variables(node), COMPUTED_FROM, states)
        if kind == "if_statement":
            return self._branches(node, states)
        if kind in table.loops:
            once = node.child_by_field_name(table.loops[kind]) if table.loops[kind] else None
            flows = self.read(once, states) if once is not None else []
            rest = [child for child in node.children if once is None or child.id != once.id]
            return flows + self._twice(lambda: self._sequence(rest, states))
        if kind in table.iterations:
            return self._iteration(node, *table.iterations[kind], states)
        first = [child for child in node.children if child.type == "for_in_clause"]
        rest = [child for child in node.children if child.type != "for_in_clause"]
        return self._sequence(first + rest, states)

    def _sequence(self, nodes: list[Node], states: States) -> list[Flow]:
        return [flow for node in nodes for flow in self.read(node, states)]

    def _leaf(self, node: Node, states: States) -> list[Flow]:
        name, position = self._token(node)
        if position is None or name == node.type:
            return []
        if name in states:
            return [Flow(name, position, COMES_FROM, [name], list(states[name]))]
        if node.type == "identifier":
            states[name] = [position]
        return [Flow(name, position, COMES_FROM, [], [])]

    def _declaration(self, node: Node, name_field: str, value_field: str, states: States) -> list[Flow]:
        names = self._variables(node.child_by_field_name(name_field))
        value = node.child_by_field_name(value_field)
        if value is None:
            return self._bind(names, [], COMES_FROM, states)
        flows = self.read(value, states)
        return flows + self._bind(names, self._variables(value), COMES_FROM, states)

    def _assignment(
        self, left: Node | None, right: Node | None, states: States, unpack: bool | None = None
    ) -> list[Flow]:
        if left is None or right is None:
            return []
        pairs = [(left, right)]
        if self.table.unpacks if unpack is None else unpack:
            lefts, rights = _elements(left), _elements(right)
            if len(lefts) == len(rights):
                pairs = list(zip(lefts, rights, strict=True))
        flows = self._sequence([source for _, source in pairs], states)
        for target, source in pairs:
            flows += self._bind(self._variables(target), self._variables(source), COMPUTED_FROM, states)
        return flows

    def _iteration(self, node: Node, left_field: str, right_field: str, states: States) -> list[Flow]:
        left, right = node.child_by_field_name(left_field), node.child_by_field_name(right_field)
        body = node.child_by_field_name("body")

        def once() -> list[Flow]:
            flows = self._assignment(left, right, states)
            return flows + (self.read(body, states) if body is not None else [])

        flows = self._twice(once)
        otherwise = node.child_by_field_name("alternative")
        return flows + (self.read(otherwise, states) if otherwise is not None else [])

    def _branches(self, node: Node, states: States) -> list[Flow]:
        """Each alternative starts from the state before the `if`; afterwards any of them may have happened."""
        before = _copy(states)
        flows: list[Flow] = []
        ends: list[States] = []
        has_else = False
        for child in node.children:
            has_else = has_else or "else" in child.type
            if has_else or child.type == "elif_clause":
                branch = _copy(before)
                flows += self.read(child, branch)
                ends.append(branch)
            else:
                flows += self.read(child, states)
        if not has_else:
            ends.append(before)
        for end in ends:
            for name, positions in end.items():
                states[name] = sorted({*states.get(name, ()), *positions})
        return flows

    def _twice(self, once: Callable[[], list[Flow]]) -> list[Flow]:
        """Two passes of the outermost loop, one of loops inside its second pass: linear cost for nested loops."""
        flows = once()
        if not self.second_pass:
            self.second_pass = True
            flows += once()
            self.second_pass = False
        return flows

    def _bind(
        self, targets: list[tuple[str, int]], sources: list[tuple[str, int]], relation: str, states: States
    ) -> list[Flow]:
        names, origins = [name for name, _ in sources], [position for _, position in sources]
        for name, position in targets:
            states[name] = [position]
        return [Flow(name, position, relation, names, origins) for name, position in targets]

    def _variables(self, node: Node | None) -> list[tuple[str, int]]:
        """(text, position) of the tokens of `node` that are neither keywords nor marks."""
        if node is None:
            return []
        found = [(leaf.type, *self._token(leaf)) for leaf in tokens(node)]
        return [(name, position) for kind, name, position in found if position is not None and name != kind]

    def _token(self, node: Node) -> tuple[str, int | None]:
        return text(node), self.places.get((node.start_byte, node.end_byte))


def _elements(node: Node) -> list[Node]:
    return [child for child in node.children if child.type != ","] or [node]


def _copy(states: States) -> States:
    return {name: list(positions) for name, positions in states.items()}
