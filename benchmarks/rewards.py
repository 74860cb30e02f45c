"""Rewards checked and timed: python benchmarks/rewards.py [--humaneval FILE] [--gsm8k FILE] [--out FILE].

FILEs are the published JSON lines (HumanEval: task_id, prompt, canonical_solution, test, entry_point; GSM8K: question,
answer). Every canonical solution must score 1 and every wrong body 0, every gold answer 1 and every other row's answer
with another number 0; then the same calls are timed, best of `--repeats`. Without files, built-in problems are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aligntune.reporting.provenance import package_versions
from aligntune.rewards import Batch, get
from aligntune.rewards.call import Caller
from aligntune.rewards.sandbox import isolation

DOUBLE = {
    "task_id": "double",
    "prompt": "def double(x):\n    '''Twice x.'''\n",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    for x in range(20):\n        assert candidate(x) == x + x\n",
    "entry_point": "double",
}
LATEX = [
    ("\\boxed{\\frac{1}{2}+x}", "$x+\\frac{1}{2}$"),
    ("\\boxed{x^2+2x+1}", "$(x+1)^2$"),
    ("\\boxed{2\\sqrt{2}}", "$\\sqrt{8}$"),
    ("\\boxed{(1, 3)}", "$(1, 2)$"),
]


def read(path: str | None, fallback: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if path is None:
        return fallback
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


def scores(
    name: str, rows: list[dict[str, Any]], completions: list[str], params: dict[str, Any] | None = None
) -> list[float]:
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    prompts = [row.get("prompt", row.get("question", "")) for row in rows]
    return Caller(get(name), params)(Batch(prompts, completions, columns))[0]


def timed(run: Callable[[], object], count: int, repeats: int) -> dict[str, float]:
    """Items a second of the fastest of `repeats` runs, after one that is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return {
        "per_second": round(count / min(seconds), 1),
        "median_per_second": round(count / sorted(seconds)[repeats // 2], 1),
    }


def humaneval(rows: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    canonical = [row["canonical_solution"] for row in rows]
    wrong = {
        "returns None": ["    return None\n"] * len(rows),
        "exits": ["    import sys; sys.exit(0)\n"] * len(rows),
        "equal to everything": [
            "    class E:\n        def __eq__(self, other): return True\n        def __ne__(self, other): return False\n"
            "        __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__\n        __hash__ = object.__hash__\n"
            "        def __sub__(self, other): return self\n        __rsub__ = __sub__\n        def __abs__(self): return self\n"
            "    return E()\n"
        ]
        * len(rows),
    }
    found = {
        "problems": len(rows),
        "canonical_passed": int(sum(scores("code_execution", rows, canonical))),
        "wrong_passed": {kind: int(sum(scores("code_execution", rows, bodies))) for kind, bodies in wrong.items()},
    }
    return found | {"checks": timed(lambda: scores("code_execution", rows, canonical), len(rows), repeats)}


def gsm8k(rows: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    gold = [row["answer"] for row in rows]
    shifted = gold[1:] + gold[:1]
    final = [text.rpartition("####")[2].strip() for text in gold]
    differs = [left != right for left, right in zip(final, final[1:] + final[:1], strict=True)]
    found: dict[str, Any] = {"rows": len(rows)}
    for name in ("gsm8k", "math_correctness", "numeric_answer"):
        wrong = scores(name, rows, shifted)
        found[name] = {
            "gold_passed": int(sum(scores(name, rows, gold))),
            "wrong_passed": int(sum(score for score, other in zip(wrong, differs, strict=True) if other)),
            "wrong": sum(differs),
        } | timed(lambda name=name: scores(name, rows, gold), len(rows), repeats)
    return found


def latex(repeats: int, copies: int = 25) -> dict[str, Any]:
    pairs = LATEX * copies
    rows = [{"prompt": "", "answer": answer} for _, answer in pairs]
    return timed(lambda: scores("math_correctness", rows, [given for given, _ in pairs]), len(pairs), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--humaneval")
    parser.add_argument("--gsm8k")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="write the JSON here, too")
    args = parser.parse_args()
    sums = [{"question": "", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(1000)]
    result = {
        "command": "python benchmarks/rewards.py " + " ".join(word.rpartition("/")[2] for word in sys.argv[1:]),
        "versions": package_versions(("math-verify", "sympy")),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
        },
        "isolation": str(isolation()),
        "humaneval": humaneval(read(args.humaneval, [DOUBLE] * 100), args.repeats),
        "gsm8k": gsm8k(read(args.gsm8k, sums), args.repeats),
        "math_verify_expressions": latex(args.repeats),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
