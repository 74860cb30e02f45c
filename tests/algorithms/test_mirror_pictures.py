"""The curves of a mirror map for the report, and the divergence under every average of the GRPO family, by hand."""

from __future__ import annotations

import pytest
import torch

from aligntune import algorithms
from aligntune.algorithms import RolloutBatch
from aligntune.algorithms.mirror_map import SIMPLE_DIVERGENCES, SIZE, MirrorMap
from aligntune.algorithms.mirror_pictures import mirror_sections
from aligntune.reporting.sections import checked
from tiny import settings_of


def test_curves_of_a_map_by_hand() -> None:
    """Only a = 2: h' = 2 y, h = y^2, D = (p - q)^2."""
    phi = torch.zeros(SIZE, dtype=torch.float64)
    phi[-2] = 2.0
    mirror = MirrorMap(phi)
    divergence, slope, potential = mirror_sections(mirror.divergence, mirror)
    for section in (divergence, slope, potential):
        checked(section["kind"], section["payload"])
    for q, curve in zip((0.1, 0.5, 0.9), divergence["payload"]["curves"], strict=True):
        assert curve["name"] == f"q = {q}"
        assert curve["y"] == pytest.approx([(p - q) ** 2 for p in curve["x"]], abs=1e-12)
    (line,) = slope["payload"]["curves"]
    assert line["y"] == pytest.approx([2 * y for y in line["x"]])
    (line,) = potential["payload"]["curves"]
    assert line["y"] == pytest.approx([y**2 - line["x"][-1] ** 2 for y in line["x"]])


def test_the_named_maps_have_a_divergence_only() -> None:
    for name, distance in SIMPLE_DIVERGENCES.items():
        found = algorithms.get("neural_mirror_grpo").sections(settings_of("neural_mirror_grpo", mirror_map=name))
        assert len(found) == 1
        y = torch.tensor([found[0]["payload"]["curves"][1]["x"][0]], dtype=torch.float64)
        expected = distance(y.log(), torch.full_like(y, 0.5).log()).item()
        assert found[0]["payload"]["curves"][1]["y"][0] == pytest.approx(expected)
    assert len(algorithms.get("neural_mirror_grpo").sections(settings_of("neural_mirror_grpo"))) == 3
    assert algorithms.get("grpo").sections(settings_of("neural_mirror_grpo")) == []


@pytest.mark.parametrize("name", ["kl", "prob_l2", "log_l2", "neural"])
@pytest.mark.parametrize(
    ("loss_type", "average"), [("grpo", (1 / 2, 1 / 6)), ("dapo", (1 / 4, 1 / 4)), ("dr_grpo", (1 / 8, 1 / 8))]
)
def test_the_divergence_is_averaged_as_the_loss_is(name: str, loss_type: str, average: tuple[float, float]) -> None:
    """Rows of 1 and 3 tokens, limit 4, no advantage: the loss is the weighted sum of the tokens' divergences."""
    p, q = torch.tensor(0.6, dtype=torch.float64).log(), torch.tensor(0.5, dtype=torch.float64).log()
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    log_probs = torch.full((2, 3), p.item(), dtype=torch.float64)
    reference = torch.full((2, 3), q.item(), dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    batch = RolloutBatch(log_probs, log_probs.clone(), mask, zero, ref_log_probs=reference)
    config = settings_of("neural_mirror_grpo", mirror_map=name, mirror_coefficient=3.0, loss_type=loss_type)
    one = (SIMPLE_DIVERGENCES | {"neural": MirrorMap.random(0).divergence})[name](p, q).item()
    found = algorithms.get("neural_mirror_grpo").loss(batch, config, batch.normalizers(4))
    assert found.value.item() == pytest.approx(3.0 * one * (average[0] + 3 * average[1]))
    assert found.metrics["mirror_divergence"].item() == pytest.approx(one)
