"""Does Neural Mirror GRPO learn what GRPO learns, and what does each map cost? Six settings on three generated tasks, three seeds.

Models, tasks and training are those of `learning_rl.py`; here with a reference, and a divergence to it in the loss:

    OMP_NUM_THREADS=1 python benchmarks/learning_mirror.py [--steps 80] [--seeds 3] [--tasks reverse,sort,add] [--out benchmarks/results]

Writes `learning_mirror.json` (every run, with accuracy and divergence over steps) and `learning_mirror.md` (the table).
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

from learning_rl import COMPLETIONS, HELD_OUT, TASKS, common, exact, prepared, write_model

SETTINGS: dict[str, dict[str, Any]] = {
    "grpo, no reference": {"algorithm": "grpo", "kl_coef": 0.0},
    "grpo, KL 0.04": {"algorithm": "grpo", "kl_coef": 0.04},
    "neural 1e-4": {"algorithm": "neural_mirror_grpo", "mirror_map": "neural", "mirror_coefficient": 1e-4},
    "neural 10": {"algorithm": "neural_mirror_grpo", "mirror_map": "neural", "mirror_coefficient": 10.0},
    "kl 0.04": {"algorithm": "neural_mirror_grpo", "mirror_map": "kl", "mirror_coefficient": 0.04},
    "prob_l2 0.1": {"algorithm": "neural_mirror_grpo", "mirror_map": "prob_l2", "mirror_coefficient": 0.1},
    "log_l2 0.01": {"algorithm": "neural_mirror_grpo", "mirror_map": "log_l2", "mirror_coefficient": 0.01},
}


def run(folder: Path, start: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train and measure; accuracy and divergence by step."""
    from aligntune.core.backend_factory import create_rl_trainer

    own = SETTINGS[name]
    settings = {
        "batch_size": COMPLETIONS, "num_generations": 8, "num_ppo_epochs": 2, "max_steps": 2 * steps, "learning_rate": 3e-4,
        "max_completion_length": 6, "temperature": 1.0, "top_p": 1.0, "seed": seed, "data_seed": seed, "backend": "native",
        "eval_strategy": "steps", "eval_interval": 2 * max(1, steps // 4), "logging_steps": 1000,
    }  # fmt: skip
    dataset = {"name": str(folder / "train.jsonl"), "task_type": "text", "format_type": "prompt"}
    held = {"eval_dataset": dataset | {"name": str(folder / "held.jsonl")}}
    out = folder / f"{name.replace(' ', '-')}-{seed}"
    started = time.perf_counter()
    session = create_rl_trainer(
        str(start),
        reward_functions=[exact],
        output_dir=str(out),
        dataset=dataset,
        **(common(folder) | held | settings | own),
    )
    session.train()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = {row["step"]: row["pass@1"] for row in rows if row["split"] == "eval"}
    measure = "mirror_divergence" if "mirror_map" in own else "kl"
    distance = {row["step"]: row[measure] for row in rows if row["split"] == "train" and measure in row}
    return {
        "setting": name, "seed": seed, "start": curve[0], "end": curve[max(curve)], "curve": curve, "divergence": distance,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def table(results: list[dict[str, Any]], steps: int, seconds: float) -> str:
    tasks = list(dict.fromkeys(result["task"] for result in results))
    lines = [
        f"Greedy accuracy on {HELD_OUT} held-out prompts at the end, mean over seeds (least to most), and the mean divergence to the reference "
        f"near the end (KL by k3 for GRPO, else the map's own D). {steps} rollouts of {COMPLETIONS} completions, two updates each; all runs: {seconds:.0f} s on one CPU core.",
        "",
        f"| setting | {' | '.join(f'{task}: start | end | divergence' for task in tasks)} |",
        f"|---|{'---|---|---|' * len(tasks)}",
    ]
    for name in SETTINGS:
        cells = []
        for task in tasks:
            mine = [result for result in results if (result["task"], result["setting"]) == (task, name)]
            ends = [result["end"] for result in mine]
            last = [list(result["divergence"].values())[-1] for result in mine if result["divergence"]]
            cells += [
                f"{mine[0]['start']:.2f}",
                f"{statistics.mean(ends):.2f} ({min(ends):.2f}–{max(ends):.2f})",
                f"{statistics.mean(last):.2g}" if last else "–",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(results: list[dict[str, Any]], options: argparse.Namespace, seconds: float) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")}
    command = (
        f"python benchmarks/learning_mirror.py --steps {options.steps} --seeds {options.seeds} --tasks {options.tasks}"
    )
    told = {"command": command, "versions": found, "seconds": seconds, "runs": results}
    (options.out / "learning_mirror.json").write_text(json.dumps(told, indent=1) + "\n")
    text = table(results, options.steps, seconds)
    text += f"\n{', '.join(f'{name} {one}' for name, one in found.items())}; `{command}`\n"
    (options.out / "learning_mirror.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        model = write_model(Path(root) / "model")
        for task in options.tasks.split(","):
            folder = Path(root) / task
            start = prepared(folder, model, task)
            for seed in range(options.seeds):
                for name in SETTINGS:
                    with contextlib.redirect_stdout(io.StringIO()):
                        result = run(folder, start, name, seed, options.steps)
                    results.append({"task": task} | result)
                    print(
                        f"{task:7} {name:18} seed {seed}: {result['start']:.2f} -> {result['end']:.2f} in {result['seconds']} s",
                        flush=True,
                    )
            write(
                results, options, time.perf_counter() - started
            )  # task by task: a run that is cut off keeps what it has
    print((options.out / "learning_mirror.md").read_text())


if __name__ == "__main__":
    main()
