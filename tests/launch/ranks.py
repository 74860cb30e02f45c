"""Runs configs in the processes of a small gloo group: python ranks.py WORLD CASES.json (one process per rank).

CASES.json: a list of {"config": .., "sharded": bool, "train": {..arguments of Session.train}}. The parent starts WORLD copies of itself.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


def run_cases(cases: list[dict[str, Any]], folder: Path, world: int = 2, timeout: float = 240) -> list[str]:
    """Run the cases one after another in `world` processes; returns their outputs. Fails with the first rank's output."""
    file = folder / f"cases-{world}.json"
    file.write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        command = [sys.executable, __file__, str(file)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=timeout)[0] for process in started]
    for process, output in zip(started, outputs):
        assert process.returncode == 0, output[-6000:]
    return outputs


def _shard_on_cpu() -> None:
    """accelerate shards on accelerators only: tell it that this CPU group is one."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ |= {
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
                found = packed_log_probs(self.model, rows, temperature=params.temperature).log_probs.split(
                    list(rows.counts)
                )
            log_probs = [each.tolist() for each in found]
            return Rollouts(completions, log_probs, log_probs, [True] * len(completions))

        def update_weights(self) -> None: ...

    online.select_engine = lambda model, *args, **kwargs: (Told(model), "the same on any rank")


def main() -> None:
    import torch

    torch.set_num_threads(1)
    from aligntune.api import create_trainer

    cases = json.loads(Path(sys.argv[1]).read_text())
    if any(case.get("sharded") for case in cases):
        _shard_on_cpu()
    if any(case["config"]["algorithm"] == "grpo" for case in cases):
        _same_completions_on_any_rank()
    for case in cases:
        session = create_trainer(case["config"])
        session.train(**case.get("train", {}))
        print(f"done {case['config']['logging']['output_dir']}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
