"""Which rewards are there? Rows for `aligntune reward list` and the page of the docs, from the registry itself."""

from __future__ import annotations

from typing import Any

from . import base
from .base import Example, Reward, describe
from .samples import completion_text, prompt_text

INTRO = """\
A reward scores an answer; higher is better. Online RL trains on the weighted sum of one or more. Use the built-in ones by name, or write a Python function.

`problems.jsonl` has a prompt, and the columns that the rewards ask for:

```json title="problems.jsonl"
{"prompt": "What is 12 * 12? Please explain.", "answer": "144"}
```

`my_rewards.py`:

```python
# my_rewards.py
def polite(completion, *, words=("please", "thank")):
    return float(any(word in completion.lower() for word in words))
```

```yaml
# run.yaml
algorithm: grpo
model: {name_or_path: Qwen/Qwen2.5-0.5B-Instruct}
dataset: {name: problems.jsonl}
rewards:
  - type: math_correctness            # a built-in reward; it reads the column `answer`
    weight: 2.0
  - type: my_rewards.py:polite        # or module:function, or in Python the function itself
    params: {words: [please, thanks]}
    on_error: "null"                  # go on without this score if the function raises
train: {num_generations: 8, per_device_batch_size: 8, max_completion_length: 256}
logging: {output_dir: output/grpo}
```

```sh
aligntune train run.yaml
```

## Which reward?

- There is a right answer: `math_correctness`, `numeric_answer`, `exact_match`, `choice_letter`; for code `unit_tests`, `code_execution`, `stdin_stdout`; for JSON and tool calls
  `json_schema`, `tool_call_match`. Prefer these: they are hard to game.
- The form matters too: add `think_format`, `xml_format`, `length` or `brevity` with a small weight.
- Only people, or a model, can tell: train a [reward model](reward-models.md), or use `judge`.
- Rewards of the kind *heuristic* in the table stand in for what their name says. A policy learns to game them; use them beside others, and watch `eval_rewards/NAME/accuracy`.

Test before you train. `aligntune reward test math_correctness problems.jsonl --gold answer` scores the gold answers and wrong ones made from them: gold answers must score full marks, and wrong ones must
not. `aligntune reward list NAME` shows one reward in full, and `aligntune reward score my_rewards.py:polite answers.jsonl` scores the column
`completion` of a file.

## A reward of your own

A reward is a function. Its arguments are filled by name:

| argument | value |
|---|---|
| `prompt`, `completion` | text; of messages, the last one of the user and of the assistant |
| `messages` | the whole conversation |
| `completion_ids`, `tokenizer` | token ids of the completion; the policy's tokenizer |
| `prompts`, `completions` | lists, as they came from the dataset; the function then returns a list |
| a column of the dataset | its value. `answer`, `reference` and `tests` are also found under usual synonyms (`solution`, `ground_truth`, ...); `params: {columns: {answer: my_column}}` names the column |
| an argument with a default | may be set by `params`; after `*`, only by `params` |

It returns a number, or None where it does not apply. It may be `async`.

## How scores are combined

The order is: raw score, `shield`, `normalize`, `clip`, `weight`, sum. Each stage is logged by the reward's name with mean and standard deviation, and with the share of nulls and of errors:
`rewards/NAME/mean` is the mean raw score, `rewards/NAME/weighted/mean` the mean after the last stage.

## Errors

If a reward raises, the run stops and shows the sample and the exception. With `on_error: "null"` the first of a batch is logged, each is counted under `rewards/NAME/errors`, and the run goes on without that
score. NaN, text in place of a number, a missing column, an unknown name or param, and weights that do not fit are errors that say what to do, as early as they can be known:
`aligntune validate` finds unknown names and params without reading data.

## Rewards that run code

They run it in a sandbox. What isolates it on this machine is found by trying, printed, and put into the report
(`reward code_execution runs code; isolation standard: seccomp filter, Landlock 7, ...; held: network, writes, processes, reads`). If the machine offers less than
`params: {isolation: strict | standard | minimal}` asks for, that is an error before a model is loaded.

## All rewards

"""

CHECKED_BY = {True: "heuristic", False: "defined"}


def rows() -> list[dict[str, Any]]:
    """One dict per registered reward (see `describe`), with its examples, sorted by name."""
    return [
        describe(name) | {"examples": [_example(example) for example in base.get(name).examples]}
        for name in base.names()
    ]


def _example(example: Example) -> dict[str, Any]:
    return {
        "kind": example.kind,
        "completion": example.completion if isinstance(example.completion, str) else list(example.completion),
        "score": example.score,
        "note": example.note,
    }


def text(name: str) -> str:
    """One reward in full, for a terminal: definition, range, source, columns, params, and its examples with their scores.

    Raises:
        RewardError: no reward has this name.
    """
    item = base.get(name)
    described = describe(item)
    lines = [f"{item.name} ({CHECKED_BY[item.heuristic]}, {_range(item)})", "", _docstring(item), ""]
    lines += [f"source: {item.source}"] if item.source else []
    lines += [f"also called: {', '.join(item.aliases)}"] if item.aliases else []
    lines += [f"columns: {', '.join(described['columns'])}"] if described["columns"] else []
    lines += ["params:"] if described["params"] else []
    lines += [f"  {param} = {default!r}" for param, default in described["params"].items()]
    for kind in ("good", "bad", "adversarial"):
        found = [example for example in item.examples if example.kind == kind]
        lines += ["", f"{kind}:"] if found else []
        for example in found:
            lines.append(f"  scores {_score(example)}" + (f"  ({example.note})" if example.note else ""))
            given = {"prompt": prompt_text(example.prompt), "completion": completion_text(example.completion)}
            given |= {f"column {column}": repr(value) for column, value in example.columns.items()}
            given |= {f"param {param}": repr(value) for param, value in example.params.items()}
            for part, value in given.items():
                if value or part == "completion":
                    lines.append(f"    {part}: " + (value.replace("\n", "\n      ") or "(empty)"))
    return "\n".join(lines)


def markdown() -> str:
    """A table of all rewards, then each with its definition, columns, params and examples."""
    found = [base.get(name) for name in base.names()]
    lines = ["| reward | measures | range | kind |", "|---|---|---|---|"]
    lines += [
        f"| [`{item.name}`](#{item.name}) | {_cell(item.summary)} | {_range(item)} | {CHECKED_BY[item.heuristic]} |"
        for item in found
    ]
    return "\n".join([*lines, "", *(_section(item) for item in found)])


def _range(item: Reward) -> str:
    low, high = ("" if bound is None else f"{bound:g}" for bound in item.range)
    return f"{low} to {high}" if low or high else "any"


def _section(item: Reward) -> str:
    described = describe(item)
    lines = [f"### {item.name}", "", _docstring(item), ""]
    facts = {
        "Source": item.source,
        "Also called": ", ".join(f"`{alias}`" for alias in item.aliases),
        "Columns": ", ".join(f"`{name}`" for name in described["columns"]),
        "Params": ", ".join(f"`{name}`: `{value!r}`" for name, value in described["params"].items()),
    }
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    lines += ["", "| example | completion | scores |", "|---|---|---|"]
    for example in item.examples:
        kind = f"{example.kind} ({example.note})" if example.note else example.kind
        lines.append(f"| {kind} | {_code(completion_text(example.completion))} | {_score(example)} |")
    return "\n".join([*lines, ""])


def _docstring(item: Reward) -> str:
    import inspect

    return inspect.getdoc(item.function) or ""


def _score(example: Example) -> str:
    if example.score is None:
        return "does not apply"
    if isinstance(example.score, tuple):
        return f"{example.score[0]:g} to {example.score[1]:g}"
    return f"{example.score:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str, width: int = 90) -> str:
    """A completion on one line of a table, without the signs that a table or a code span would take for its own."""
    line = text.replace("\n", "⏎").replace("`", "'").replace("|", "¦")
    short = line if len(line) <= width else line[:width] + "…"
    return f"`{short}`" if short.strip() else "(empty)"
