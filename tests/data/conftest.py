"""Each test has caches of its own, and no progress bars."""

from __future__ import annotations

import datasets
import pytest

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ALIGNTUNE_CACHE", str(tmp_path_factory.mktemp("tokens")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
