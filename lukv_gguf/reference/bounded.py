"""The policies of the native cache on the reference model, head by head: what the C++ code is held to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lukv_gguf.errors import LukvError
from lukv_gguf.metrics import LayerState, Metric
from lukv_gguf.reference.model import ReferenceModel

COMMIT_EVERY = 64
"""Recent tokens that make the native cache commit while tokens are generated."""
GENERATION_SIZE = 32
"""Tokens that a batch may have to count as generation."""


class BoundedDecoder:
    """A decoder whose heads own a number of cells each.

    It computes what ``native/src/llama-kv-cache-lukv.cpp`` does, in the plainest way. Not fast: the attention of every
    head is computed on its own.

    Parameters
    ----------
    model
        The reference model.
    metric
        Ranks the cells of a head.
    n_cells : int array [n_layer, n_head_kv]
        Cells that each head owns.
    n_recent
        Room of each head for the tokens since the last commit (policy ``capacity``).
    sink, recent
        Protected tokens at the start and at the end.
    """

    def __init__(
        self,
        model: ReferenceModel,
        metric: Metric,
        n_cells: npt.NDArray[np.integer],
        *,
        n_recent: int,
        sink: int,
        recent: int,
    ) -> None:
        config = model.config
        self._model = model
        self._metric = metric
        self._n_cells = n_cells
        self._n_recent_max = n_recent
        self._protected = sink, recent
        self._n_past = 0
        self._n_recent = 0
        # keys, values and positions of each head; the last n_recent cells of all heads are the recent ones
        self._keys = [[torch.empty(0, config.d_key)] * config.n_head_kv for _ in range(config.n_layer)]
        self._values = [[torch.empty(0, config.d_value)] * config.n_head_kv for _ in range(config.n_layer)]
        self._positions = [[torch.empty(0, dtype=torch.long)] * config.n_head_kv for _ in range(config.n_layer)]

    def positions(self, layer: int, head: int) -> npt.NDArray[np.int64]:
        """Positions that a head can attend to, ascending."""
        return np.sort(self._positions[layer][head].numpy())

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], *, bounded: bool = True) -> Tensor:
        """Read the tokens of one batch (a llama.cpp ubatch), after a commit where the policy asks for one.

        Parameters
        ----------
        tokens
            At most `n_recent` of them, if bounded.
        bounded
            Policy ``capacity``. Without it nothing is evicted until `commit` is called: policy ``prefill``.

        Returns
        -------
        Tensor [len(tokens), n_vocab]
            Logits, float32.

        Raises
        ------
        LukvError
            More tokens than there is room for.
        """
        if bounded:
            if len(tokens) > self._n_recent_max:
                raise LukvError(f"{len(tokens)} tokens do not fit into {self._n_recent_max} recent cells")
            limit = self._n_recent_max
            if len(tokens) <= GENERATION_SIZE:
                limit = min(limit, COMMIT_EVERY)
            if self._n_recent and self._n_recent + len(tokens) > limit:
                self.commit()

        model = self._model
        new = torch.arange(self._n_past, self._n_past + len(tokens))
        x = model._embed(torch.tensor(tokens))
        for i, layer in enumerate(model._layers):
            q, k, v = model._project(layer, x, new)
            heads = [self._attend(i, head, q, k[:, head], v[:, head], new) for head in range(model.config.n_head_kv)]
            x = model._finish_layer(layer, x, torch.cat(heads, dim=1).flatten(1))
        self._n_past += len(tokens)
        self._n_recent += len(tokens)
        return model._to_logits(x)

    def commit(self, n_cells: npt.NDArray[np.integer] | None = None) -> None:
        """Bring every head down to its cells (or to other ones, as policy ``prefill`` does once)."""
        n_cells = self._n_cells if n_cells is None else n_cells
        for i in range(self._model.config.n_layer):
            for head in range(self._model.config.n_head_kv):
                keep = self._select(i, head, int(n_cells[i, head]))
                self._keys[i][head] = self._keys[i][head][keep]
                self._values[i][head] = self._values[i][head][keep]
                self._positions[i][head] = self._positions[i][head][keep]
        self._n_recent = 0

    def truncate(self, n_past: int) -> None:
        """Forget the tokens from `n_past` on. What was evicted does not come back."""
        self._n_recent -= min(self._n_recent, self._n_past - n_past)
        self._n_past = n_past
        for keys, values, positions in zip(self._keys, self._values, self._positions):
            for head in range(len(positions)):
                keep = positions[head] < n_past
                keys[head], values[head], positions[head] = keys[head][keep], values[head][keep], positions[head][keep]

    def _select(self, layer: int, head: int, n_cells: int) -> Tensor:
        positions = self._positions[layer][head]
        if len(positions) <= n_cells:
            return torch.arange(len(positions))
        sink, recent = self._protected
        score = self._metric.score(LayerState(keys=self._keys[layer][head][None]))[0]
        protected = (positions < sink) | (positions >= self._n_past - recent)
        # protected cells first, then by score, then the later position
        order = np.lexsort((positions.numpy(), score.numpy(), protected.numpy()))[::-1]
        return torch.from_numpy(np.sort(order[:n_cells]))

    def _attend(self, layer: int, head: int, q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
        config = self._model.config
        keys = self._keys[layer][head] = torch.cat([self._keys[layer][head], k])
        values = self._values[layer][head] = torch.cat([self._values[layer][head], v])
        positions = self._positions[layer][head] = torch.cat([self._positions[layer][head], new])
        group = q[:, head * config.n_group : (head + 1) * config.n_group].transpose(0, 1)
        scores = group @ keys.T * config.d_key**-0.5
        scores = scores.masked_fill(positions > new[:, None], float("-inf"))
        return (scores.softmax(dim=-1) @ values).transpose(0, 1)
