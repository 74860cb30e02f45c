"""Other libraries' progress bars and chatter are turned off: a run has one console."""

from __future__ import annotations

import logging
import os
import warnings

import datasets
import transformers


def quiet_libraries() -> None:
    """Errors still pass; what a user can act on is said by our own messages."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises, which we say with the line
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
