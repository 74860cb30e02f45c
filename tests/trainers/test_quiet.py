"""Other libraries do not speak on a run's console of what a user cannot act on."""

import logging
import warnings
from pathlib import Path

import datasets
import pytest

from aligntune.config.sft import DatasetConfig
from aligntune.data import load_rows
from aligntune.errors import DataError
from aligntune.trainers.quiet import quiet_libraries


def test_a_file_that_is_no_json_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": [\n')
    datasets.utils.logging.set_verbosity_warning()
    quiet_libraries()
    logging.getLogger("datasets").addHandler(caplog.handler)
    with pytest.raises(DataError, match="line 1: not JSON"):
        load_rows(DatasetConfig(name=str(tmp_path / "bad.jsonl")), seed=0)
    logging.getLogger("datasets").removeHandler(caplog.handler)
    assert caplog.messages == []


def test_deprecations_inside_other_libraries_are_not_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        quiet_libraries()
        for module in ("transformers.modeling_utils", "peft.peft_model", "accelerate.accelerator", "mine"):
            warnings.warn_explicit("old name", FutureWarning, f"{module}.py", 1, module=module)
    assert [entry.filename for entry in shown] == ["mine.py"]
