"""Runs configs in the processes of a small gloo group, one process per rank.

Starting a process costs more than a tiny run, so that one start serves many runs, in phases:
{"world": 1 or more, "sharded": bool, "cases": [{"config": .., "train": {..arguments of Session.train}}], "port": ..}.
A phase of one unsharded process deals its cases to the ranks, which run them side by side, each as a run of its own.
"""

from __future__ import annotations

import functools
import json
import os
import random
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from shell import start

OWN_FILES = ("rng_state", "rollouts.pt")
"""What every rank writes into a checkpoint, under names of its own."""
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells a process of its group."""


def only_some(prompt: Any, completion: str) -> float:
    """A reward that is the same for every completion of two thirds of the prompts."""
    number = int(str(prompt).split()[1])
    return float(len(completion)) if number % 3 == 0 else 0.0


def of_this_rank(predictions: Any, references: Any) -> dict[str, float]:
    """A metric that rises on the first rank and falls on the others."""
    global EVALUATED
    EVALUATED += 1
    return {"of_rank": float(EVALUATED if os.environ.get("RANK", "0") == "0" else -EVALUATED)}


EVALUATED = 0


def run_phases(phases: list[dict[str, Any]], folder: Path, ranks: int = 2, timeout: float = 540) -> list[str]:
    """Run the phases one after another in `ranks` processes; returns their outputs. Fails with that of the first that failed."""
    file = folder / "phases.json"
    file.write_text(json.dumps([phase | {"port": _free_port()} for phase in phases]))
    outputs = [folder / f"rank-{rank}.txt" for rank in range(ranks)]
    started = []
    for rank, output in enumerate(outputs):
        started.append(start(run_rank, str(file), rank, ranks, output=output))
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [process.exitcode for process in started]
        if None not in codes or any(codes):
            break
        time.sleep(0.1)
    late = [process for process in started if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    for process, output in zip(started, outputs):
        assert process.exitcode == 0 or process in late, output.read_text()[-6000:]
    assert not late, "\n".join(output.read_text()[-3000:] for output in outputs)
    return [output.read_text() for output in outputs]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _enter(phase: dict[str, Any], rank: int) -> None:
    """Make this process rank `rank` of a group as `phase` has it, whatever it was before."""
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._prepare_backend = PREPARE
    for name in [name for name in os.environ if "FSDP" in name or name in (*GROUP, "ACCELERATE_TORCH_DEVICE")]:
        del os.environ[name]
    world = phase["world"]
    if world > 1 or phase["sharded"]:
        values = (rank, rank, world, world, "127.0.0.1", phase["port"])
        os.environ |= {name: str(value) for name, value in zip(GROUP, values)}
    if not phase["sharded"]:
        return
    # accelerate shards on accelerators only: tell it that this CPU group is one.
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    torch.distributed.init_process_group("gloo")
    os.environ |= {
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }  # fmt: skip


def _same_completions_on_any_rank() -> None:
    """Rollouts that depend on the prompt and its copy only, with the policy's live log-probabilities."""
    import torch

    from aligntune.models.forward import packed_log_probs
    from aligntune.models.packed import PackedRows
    from aligntune.rollouts.base import Rollouts
    from aligntune.trainers import online

    class Told:
        name = "told"

        def __init__(self, model: Any) -> None:
            self.model = model

        def generate(self, prompt_ids: Any, params: Any) -> Rollouts:
            prompts = [list(prompt) for prompt in prompt_ids for _ in range(params.num_generations)]
            completions, seen = [], []
            for prompt in prompts:
                words = random.Random(f"{prompt} {seen.count(prompt)}")
                completions.append([*(words.randrange(10, 250) for _ in range(words.randrange(2, 9))), 2])
                seen.append(prompt)
            rows = PackedRows.from_completions(prompts, completions)
            with torch.no_grad():
                found = packed_log_probs(self.model, rows, temperature=params.temperature or 1.0).log_probs.split(
                    list(rows.counts)
                )
            log_probs = [each.tolist() for each in found]
            return Rollouts(completions, log_probs, log_probs, [True] * len(completions))

        def update_weights(self) -> None: ...

    online.select_engine = lambda model, *args, **kwargs: (Told(model), "the same on any rank")


def _report_writes(rank: int, outputs: list[str]) -> None:
    """Print which files of a run a rank other than the first writes, beside its own part of a checkpoint."""
    known = set()

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or os.environ.get("RANK", "0") == "0" or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path, writes = os.fspath(arguments[0]), any(letter in str(arguments[1] or "") for letter in "wax+")
        mine = any(name in os.path.basename(path) for name in OWN_FILES)
        if writes and not mine and path not in known and any(path.startswith(output) for output in outputs):
            known.add(path)
            sys.stdout.write(f"rank {rank} wrote {path}\n")

    sys.addaudithook(heard)


def _counted_passes() -> list[int]:
    """Filled with the number of pieces of each micro-batch that is trained on."""
    from aligntune.trainers.passes import BoundedPasses

    counts: list[int] = []
    plain = BoundedPasses.passes

    def passes(self: Any, model: Any, pieces: Any) -> Any:
        counts.append(len(pieces))
        return plain(self, model, pieces)

    BoundedPasses.passes = passes  # type: ignore[assignment]
    return counts


def _compile_without_code() -> None:
    """What is traced, and what it keeps for its backward pass, is at stake here; not the kernels, which take half a minute."""
    import torch

    torch.compile = functools.partial(torch.compile, backend="aot_eager")


def _short_answers() -> None:
    """Runs show answers before and after training, at which nobody looks here."""
    from aligntune.evaluation.answers import GreedyGenerator

    whole = GreedyGenerator.generate
    GreedyGenerator.generate = lambda self, prompts, *, max_new_tokens, **options: whole(  # type: ignore[method-assign]
        self, prompts, max_new_tokens=min(4, max_new_tokens), **options
    )


def run_rank(file: str, rank: int, ranks: int) -> None:
    """The life of one process; it does not return."""
    global PREPARE
    try:
        from accelerate.state import PartialState

        PREPARE = PartialState._prepare_backend
        _run(file, rank, ranks)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def _run(file: str, rank: int, ranks: int) -> None:
    from aligntune.api import create_trainer

    phases = json.loads(Path(file).read_text())
    _same_completions_on_any_rank()
    _short_answers()
    _compile_without_code()
    passes = _counted_passes()
    _report_writes(rank, [case["config"]["logging"]["output_dir"] for phase in phases for case in phase["cases"]])
    for phase in phases:
        cases, alone = phase["cases"], phase["world"] == 1
        if alone and not phase["sharded"]:
            cases = cases[rank::ranks]
        elif rank >= phase["world"]:
            continue
        _enter(phase, 0 if alone else rank)
        for case in cases:
            begin = time.monotonic()
            passes.clear()
            session = create_trainer(case["config"])
            session.train(**case.get("train", {}))
            print(f"passes {case['config']['logging']['output_dir']} {passes}")
            print(f"done {case['config']['logging']['output_dir']} {time.monotonic() - begin:.1f} s", flush=True)
