"""Does this machine run AlignTune? One finding a line, and what to install. Nothing here fails for what is merely absent."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from aligntune.backends.select import backends
from aligntune.backends.versions import TESTED, installed, judge
from aligntune.errors import AlignTuneError

HUB = "https://huggingface.co"
HUB_SECONDS = 3.0
WRITTEN_MIB = 64
STEPS = 20
EXTRAS: dict[str, tuple[str, ...]] = {
    "eval": ("tree_sitter", "tree_sitter_python"), "rewards": ("math_verify", "jsonschema", "vaderSentiment", "pyphen", "reasoning_gym"),
    "tensorboard": ("tensorboard",), "wandb": ("wandb",), "quant": ("bitsandbytes",), "liger": ("liger_kernel",),
    "flash": ("flash_attn",), "vllm": ("vllm",), "unsloth": ("unsloth",), "deepspeed": ("deepspeed",), "harness": ("lm_eval",),
}  # fmt: skip
"""Extra -> modules that show that it is installed."""


@dataclass(frozen=True)
class Finding:
    """`bad`: runs will fail; `note`: something is absent or untested. `install`: what pip should install about it."""

    name: str
    state: Literal["ok", "note", "bad"]
    text: str
    install: str | None = None


def examine(folder: Path, *, smoke: bool = True) -> Iterator[Finding]:
    """Every finding, as soon as it is known. `folder`: where runs would be written."""
    yield from versions()
    checks: list[Callable[[], Finding]] = [gpu, attention, triton]
    if find_spec("torch") is not None and find_spec("transformers") is not None:
        for check in checks:
            yield check()
    yield from (Finding(f"backend {backend.name}", *_absent(backend.available())) for backend in backends().values())
    yield extras()
    yield hub()
    yield disk(folder)
    if smoke:
        yield smoke_run()


def advice(findings: list[Finding]) -> str:
    """What to install, in one line; empty when nothing is missing."""
    wanted = list(
        dict.fromkeys(finding.install for finding in findings if finding.install is not None and finding.state == "bad")
    )
    return f"pip install {' '.join(wanted)}" if wanted else ""


def versions() -> Iterator[Finding]:
    """Each package against the tested sets."""
    for package in TESTED:
        have = installed(package)
        text, replacement = judge(package, have)
        if replacement is not None:
            yield Finding(package, "bad", text, f"{package}=={replacement}")
        else:
            yield Finding(package, "note" if "newer" in text else "ok", text)


def gpu() -> Finding:
    """The accelerators that torch sees."""
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else "; this torch is built without CUDA"
        return Finding("gpu", "note", f"none: runs take place on the CPU, {os.cpu_count()} cores{built}")
    found = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
    names = ", ".join(f"{each.name} {each.total_memory / 2**30:.0f} GiB, sm{each.major}{each.minor}" for each in found)
    return Finding("gpu", "ok", f"{len(found)}: {names}; CUDA {torch.version.cuda}")


def attention() -> Finding:
    """The attention implementation that `auto` means here."""
    from aligntune.models.kernels.attention import resolve_attention
    from aligntune.models.precision import device

    name, why = resolve_attention("auto", device())
    return Finding("attention", "ok", f"{name} ({why})")


def triton() -> Finding:
    """Whether Triton, which the fast kernels are written in, is there where a GPU is."""
    import torch

    if not torch.cuda.is_available():
        return Finding("kernels", "ok", "plain torch on the CPU")
    if find_spec("triton") is None:
        return Finding("kernels", "note", "triton is missing: plain torch kernels are used", "triton")
    return Finding("kernels", "ok", f"triton {installed('triton')}")


def extras() -> Finding:
    """Which optional parts are installed."""
    have = [name for name, modules in EXTRAS.items() if all(find_spec(module) is not None for module in modules)]
    absent = [name for name in EXTRAS if name not in have]
    return Finding("extras", "ok", f"{', '.join(have) or 'none'}; not installed: {', '.join(absent) or 'none'}")


def hub() -> Finding:
    """Whether the model hub answers."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return Finding("hub", "note", "HF_HUB_OFFLINE is set: only local models and data")
    begin = time.monotonic()
    try:
        with urllib.request.urlopen(urllib.request.Request(HUB, method="HEAD"), timeout=HUB_SECONDS):
            return Finding("hub", "ok", f"{HUB} answers in {time.monotonic() - begin:.1f} s")
    except (OSError, urllib.error.URLError) as error:
        return Finding(
            "hub", "note", f"{HUB} does not answer ({getattr(error, 'reason', error)}): only local models and data"
        )


def disk(folder: Path) -> Finding:
    """How fast, and whether at all, a run could be written."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    block = os.urandom(2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=nearest) as file:
            begin = time.monotonic()
            for _ in range(WRITTEN_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN_MIB / (time.monotonic() - begin)
    except OSError as error:
        return Finding("disk", "bad", f"{nearest} cannot be written ({error.strerror})")
    free = shutil.disk_usage(nearest).free / 2**30
    return Finding("disk", "ok" if free > 5 else "note", f"{nearest}: {speed:,.0f} MiB/s, {free:,.0f} GiB free")


def smoke_run() -> Finding:
    """Twenty steps of fine-tuning a small model, on this machine's device, through the whole of a run."""
    begin = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as name:
            losses = _train(Path(name))
    except AlignTuneError as error:
        return Finding("smoke run", "bad", str(error))
    except Exception as error:  # noqa: BLE001  (a diagnosis reports whatever breaks)
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Finding("smoke run", "bad", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})")
    text = f"{STEPS} steps in {time.monotonic() - begin:.0f} s, loss {losses[0]:.2f} to {losses[-1]:.2f}"
    return Finding("smoke run", "ok" if losses[-1] < losses[0] else "bad", text)


def _train(folder: Path) -> list[float]:
    """Losses of a run in `folder`, of a small random model."""
    import contextlib
    import io

    from aligntune.api import create_sft_trainer
    from aligntune.trainers.quiet import quiet_libraries

    quiet_libraries()
    model = _random_model(folder / "model")
    rows = folder / "rows.jsonl"
    rows.write_text('{"text": "one two three four five six seven"}\n' * 16, encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = create_sft_trainer(
            str(model), str(rows), task_type="text_generation", max_steps=STEPS, learning_rate=5e-3, per_device_batch_size=4,
            output_dir=str(folder / "run"), log_interval=1, save_strategy="no", loggers="none", max_seq_length=64,
            backend="native",
        )  # fmt: skip
        trainer.train()
    return [row["loss"] for row in trainer.directory.metrics.rows() if row["split"] == "train"]


def _random_model(folder: Path) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {
        token: place for place, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(vocabulary), eos_token_id=1, pad_token_id=0, bos_token_id=None, **settings)
    ).save_pretrained(folder)
    return folder


def _absent(reason: str | None) -> tuple[Literal["ok", "note"], str]:
    return ("ok", "can run here") if reason is None else ("note", reason)
