"""StreamingLLM: keep the latest tokens, beside the protected ones at the start."""

from __future__ import annotations

import torch
from torch import Tensor

from lukv_gguf.metrics.base import LayerState, Metric


class StreamingLLM(Metric):
    """s_j = j. The attention sinks are the protected tokens at the start; positions are not renumbered.

    References
    ----------
    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
    """

    name = "streamingllm"
    summary = "the latest tokens"
    cost = "T"
    native = True

    def score(self, state: LayerState) -> Tensor:
        return state.cell_positions.to(torch.float32).expand(state.keys.shape[0], -1)
