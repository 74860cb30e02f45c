"""Verifiable rewards beyond their examples: code problems as in HumanEval and MBPP, mathematics, SQL, matching."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligntune.errors import ConfigError, RewardError
from aligntune.rewards import Batch, RewardSet, answers, get
from aligntune.rewards.call import Caller
from aligntune.rewards.code import extract_code, program
from aligntune.rewards.matching import chosen_letter, levenshtein
from aligntune.rewards.math import evaluate
from aligntune.rewards.sql import extract_sql
from aligntune.rewards.tools import calls_of


def score(name: str, *completions: Any, params: Any = None, prompt: str = "", **columns: Any) -> list[Any]:
    lists = {key: [value] * len(completions) for key, value in columns.items()}
    return Caller(get(name), params)(Batch([prompt] * len(completions), completions, lists))[0]


# --- code --------------------------------------------------------------------------------------------------------

PROBLEMS = [
    {
        "prompt": 'from typing import List\n\n\ndef largest(xs: List[int]) -> int:\n    """The largest of xs."""\n',
        "canonical": "    return max(xs)\n",
        "test": "def check(candidate):\n    assert candidate([1, 3, 2]) == 3\n    assert candidate([-5]) == -5\n",
        "entry_point": "largest",
    },
    {
        "prompt": "def fib(n):\n    # the n-th Fibonacci number\n",
        "canonical": "    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
        "test": "def check(candidate):\n    assert [candidate(i) for i in range(6)] == [0, 1, 1, 2, 3, 5]\n",
        "entry_point": "fib",
    },
    {
        "prompt": "import math\n\n\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n\ndef root(xs):\n    '''A zero of poly(xs, x).'''\n",
        "canonical": "    return -xs[0] / xs[1]\n",
        "test": "def check(candidate):\n    assert abs(poly([2, 4], candidate([2, 4]))) < 1e-6\n",
        "entry_point": "root",
    },
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem["entry_point"])
def test_canonical_bodies_pass_in_every_form_and_wrong_ones_fail(problem: dict[str, str]) -> None:
    prompt, body = problem["prompt"], problem["canonical"]
    forms = [
        body,  # a continuation, as base models write
        body + "\n\nprint('done')\n# More text follows.\nThis is prose.",
        f"Here you are:\n```python\n{prompt}{body}```\nDone.",
        f"<think>```python\nwrong\n```</think>```python\n{prompt}{body}```",
        "    return None\n",
        "    raise SystemExit(0)\n",
        "no code at all",
        f"```python\n{prompt}    return 0.25\n```",
    ]
    scores = score("code_execution", *forms, prompt=prompt, tests=problem["test"], entry_point=problem["entry_point"])
    assert scores == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_imports_of_the_prompt_reach_an_answer_that_leaves_them_out() -> None:
    prompt = PROBLEMS[0]["prompt"]
    answer = "```python\ndef largest(xs: List[int]) -> int:\n    return sorted(xs)[-1]\n```"
    assert score("code_execution", answer, prompt=prompt, tests=PROBLEMS[0]["test"], entry_point="largest") == [1.0]


def test_mbpp_tests_partial_setup_and_in_place() -> None:
    code = "```python\ndef area(r):\n    return PI * r * r\nPI = 3.0\n```"
    tests = ["assert area(1) == 3.0", "assert abs(area(1) - pi) < 0.01"]
    params = {"partial": True}
    assert score("code_execution", code, params=params, test_list=tests, setup="from math import pi") == [0.5]
    assert score("code_execution", code, test_list=tests, setup="from math import pi") == [0.0]
    sort = "def sort(xs):\n    xs.sort()"
    test = ["xs = [2, 1]\nsort(xs)\nassert xs == [1, 2]"]
    assert score("code_execution", sort, tests=test) == [0.0]
    assert score("code_execution", sort, params={"in_place": True}, tests=test) == [1.0]


def test_plain_source_is_split_at_its_asserts() -> None:
    tests = "x = 2\nassert f(x) == 4\nassert f(x) == 5\ny = f(3)\nassert y == 9"
    assert score("code_execution", "def f(x): return x * x", params={"partial": True}, tests=tests) == [
        pytest.approx(2 / 3)
    ]


def test_invalid_tests_are_the_datasets_fault() -> None:
    with pytest.raises(
        RewardError, match=r"tests of this sample do not run: .*SyntaxError(.|\n)*Correct or drop the row"
    ):
        score("code_execution", "def f(): return 1", tests=["assert f( == 1"])
    with pytest.raises(RewardError, match="not int"):
        score("code_execution", "x", tests=5)


def test_a_hanging_program_ends_in_time() -> None:
    began = time.monotonic()
    assert score("code_runs", "while True: pass", "print(1)", params={"timeout_s": 0.5}) == [0.0, 1.0]
    assert time.monotonic() - began < 5


def test_the_isolation_of_code_is_stated() -> None:
    stated = RewardSet(["code_runs", "length", {"type": "code_runs", "params": {"isolation": "minimal"}}]).isolation()
    assert list(stated) == ["code_runs", "code_runs_2"]
    assert stated["code_runs"].startswith("isolation standard: ")
    assert "held: network, writes, processes" in stated["code_runs"]
    with pytest.raises(ConfigError, match="isolation='total'"):
        RewardSet([{"type": "code_runs", "params": {"isolation": "total"}}]).isolation()


def test_more_isolation_than_there_is_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of strict, standard, minimal"):
        score("code_runs", "print(1)", params={"isolation": "total"})


def test_code_is_found_in_answers() -> None:
    assert extract_code("a\n```python\nx = 1\n```\nb\n```py\ny = 2\n```") == "y = 2\n"
    assert extract_code("```\nz = 3") == "z = 3", "a block that is cut off"
    assert extract_code("```json\n{}\n```\n```python\nx\n```\n```bash\nls\n```") == "x\n"
    assert extract_code("```python\nx = 1\n```\nOutput:\n```\n1\n```") == "x = 1\n", "what it prints is no code"
    assert extract_code("1. First:\n   ```python\n   def f():\n       return 1\n   ```") == "def f():\n    return 1\n"
    assert extract_sql("<think>hm</think>\n```sql\nSELECT 1\n```\ngives\n```\n1\n```") == "SELECT 1"
    assert extract_sql("<think>hm</think>\nSELECT 1") == "SELECT 1"
    assert program("Write f.", "```python\ndef f(): pass\n```", "f") == "def f(): pass\n"


# --- mathematics ---------------------------------------------------------------------------------------------------

EQUAL = [
    ("\\boxed{72}", "#### 72"), ("The answer is 1,234.", "1234"), ("\\boxed{0.5}", "\\frac{1}{2}"), ("#### $18", "18"),
    ("\\boxed{\\frac{3}{4}}", "0.75"), ("<answer>-3</answer>", "-3"), ("so \\boxed{x^2+2x+1}", "$(x+1)^2$"),
    ("\\boxed{\\sqrt{8}}", "$2\\sqrt{2}$"), ("\\boxed{50\\%}", "50%"), ("\\boxed{(1,2)}", "$(1, 2)$"), ("Final answer: yes", "yes"),
    ("\\boxed{\\text{Yes}}", "yes"), ("\\boxed{Evelyn}", "\\text{Evelyn}"), ("The answer is (C).", "C"), ("The answer is `42`", "42"),
    ("The answer is 2 1/2", "2.5"), ("\\boxed{2\\frac{1}{2}}", "5/2"), ("The answer is -$5", "-5"), ("\\boxed{90°}", "90"),
    ("#### 72 clips", "#### 72"), ("<answer>42 dollars</answer>", "42"), ("\\boxed{2, 1}", "1,2"), ("1{,}234", "1234"),
    ("<think>\\boxed{3}</think> The answer is 4", "4"), ("\\boxed{3.50 \\text{ dollars}}", "\\$3.50"),
]  # fmt: skip
UNEQUAL = [
    ("\\boxed{73}", "72"),
    ("\\boxed{71}", "72"), ("72 or 73", "72"), ("", "72"), ("\\boxed{x^2}", "$(x+1)^2$"), ("\\boxed{(2,1)}", "$(1, 2)$"),
    ("Final answer: no", "yes"), ("\\boxed{72", "73"), ("The answer is 1.234", "1234"), ("__import__('os').system('true')", "0"),
    ("\\boxed{1,2}", "12"), ("\\boxed{1 2}", "12"), ("The answer is 12,34", "1234"), ("The answer is 2 1/2", "21/2"), ("$$", ""),
    ("<think>\\boxed{4}</think> The answer is 3", "4"), ("<think>\\boxed{4}</think>", "4"), ("\\boxed{\\text{No}}", "yes"),
]  # fmt: skip


def test_math_correctness() -> None:
    pytest.importorskip("math_verify")
    found = Caller(get("math_correctness"))(
        Batch([""] * len(EQUAL + UNEQUAL), [c for c, _ in EQUAL + UNEQUAL], {"answer": [a for _, a in EQUAL + UNEQUAL]})
    )[0]
    assert found == [1.0] * len(EQUAL) + [0.0] * len(UNEQUAL)


def test_math_correctness_works_in_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    pytest.importorskip("math_verify")
    with ThreadPoolExecutor(4) as pool:
        assert (
            list(pool.map(lambda n: score("math_correctness", f"\\boxed{{x+{n}}}", answer=f"${n}+x$"), range(8)))
            == [[1.0]] * 8
        )


@given(st.fractions(-(10**6), 10**6, max_denominator=10**4))
def test_numbers_are_read_as_written(value: Any) -> None:
    assert answers.parse_number(str(value)) == value
    assert answers.numbers(f"It is {value}.")[-1] == value or value < 0


@given(st.decimals(-(10**9), 10**9, places=3))
def test_decimals_with_thousands(value: Any) -> None:
    assert answers.parse_number(f"{value:,}") == value
    assert answers.numbers(f"costs {value:,} dollars") == [value]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2,3", [1, 2, 3]), ("1,234,56", [1234, 56]), ("2 1/2 cups", [Fraction(5, 2)]), ("\\frac{1}{2}", [Fraction(1, 2)]),
        ("5 m^2 and 6 m^{2}", [5, 6]), ("1{,}234", [1234]), ("-$5", [-5]), ("10-5", [10, 5]),
    ],
)  # fmt: skip
def test_the_numbers_of_a_text(text: str, values: list[Any]) -> None:
    assert answers.numbers(text) == values


def test_boxes_are_found_in_one_pass() -> None:
    assert answers.boxed("\\boxed{a \\boxed{b}} } \\boxed {{c}} \\boxed{d") == ["a \\boxed{b}", "b", "{c}"]
    begun = time.perf_counter()
    assert answers.boxed("\\boxed{" * 6000) == []  # a model that repeats itself
    assert time.perf_counter() - begun < 2


def test_gsm8k_reads_the_number_after_the_mark_as_its_source_does() -> None:
    right = ["#### 72 clips", "#### **72**", "#### $72", "#### 72 or 24", "#### 72.", "####72"]
    wrong = ["#### 7 2", "#### 7,2", "#### 24 or 72", "####", "#### \n72", "72"]
    assert score("gsm8k", *right, *wrong, answer="#### 72") == [1.0] * len(right) + [0.0] * len(wrong)


def test_numeric_answer_tolerance() -> None:
    assert score("numeric_answer", "about 3.14", "3.2", params={"absolute": 0.01}, answer=3.1416) == [1.0, 0.0]
    assert score("numeric_answer", "101", "90", params={"relative": 0.05}, answer="100") == [1.0, 0.0]
    with pytest.raises(RewardError, match="has no number"):
        score("numeric_answer", "1", answer="none")


def test_arithmetic_is_exact_and_only_arithmetic() -> None:
    assert evaluate("(1 + 2) * 3 / 4")[0] == 9 / 4
    for expression in (
        "2 ** 10",
        "__import__('os')",
        "1 / 0",
        "x + 1",
        "9" * 400,
        "(" * 99,
        "True + 1",
        "1 if 1 else 2",
    ):
        assert evaluate(expression) is None
    assert score("arithmetic_steps", "10 / 3 = 3.33 and 2 + 2 = 5", "<<3*4=12>>12", "none here") == [0.5, 1.0, None]


def test_steps_in_lists_and_in_latex_are_checked_and_tails_of_other_expressions_are_not() -> None:
    for steps in ("- 48 / 2 = 24\n- 24 + 48 = 73", "1. 48 / 2 = 24\n2. 24 + 48 = 73", "48/2 = 24\n5 + 5 = 11"):
        assert score("arithmetic_steps", steps) == [0.5]
    assert score("arithmetic_steps", "$5 \\times 4 + 1 = 21$", "$(3 + 4) \\cdot 2 = 14$", "so -5 + 3 = -2") == [1.0] * 3
    assert (
        score("arithmetic_steps", "2^3 + 1 = 9", "x + 3 + 4 = 10", "sqrt(16) + 2 = 6", "5 pens * 2 + 3 = 13")
        == [None] * 4
    )


# --- matching ------------------------------------------------------------------------------------------------------


def plain_distance(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


@given(st.text("abc", max_size=80), st.text("abc", max_size=80))
def test_levenshtein_equals_the_textbook(left: str, right: str) -> None:
    assert levenshtein(left, right) == plain_distance(left, right)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"), ("B", "B"), ("**C**", "C"), ("(D) because", "D"), ("A. 12 apples", "A"), ("\\boxed{\\text{A}}", "A"),
        ("<answer>c</answer>", "C"), ("A good day", None), ("I think so", None), ("First (A), no, (B)", None), ("Answer: **E**", "E"),
        ("It is not A.\nAnswer: D", "D"), ("Surely option C is right", None), ("Lots of text (B) here", "B"),
        ("**Answer:** B", "B"), ("\\boxed{\\textbf{B}}", "B"), ("<answer>B. copper</answer>", "B"), ("The answer is a bit hard.\nB", "B"),
        ("<think>The answer is A? No.</think>\nB", "B"), ("<think>(A) or (C)</think>\n(B)", "B"), ("The answer is \\(B\\)", "B"),
        ("(b)", "B"), ("`B`", "B"), ("Option B", "B"), ("the answer is: b.", "B"), ("e.g. this", None), ("\\boxed{A, B}", None),
    ],
)  # fmt: skip
def test_letters(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


def test_choice_by_index_and_text() -> None:
    assert score("choice_letter", "(B)", answer=1) == [1.0]
    assert score("choice_letter", "(B)", answer="red", choices=["blue", "red"]) == [1.0]
    with pytest.raises(RewardError, match="neither a letter"):
        score("choice_letter", "(B)", answer="green", choices=["blue", "red"])


# --- SQL, tools, formats -------------------------------------------------------------------------------------------

SCHEMA = "CREATE TABLE t (a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (2, 'z'), (2, 'w');"


def test_sql_compares_rows_not_text() -> None:
    gold = "SELECT a, COUNT(*) FROM t GROUP BY a"
    right = [
        "SELECT a, SUM(1) FROM t GROUP BY 1 ORDER BY a DESC;",
        "```sql\nSELECT a AS k, COUNT(b) FROM t GROUP BY k\n```",
    ]
    wrong = ["SELECT COUNT(*), a FROM t GROUP BY a", "SELECT a FROM t", "", "PRAGMA table_info(t)", "ATTACH 'x.db' AS y", "SELECT 1; SELECT 2",
             "SELECT writefile('x', 'y')", "SELECT load_extension('x')", "SELECT zeroblob(900000000)", "INSERT INTO t VALUES (3, 'w') RETURNING a, 1"]  # fmt: skip
    assert score("sql_execution", *right, *wrong, schema=SCHEMA, answer=gold) == [1.0] * 2 + [0.0] * len(wrong)


def test_sql_that_writes_scores_nothing_even_with_the_right_rows(tmp_path: Path) -> None:
    writes = [
        "INSERT INTO t VALUES (3, 'v') RETURNING a, b",
        "UPDATE t SET a = 3, b = 'v' WHERE b = 'x' RETURNING a, b",
    ]
    assert score("sql_execution", *writes, schema=SCHEMA, answer="SELECT 3, 'v'") == [0.0, 0.0]
    for attempt in (f"ATTACH '{tmp_path}/x.db' AS y", f"VACUUM INTO '{tmp_path}/x.db'"):
        assert score("sql_execution", attempt, schema=SCHEMA, answer="SELECT 3") == [0.0]
    assert list(tmp_path.iterdir()) == []


def test_sql_order_counts_when_the_reference_sorts() -> None:
    gold = "SELECT b FROM t ORDER BY b DESC"
    assert score("sql_execution", "SELECT b FROM t ORDER BY b", gold, schema=SCHEMA, answer=gold) == [0.0, 1.0]
    assert score(
        "sql_execution", "SELECT b FROM t ORDER BY b", params={"ordered": False}, schema=SCHEMA, answer=gold
    ) == [1.0]
    with pytest.raises(RewardError, match="reference query does not run"):
        score("sql_execution", "SELECT 1", schema=SCHEMA, answer="SELECT nothing FROM t")
    with pytest.raises(RewardError, match="`schema` does not run"):
        score("sql_execution", "SELECT 1", schema="CREATE TABEL", answer="SELECT 1")


def test_tool_calls_in_every_form() -> None:
    wanted = [("f", {"x": 1})]
    for text in (
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', '{"name": "f", "parameters": {"x": 1}}', "[f(x=1)]",
        '```json\n[{"function": {"name": "f", "arguments": "{\\"x\\": 1}"}}]\n```', '<think>[g()]</think>[f(x=1)]',
    ):  # fmt: skip
        assert calls_of(text) == wanted, text
    for text in ("no call", "[f(g())]", "[f(1)]", '{"nam": "f"}', "[f(x=1)", "x = f(x=1)"):
        assert calls_of(text) == [], text


def test_tool_call_partial_and_order() -> None:
    expected = [{"name": "f", "arguments": {"x": 1, "unused": None}}, {"name": "g", "arguments": {}}]
    assert score("tool_call_match", "[g(), f(x=1)]", "[f(x=1)]", tool_calls=expected) == [1.0, 0.0]
    assert score("tool_call_match", "[g(), f(x=1)]", params={"ordered": True}, tool_calls=expected) == [0.0]
    assert score("tool_call_match", "[f(x=1)]", "[f(x=1), f(x=1)]", params={"partial": True}, tool_calls=expected) == [
        pytest.approx(2 / 3),
        0.5,
    ]
    assert score("tool_call_match", "No tool is needed.", "[f()]", tool_calls=[]) == [1.0, 0.0]


def test_a_pattern_without_end_is_an_error() -> None:
    with pytest.raises(RewardError, match="backtracks without end"):
        score("regex_match", "a" * 40 + "b", params={"pattern": "(a|aa)+$", "timeout_s": 0.05})
    with pytest.raises(RewardError, match="not valid"):
        score("regex_match", "a", params={"pattern": "("})


def test_json_after_thinking() -> None:
    assert score("json_valid", '<think>[1</think>\n{"a": 1}', '<think>{"a": 1}</think>\nno') == [1.0, 0.0]


def test_unknown_constraints_and_schemas() -> None:
    with pytest.raises(RewardError, match="no constraint 'max_word'"):
        score("instruction_following", "a", constraints={"max_word": 1})
    assert score("instruction_following", "a", constraints='{"max_words": 1, "bullets": null}') == [1.0]
    with pytest.raises(RewardError, match="schema is not valid"):
        score("json_schema", "{}", params={"schema": {"type": 5}})
