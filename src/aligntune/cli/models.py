"""`chat` and `export`: using a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    app.command("chat")(chat)
    app.command("export")(export)


def chat(
    model: Annotated[str, typer.Argument(help="Model or adapter folder, a run's output folder, or hub name.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends."""
    from aligntune.models.use import Chat
    from aligntune.trainers.quiet import quiet_libraries

    quiet_libraries()
    talk = Chat.load(model, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    while True:
        try:
            question = input("> ")
        except EOFError:
            print()
            return
        if not question.strip():
            return
        print(talk.say(question))


def export(
    model: Annotated[str, typer.Argument(help="Adapter or model folder, or a run's output folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="Number format of the weights: bf16, fp16, fp32.")] = "bf16",
    overwrite: Annotated[bool, typer.Option(help="Replace the folder.")] = False,
) -> None:
    """Write full weights (an adapter merged into its base) and check that they give the same answers."""
    from aligntune.models.use import export as write
    from aligntune.trainers.quiet import quiet_libraries

    quiet_libraries()
    difference = write(model, output, dtype=dtype, overwrite=overwrite)
    print(f"wrote {output} ({dtype}); largest difference of log-probabilities to the original: {difference:.2g}")
