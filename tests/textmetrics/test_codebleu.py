"""CodeBLEU: the worked example of the reference implementation, data flow by hand, and hostile code."""

from __future__ import annotations

import time

import pytest

from aligntune.errors import ConfigError, MissingExtra
from aligntune.textmetrics import codebleu, extract_code

pytest.importorskip("tree_sitter_python")
from aligntune.textmetrics.dataflow import data_flow

SUM = "def sum ( first , second ) :\n return second + first"
ADD = "def add ( a , b ) :\n return a + b"


def test_worked_example_of_the_reference_implementation():
    # README of the codebleu package: 0.5537, 0.1041, 0.1109, 1.0, 1.0.
    score = codebleu([ADD], [SUM])
    assert score.codebleu == pytest.approx(0.5537842627792564, abs=1e-12)
    assert score.ngram_match == pytest.approx(0.10419044640136393, abs=1e-12)
    assert score.weighted_ngram_match == pytest.approx(0.11094660471566163, abs=1e-12)
    assert (score.syntax_match, score.dataflow_match) == (1.0, 1.0)


def test_ngram_matches_by_hand():
    # Tokens: prediction "x = y" (3), reference "if x : y" (4). One-grams: 2/3; none of the 2-, 3-grams (2, 1) and no
    # 4-gram (counted as 1) match, each smoothed to 0.1. Brevity: exp(1 - 4/3).
    score = codebleu(["x = y"], ["if x : y"], tokenize=str.split)
    assert score.ngram_match == pytest.approx(2.718281828459045 ** (-1 / 3) * (2 / 3 * 0.05 * 0.1 * 0.1) ** 0.25)
    # Recall: "x" and "y" of weight 0.2 out of 1 ("if") + 3 * 0.2; then 0.1 of 3, 2 and 1. No brevity penalty.
    assert score.weighted_ngram_match == pytest.approx((0.4 / 1.6 * 0.1 / 3 * 0.1 / 2 * 0.1) ** 0.25)


def test_syntax_match_by_hand():
    # Subtrees of "x = f(1)": module, expression_statement, assignment, call, argument_list (names do not matter).
    # Of "f(1)" the prediction's module and statement differ: call and argument_list are found.
    assert codebleu(["g(2)"], ["x = f(1)"]).syntax_match == pytest.approx(2 / 5)


def test_data_flow_by_hand():
    # b is computed from a; a (second mention) comes from the parameter; c is computed from b, which comes from b.
    edges = data_flow("def f(a):\n    b = a\n    c = b\n", "python")
    assert edges == [
        ("var_0", "comesFrom", ()),  # a, where it is defined
        ("var_1", "computedFrom", ("var_0",)),  # b from a
        ("var_0", "comesFrom", ("var_0",)),
        ("var_2", "computedFrom", ("var_1",)),  # c from b
        ("var_1", "comesFrom", ("var_1",)),
    ]


def test_data_flow_does_not_see_names_but_sees_sources():
    code = "def f(a, b):\n    c = a + b\n    return c * a"
    renamed = "def g(x, y):\n    z = x + y\n    return z * x"
    swapped = "def g(x, y):\n    z = x + y\n    return z * y"
    assert codebleu([renamed], [code]).dataflow_match == 1.0
    assert codebleu([swapped], [code]).dataflow_match < 1.0
    assert codebleu([swapped], [code]).syntax_match == 1.0


def test_tuples_are_assigned_pairwise():
    pairwise = data_flow("a, b = c, d", "python")
    assert ("var_1", "computedFrom", ("var_0",)) in pairwise
    whole = data_flow("a, b = c", "python")
    assert [edge for edge in whole if edge[1] == "computedFrom"] == [
        ("var_1", "computedFrom", ("var_0",)),
        ("var_2", "computedFrom", ("var_0",)),
    ]


def test_a_branch_may_or_may_not_have_run():
    without_else = data_flow("x = 1\nif c:\n    x = 2\nprint(x)", "python")
    with_else = data_flow("x = 1\nif c:\n    x = 2\nelse:\n    x = 3\nprint(x)", "python")
    assert without_else != with_else
    assert without_else[-1] == with_else[-1] == (without_else[-1][0], "comesFrom", (without_else[-1][0],))


def test_values_flow_round_a_loop():
    # In the second pass `total` at its use comes from the assignment below it, in every language.
    loops = {
        "python": "t = 0\nfor i in x:\n    u = t\n    t = i",
        "java": "void f() { int t = 0; while (c) { u = t; t = i; } }",
        "javascript": "let t = 0; while (c) { u = t; t = i; }",
        "c": "void f() { int t = 0; while (c) { u = t; t = i; } }",
        "cpp": "void f() { int t = 0; for (int i : x) { u = t; t = i; } }",
        "go": "func f() { t := 0; for i := range x { u = t; t = i } }",
    }
    for name, code in loops.items():
        pytest.importorskip(f"tree_sitter_{name}")
        straight = code.replace("u = t; t = i", "t = i; u = t").replace("u = t\n    t = i", "t = i\n    u = t")
        assert codebleu([code], [code], name).codebleu == 1.0
        assert data_flow(code, name) != data_flow(straight, name), name


def test_java_example_of_the_reference_implementation():
    # codebleu 0.7.0 on the same grammar: 0.7846, 0.7775, 11/19, 2/3 with its blank-separated tokens.
    pytest.importorskip("tree_sitter_java")
    reference = "public static int Sign ( double d ) { return ( int ) ( ( d == 0 ) ? 0 : ( d < 0 ) ? - 1 : 1) ; }"
    prediction = "public static int Sign ( double d ) { return ( float ) ( ( d == 0 ) ? 0 : ( c < 0.0 ) ? - 1 : 1) ; }"
    score = codebleu([prediction], [reference], "java", tokenize=str.split)
    assert score.ngram_match == pytest.approx(0.7846263092599286, abs=1e-12)
    assert score.weighted_ngram_match == pytest.approx(0.7775489115787709, abs=1e-12)
    assert score.syntax_match == pytest.approx(11 / 19)
    assert score.dataflow_match == pytest.approx(2 / 3)


def test_layout_comments_and_docstrings_do_not_count():
    commented = 'def add(a,b):\n    """Adds."""\n    # sum\n    return a+b  # done'
    assert codebleu([commented], [ADD]).codebleu == 1.0


def test_references_without_data_flow_leave_three_parts():
    score = codebleu(["print(1)"], ["print(2)"], weights=(0.2, 0.2, 0.2, 0.4))
    assert score.dataflow_match is None
    assert score.codebleu == pytest.approx((score.ngram_match + score.weighted_ngram_match + score.syntax_match) / 3)
    assert "dataflow_match" not in score.as_dict()


def test_nothing_in_common_scores_nothing():
    score = codebleu(["I cannot do that."], [ADD])
    assert (score.codebleu, score.dataflow_match) == (0.0, 0.0)
    assert codebleu([""], [ADD]).codebleu == 0.0


def test_rows_are_pooled_and_may_differ_in_language():
    pytest.importorskip("tree_sitter_java")
    java = "int f(int a) { return a; }"
    assert codebleu([ADD, java], [SUM, java], ["python", "java"]).syntax_match == 1.0
    assert codebleu([ADD, "x"], [ADD, ADD]).codebleu < 1.0


def test_hostile_code_costs_little():
    deep = "(" * 3000 + "1" + ")" * 3000
    nested = (
        "def f(n):\n" + "".join("  " * (at + 1) + f"for v{at} in range(n):\n" for at in range(60)) + "  " * 61 + "pass"
    )
    start = time.perf_counter()
    assert codebleu([deep], [ADD]).codebleu < 0.1
    assert codebleu([nested], [nested]).codebleu == 1.0
    assert time.perf_counter() - start < 10  # the reference implementation doubles its time with every loop


def test_code_is_cut_out_of_an_answer():
    answer = "Here it is:\n```python\ndef f():\n    pass\n```\nand\n```\nf()\n```\nBye."
    assert extract_code(answer) == "def f():\n    pass\nf()"
    assert extract_code("```python\nx = 1") == "x = 1"  # cut off before the closing fence
    assert extract_code("x = 1") == "x = 1"


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r"does not know the language 'cobol'.*python"):
        codebleu(["x"], ["x"], "cobol")
    with pytest.raises(ConfigError, match="sum to 1"):
        codebleu(["x"], ["x"], weights=(1, 1, 1, 1))
    with pytest.raises(ConfigError, match="2 languages for 1 rows"):
        codebleu(["x"], ["x"], ["python", "java"])


@pytest.mark.parametrize(("name", "command"), [("python", r"aligntune\[eval\]"), ("go", "pip install tree-sitter-go")])
def test_a_missing_grammar_says_what_to_install(name: str, command: str, monkeypatch: pytest.MonkeyPatch):
    import sys

    from aligntune.textmetrics import code_trees

    code_trees._parser.cache_clear()
    monkeypatch.setitem(sys.modules, f"tree_sitter_{name}", None)
    with pytest.raises(MissingExtra, match=command):
        codebleu(["x"], ["x"], name)
