"""Does Meta-ES mend a misweighted reward? Three seeds on one CPU core.

A model of about 77 thousand parameters that says five letters backwards, right about half of the time, is trained with two rewards:
the right answer, and, three times as heavy, the share of letters that are an `a`, which the degenerate answer `a` wins. Three
runs from the same weights, with the same steps:

| run | rewards |
|---|---|
| given | GRPO with the weights as given |
| Meta-ES | the weights evolve by the verifier (exact answers) on a fifth of the training prompts; then the same training |
| verifier alone | GRPO with the right answer as the only reward: what a user who knew better would have had |

Measured is the share of held-out prompts, which no run trains on or selects by, that the greedy answer gets right.

    OMP_NUM_THREADS=1 python benchmarks/meta_es.py [--seeds 3] [--steps 120] [--out benchmarks/results]

Writes `meta_es.json` and `meta_es.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from learning_rl import HELD_OUT, TASKS, exact, taught, write_model, write_rows

WEIGHTS = {"exact": 1.0, "letter_a": 3.0}
EVOLUTION = {
    "meta_iterations": 6,
    "patience": 6,
    "N": 8,
    "T": 30,
    "sigma": 0.01,
    "sigma_decay": 0.95,
    "alpha": 0.04,
    "eval_max_tokens": 6,
}
"""sigma 0.01 perturbs weights by a factor e; a step of alpha 0.04 moves them by a factor of about e."""


def letter_a(completion: str) -> float:
    """Share of letters that are an a."""
    return completion.count("a") / max(1, len(completion))


def settings(folder: Path, seed: int, steps: int) -> dict[str, Any]:
    return {
        "precision": "fp32", "use_peft": False, "loggers": "none", "save_strategy": "no", "lr_scheduler": "constant", "batch_size": 128,
        "num_generations": 8, "max_steps": steps, "learning_rate": 3e-4, "max_completion_length": 6, "temperature": 0.7, "scale_rewards": "batch", "top_p": 1.0,
        "kl_coef": 0.0, "seed": seed, "data_seed": seed, "backend": "native", "eval_strategy": "steps", "eval_interval": steps,
        "logging_steps": 1000, "dataset": {"name": str(folder / "train.jsonl"), "task_type": "text", "format_type": "prompt"},
        "eval_dataset": {"name": str(folder / "held.jsonl"), "task_type": "text", "format_type": "prompt"},
    }  # fmt: skip


def run(start: Path, out: Path, algorithm: str, rewards: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """Train and measure: accuracy before and after, and what evolved."""
    from aligntune.core.backend_factory import create_rl_trainer

    started = time.perf_counter()
    session = create_rl_trainer(str(start), algorithm=algorithm, rewards=rewards, output_dir=str(out), **given)
    session.train()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    accuracy = [row["rewards/exact/accuracy"] for row in rows if row["split"] == "eval"]
    state = out / "evolution.json"
    history = json.loads(state.read_text())["history"] if state.exists() else []
    return {
        "start": accuracy[0],
        "end": accuracy[-1],
        "seconds": round(time.perf_counter() - started, 1),
        "history": history,
    }


def seed_runs(folder: Path, start: Path, seed: int, steps: int) -> dict[str, dict[str, Any]]:
    common = settings(folder, seed, steps)
    mixed = [{"type": function, "weight": WEIGHTS[function.__name__]} for function in (exact, letter_a)]
    mirror = {"mirror_coefficient": 0.0}  # the inner algorithm is then GRPO, as in the other runs
    return {
        "given": run(start, folder / f"given-{seed}", "grpo", mixed, common),
        "Meta-ES": run(
            start, folder / f"evolved-{seed}", "meta_es", mixed, common | mirror | EVOLUTION | {"verifier": exact}
        ),
        "verifier alone": run(start, folder / f"verifier-{seed}", "grpo", [{"type": exact}], common),
    }


def proportion(numbers: dict[str, float]) -> float:
    """Weight of letter_a for each unit of the right answer's."""
    return numbers["letter_a.weight"] / numbers["exact.weight"]


def best_record(history: list[dict[str, Any]]) -> dict[str, Any]:
    return max(history, key=lambda record: -1.0 if record["fitness"] is None else record["fitness"])


def table(results: list[dict[str, Any]], steps: int) -> str:
    lines = [
        f"Greedy accuracy on {HELD_OUT} held-out prompts; {steps} steps of 128 completions in every run, before which Meta-ES has "
        f"{results[0]['runs']['Meta-ES']['history'][-1]['generation']} generations of 1 + {EVOLUTION['N']} trainings of {EVOLUTION['T']} steps.",
        "",
        "| seed | start | given weights | Meta-ES | verifier alone | weight of letter_a for 1 of exact: given -> evolved | fitness of centres | seconds: given, Meta-ES |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for result in results:
        runs = result["runs"]
        history = runs["Meta-ES"]["history"]
        evolved = proportion(best_record(history)["numbers"])
        fitness = ", ".join(f"{record['fitness']:.2f}" for record in history)
        lines.append(
            f"| {result['seed']} | {runs['given']['start']:.2f} | {runs['given']['end']:.2f} | {runs['Meta-ES']['end']:.2f} | "
            f"{runs['verifier alone']['end']:.2f} | 3.0 -> {evolved:.3f} | {fitness} | "
            f"{runs['given']['seconds']:.0f}, {runs['Meta-ES']['seconds']:.0f} |"
        )
    means = [statistics.mean(result["runs"][name]["end"] for result in results) for name in results[0]["runs"]]
    lines.append(f"| mean | | {means[0]:.2f} | {means[1]:.2f} | {means[2]:.2f} | | | |")
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")}


def write(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    told = {"command": f"python benchmarks/meta_es.py --seeds {options.seeds} --steps {options.steps}", "versions": versions(),
            "weights": WEIGHTS, "evolution": EVOLUTION, "results": results}  # fmt: skip
    (options.out / "meta_es.json").write_text(json.dumps(told, indent=1) + "\n")
    text = (
        table(results, options.steps)
        + "\n"
        + ", ".join(f"{name} {found}" for name, found in versions().items())
        + f"; `{told['command']}`\n"
    )
    (options.out / "meta_es.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    make, teaching = TASKS["reverse"]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        model = write_model(folder / "model")
        held = write_rows(folder / "held.jsonl", make, HELD_OUT, seed=1)
        write_rows(folder / "train.jsonl", make, 2000, seed=2, without=held)
        with contextlib.redirect_stdout(io.StringIO()):
            start = taught(folder, model, teaching)
        for seed in range(options.seeds):
            with contextlib.redirect_stdout(io.StringIO()):
                found = seed_runs(folder, start, seed, options.steps)
            results.append({"seed": seed, "runs": found})
            write(results, options)  # seed by seed: a run that is cut off keeps what it has
            print(
                f"seed {seed}: "
                + ", ".join(f"{name} {one['end']:.2f} ({one['seconds']} s)" for name, one in found.items()),
                flush=True,
            )
    print((options.out / "meta_es.md").read_text())


if __name__ == "__main__":
    main()
