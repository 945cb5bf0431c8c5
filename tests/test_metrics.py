"""The metrics and their registry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lukv_gguf import metrics
from lukv_gguf.errors import LukvError
from lukv_gguf.metrics import LayerState


def test_keydiff_is_minus_the_cosine_with_the_mean_direction() -> None:
    keys = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    scores = metrics.get("keydiff").score(LayerState(keys))
    assert scores.shape == (2, 50)
    for head, got in zip(keys.double().numpy(), scores.numpy()):
        unit = head / np.linalg.norm(head, axis=1, keepdims=True)
        anchor = unit.mean(axis=0)
        np.testing.assert_allclose(got, -unit @ anchor / np.linalg.norm(anchor), atol=1e-6)


def test_keydiff_keeps_the_odd_one_out() -> None:
    keys = torch.ones(1, 20, 4)
    keys[0, 7] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert metrics.get("keydiff").score(LayerState(keys)).argmax().item() == 7


def test_keydiff_does_not_see_the_length_of_keys() -> None:
    keys = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(1))
    lengths = torch.rand(1, 30, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    metric = metrics.get("keydiff")
    torch.testing.assert_close(metric.score(LayerState(keys)), metric.score(LayerState(keys * lengths)))


def test_every_metric_is_found_by_its_name() -> None:
    assert "keydiff" in metrics.names()
    for name in metrics.names():
        assert metrics.get(name).name == name


def test_unknown_names_are_told() -> None:
    with pytest.raises(LukvError, match="unknown metric 'nonsense'; known metrics: .*keydiff"):
        metrics.get("nonsense")
    with pytest.raises(LukvError, match="keydiff has no parameter window"):
        metrics.get("keydiff", window=8)
