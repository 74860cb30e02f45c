"""What the native backend refuses once it has seen the model."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig

from aligntune.backends.native import NativeBackend
from aligntune.errors import ConfigError
from aligntune.models import load


@pytest.mark.parametrize("asks", [False, True])
def test_a_router_loss_is_not_left_out_silently(monkeypatch: pytest.MonkeyPatch, asks: bool) -> None:
    model = SimpleNamespace(config=MixtralConfig(output_router_logits=asks))
    monkeypatch.setattr(load, "load_policy", lambda *_, **__: model)
    session: Any = SimpleNamespace(config=SimpleNamespace(model=None, train=SimpleNamespace(seed=0)), precision=None)
    if not asks:
        assert NativeBackend().load_policy(session) is model
        return
    with pytest.raises(ConfigError, match=r"output_router_logits.*backend: trl"):
        NativeBackend().load_policy(session)


def test_models_without_experts_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(config=LlamaConfig())
    monkeypatch.setattr(load, "load_policy", lambda *_, **__: model)
    session: Any = SimpleNamespace(config=SimpleNamespace(model=None, train=SimpleNamespace(seed=0)), precision=None)
    assert NativeBackend().load_policy(session) is model
