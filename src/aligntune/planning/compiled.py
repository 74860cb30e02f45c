"""What will the compiled decoder layers of a run keep on a GPU? As `trainers.compiling` decides it."""

from __future__ import annotations

from collections.abc import Callable

from aligntune.config.compiling import ELSEWHERE, Keep, compiling
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.planning.shapes import FAMILIES, Shape


def what_compiled_layers_keep(
    run: SFTRunConfig | RLRunConfig, shape: Shape, steps: Callable[[], int | None]
) -> Keep | None:
    """For a run of the native backend's language-model trainers; None: layers are not compiled.

    Raises ConfigError when compiling was asked for and the run will refuse it.
    """
    found, lora = compiling(run, steps), run.model.lora
    if found is None:
        return None
    if shape.family is FAMILIES["gpt2"]:
        found = found.unless(ELSEWHERE)
    found = found.unless_it_drops("LoRA (lora_dropout)" if lora is not None and lora.dropout else None)
    return None if found.problem is not None else found.keep
