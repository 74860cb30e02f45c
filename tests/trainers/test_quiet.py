"""Other libraries do not speak on a run's console of what a user cannot act on."""

import warnings

from aligntune.trainers.quiet import quiet_libraries


def test_deprecations_inside_other_libraries_are_not_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        quiet_libraries()
        for module in ("transformers.modeling_utils", "peft.peft_model", "accelerate.accelerator", "mine"):
            warnings.warn_explicit("old name", FutureWarning, f"{module}.py", 1, module=module)
    assert [entry.filename for entry in shown] == ["mine.py"]
