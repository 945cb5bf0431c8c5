"""H2O: keep the cells that have received most attention so far."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lukv_gguf.metrics.base import LayerState, Metric, Needs


class H2O(Metric):
    """Attention summed over all queries so far, mean over the group.

    Parameters: ``average`` 1 divides by the number of tokens from the cell on, whose queries could see it. The sum, the
    paper's definition, favours the early tokens, which more queries see.

    References
    ----------
    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    arXiv 2306.14048.
    """

    name = "h2o"
    summary = "the most attended cells so far (heavy hitters)"
    cost = "G T d for every token read"
    native = True
    defaults: ClassVar = {"average": 0}

    @property
    def needs(self) -> Needs:
        return Needs(attention_sums=True)

    def score(self, state: LayerState) -> Tensor:
        assert state.attention_sums is not None
        n_head_kv, n_cells, _ = state.keys.shape
        scores = state.attention_sums.to(torch.float32).view(n_head_kv, -1, n_cells).mean(dim=1)
        if self.params["average"]:
            scores = scores / (state.n_tokens - state.cell_positions)
        return scores
