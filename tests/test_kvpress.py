"""The metrics against kvpress's presses: the same model, the same context, the same scores or the same choice.

kvpress needs an environment of its own, so CI skips this file:

    python -m venv kvpress-env && kvpress-env/bin/pip install kvpress==0.5.5 gguf==0.19.0 pytest
    PYTHONPATH=. kvpress-env/bin/python -m pytest tests/test_kvpress.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

kvpress = pytest.importorskip("kvpress")
from tiny_gguf import write_tiny  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from lukv_gguf import metrics  # noqa: E402
from lukv_gguf.collect import Collector, reconstruct  # noqa: E402
from lukv_gguf.metrics import LayerState  # noqa: E402
from lukv_gguf.reference import ReferenceModel  # noqa: E402

N_TOKEN, SINK, WINDOW, FUTURE = 203, 4, 32, 100
RATIO = 0.5


class Peer:
    """The model in transformers, and what a press sees of each layer."""

    def __init__(self, path: Path) -> None:
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "dtype": torch.float32}
        self.model = AutoModelForCausalLM.from_pretrained(**source, attn_implementation="eager")
        self.layers = [layer.self_attn for layer in self.model.model.layers]
        for layer in self.layers:
            layer.rotary_emb = self.model.model.rotary_emb
        self.seen: dict[int, dict[str, Any]] = {}
        for layer in self.layers:
            layer.register_forward_hook(self._look, with_kwargs=True)

    def _look(self, module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.seen[module.layer_idx] = {"kwargs": kwargs, "attentions": output[1]}

    @torch.inference_mode()
    def read(self, tokens: list[int], cache: Any = None) -> Any:
        return self.model.model(torch.tensor([tokens]), past_key_values=cache).past_key_values

    @torch.inference_mode()
    def score(self, press: Any, layer: int, cache: Any) -> torch.Tensor:
        seen, cached = self.seen[layer], cache.layers[layer]
        hidden = seen["kwargs"]["hidden_states"]
        scores = press.score(
            self.layers[layer], hidden, cached.keys, cached.values, seen["attentions"], seen["kwargs"]
        )
        return scores[0]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    tiny = write_tiny(tmp_path_factory.mktemp("peer") / "tiny.gguf", n_head=6, n_head_kv=2, n_embd=80)
    tokens = np.random.default_rng(0).permutation(np.arange(3, 299))[:N_TOKEN].tolist()  # no two keys alike
    model, peer = ReferenceModel.load(tiny.path), Peer(tiny.path)
    cache = peer.read(tokens)
    needs = metrics.Needs.union(metrics.get(name).needs for name in metrics.names())
    states: list[LayerState] = []
    collector = Collector(replace(needs, window=WINDOW, n_future=FUTURE), SINK, 0)
    ours = model.prefill(tokens, observer=lambda *layer: states.append(collector(*layer)))
    return SimpleNamespace(tokens=tokens, model=model, peer=peer, cache=cache, states=states, ours=ours)


SCORES = {
    "keydiff": (kvpress.KeyDiffPress(), slice(0, None)),
    "knorm": (kvpress.KnormPress(), slice(0, None)),
    f"snapkv:window={WINDOW}:kernel=7": (kvpress.SnapKVPress(window_size=WINDOW, kernel_size=7), slice(0, -WINDOW)),
    "h2o:average=1": (kvpress.ObservedAttentionPress(), slice(0, None)),
    f"expectedattention:future={FUTURE}": (
        kvpress.ExpectedAttentionPress(n_future_positions=FUTURE, n_sink=SINK, epsilon=0.02), slice(SINK, None)),
    f"expectedattention:future={FUTURE}:covariance=0:vnorm=0": (
        kvpress.ExpectedAttentionPress(n_future_positions=FUTURE, n_sink=SINK, use_covariance=False, use_vnorm=False),
        slice(SINK, None)),
    f"capkv:future={FUTURE}": (kvpress.CapPress(n_future_positions=FUTURE, n_sink=SINK), slice(SINK, None)),
}  # fmt: skip


def test_the_models_are_the_same(setting: SimpleNamespace) -> None:
    for layer in range(3):
        torch.testing.assert_close(setting.cache.layers[layer].values[0], setting.ours.values[layer], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", SCORES)
def test_same_scores(setting: SimpleNamespace, text: str) -> None:
    press, where = SCORES[text]
    for layer, state in enumerate(setting.states):
        theirs = setting.peer.score(press, layer, setting.cache)[:, where]
        ours = metrics.parse(text).score(state)[:, where]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        agree = (ours.argsort(dim=-1) == theirs.argsort(dim=-1)).float().mean()
        assert agree > 0.95  # rounding may swap neighbours


def test_curdkv_ranks_the_same(setting: SimpleNamespace) -> None:
    """Theirs is divided by its sum over the head."""
    for layer, state in enumerate(setting.states):
        theirs = setting.peer.score(kvpress.CURPress(num_sinks=0), layer, setting.cache)
        ours = metrics.get("curdkv").score(state)
        torch.testing.assert_close(ours / ours.sum(dim=-1, keepdim=True), theirs, rtol=1e-3, atol=1e-7)


def kept(scores: torch.Tensor, first: int = 0) -> list[set[int]]:
    """What RATIO keeps of each head; of the first cells only those that score highest."""
    return [set(head.argsort(descending=True)[: int(RATIO * N_TOKEN)].tolist()) for head in scores]


def test_streamingllm_keeps_the_same(setting: SimpleNamespace) -> None:
    press = kvpress.StreamingLLMPress(compression_ratio=1 - RATIO, n_sink=SINK)
    for layer, state in enumerate(setting.states):
        ours = metrics.get("streamingllm").score(state).clone()
        ours[:, :SINK] = float("inf")
        assert kept(ours) == kept(setting.peer.score(press, layer, setting.cache))


def test_criticalkv_keeps_the_same(setting: SimpleNamespace) -> None:
    inner = kvpress.SnapKVPress(compression_ratio=1 - RATIO, window_size=WINDOW, kernel_size=5)
    press = kvpress.CriticalKVPress(inner)
    for layer in setting.peer.layers:
        layer.num_key_value_groups = 3
    for layer, state in enumerate(setting.states):
        ours = metrics.get("criticalkv-snapkv", window=WINDOW).score(replace(state, sink=0))
        for a, b in zip(kept(ours), kept(setting.peer.score(press, layer, setting.cache))):
            assert len(a - b) <= 1  # rounding, at the edge


def test_kvzip_sees_the_same(setting: SimpleNamespace) -> None:
    request, start, end = [7, 8, 9], 6, 150
    replay = Replay(request + setting.tokens[start:end], start, end)
    ours = reconstruct(setting.model, setting.ours, [replay], SINK)

    press = kvpress.KVzipPress(n_sink=SINK)
    press.context_length, press.start_idx, press.end_idx = N_TOKEN, start, end
    cache = setting.peer.read(setting.tokens)
    press.score_val = torch.zeros(3, 1, 2, N_TOKEN)
    setting.peer.read(list(replay.tokens), cache)
    for layer, seen in setting.peer.seen.items():
        module, hidden = setting.peer.layers[layer], seen["kwargs"]["hidden_states"]
        cached = cache.layers[layer]
        with torch.inference_mode():
            press.score_kvzip(module, hidden, cached.keys, cached.values, None, seen["kwargs"])
        torch.testing.assert_close(ours[layer], press.score_val[layer, 0], rtol=1e-3, atol=1e-6)
