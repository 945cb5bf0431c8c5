"""The policies of the native cache on the reference model, head by head: what the C++ code is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

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


class BoundedSequences:
    """Several sequences that share the cells of the native cache (policy ``capacity``).

    Parameters
    ----------
    model, metric, sink, recent
        As for `BoundedDecoder`.
    n_cells
        Cells of each head for a number of tokens, int array [n_layer, n_head_kv]: `cells_for`, with a table of budgets.
    size
        Tokens of the context, which the budgets are for.
    n_recent
        Tokens of a llama.cpp ubatch at most, a multiple of 64.
    n_sequences
        Sequences at most.
    """

    def __init__(
        self,
        model: ReferenceModel,
        metric: Metric,
        n_cells: Callable[[int], npt.NDArray[np.integer]],
        *,
        size: int,
        n_recent: int,
        n_sequences: int,
        sink: int,
        recent: int,
    ) -> None:
        self._n_cells = n_cells
        self._size = size
        self._n_recent = n_recent
        self._n_protected = sink + recent
        self._n_room = n_recent + min(n_recent, (n_sequences - 1) * COMMIT_EVERY)
        self._n_kept = np.minimum(size, n_cells(size) + (n_sequences - 1) * (sink + recent + 2))
        self._empty = BoundedDecoder(model, metric, n_cells(size), n_recent=n_recent, sink=sink, recent=recent)
        self._sequences: dict[int, BoundedDecoder] = {}
        self._quotas: dict[int, int] = {}
        self._rooms: dict[int, int] = {}
        self._stale = False

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens of each sequence that has some."""
        return {i: sequence._n_past for i, sequence in sorted(self._sequences.items())}

    def owned(self, sequence: int) -> npt.NDArray[np.integer]:
        """Cells that each head of a sequence may keep, int array [n_layer, n_head_kv]."""
        return self._sequences[sequence]._n_cells

    def positions(self, sequence: int, layer: int, head: int) -> npt.NDArray[np.int64]:
        """Positions that a head can attend to, ascending."""
        if sequence not in self._sequences:
            return np.empty(0, np.int64)
        return self._sequences[sequence].positions(layer, head)

    def decode(self, batch: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Read as many tokens of each of some sequences: one llama.cpp ubatch.

        Returns
        -------
        dict of Tensor [tokens, n_vocab]
            Logits, float32.
        """
        n = len(next(iter(batch.values())))
        shares = self._shares({i: n for i in batch})
        renew, full = self._stale, []
        for i in batch:
            sequence = self._sequences.get(i)
            if sequence is None or n > self._rooms[i]:
                renew = True
                continue
            limit = min(COMMIT_EVERY, self._rooms[i]) if n <= GENERATION_SIZE else self._rooms[i]
            if sequence._n_recent and sequence._n_recent + n > limit:
                full.append(i)
                evicts = any(
                    len(sequence._positions[layer][head]) > sequence._n_cells[layer, head]
                    for layer, head in np.ndindex(sequence._n_cells.shape)
                )
                renew |= evicts and self._is_worth_it(sequence._n_past, self._quotas[i], shares[i])
        if renew:
            self._renew(batch, shares)
        else:
            for i in full:
                self._sequences[i].commit()
        return {i: self._sequences[i].decode(tokens, bounded=False) for i, tokens in batch.items()}

    def commit(self) -> None:
        """Bring every head of every sequence down to what it owns."""
        if self._stale:
            self._renew({}, self._shares({}))
        for sequence in self._sequences.values():
            sequence.commit()

    def truncate(self, sequence: int, n_past: int) -> None:
        """Forget the tokens of a sequence from `n_past` on; all of them frees what it owned."""
        if n_past <= 0:
            self._sequences.pop(sequence, None)
        elif sequence in self._sequences and n_past < self._sequences[sequence]._n_past:
            self._sequences[sequence].truncate(n_past)

    def keep(self, sequence: int) -> None:
        """Forget all other sequences."""
        self._sequences = {i: kept for i, kept in self._sequences.items() if i == sequence}

    def copy(self, source: int, target: int) -> None:
        """Make an empty sequence a copy of another one; where there is no room, it is made with the next batch."""
        self._sequences[target] = self._clone(self._sequences[source])
        shares = self._shares({})
        owned, rooms = self._owned(shares), self._rooms_for([target])
        for i, sequence in self._sequences.items():
            for head in np.ndindex(self._n_kept.shape):
                n_kept = len(sequence._positions[head[0]][head[1]]) - sequence._n_recent
                self._stale |= n_kept > owned[i][head] or sequence._n_recent > rooms[i]
        self._settle(shares, owned, rooms)

    def _shares(self, more: Mapping[int, int]) -> dict[int, int]:
        lengths = {i: self.lengths.get(i, 0) + more.get(i, 0) for i in {*self._sequences, *more}}
        total = sum(lengths.values())
        return {i: max(self._size * length // total, min(length, self._n_protected)) for i, length in lengths.items()}

    @staticmethod
    def _is_worth_it(length: int, quota: int, share: int) -> bool:
        if share <= quota:
            return False
        return share >= quota + quota // 4 or (length > quota and (share >= length or share >= quota + quota // 20))

    def _clone(self, sequence: BoundedDecoder) -> BoundedDecoder:
        return deepcopy(sequence, {id(self._empty._model): self._empty._model})

    def _renew(self, batch: Mapping[int, Sequence[int]], shares: dict[int, int]) -> None:
        for i in batch:
            self._sequences.setdefault(i, self._clone(self._empty))
        self._settle(shares, self._owned(shares), self._rooms_for(list(batch)))
        for sequence in self._sequences.values():
            sequence.commit()
        self._stale = False

    def _settle(self, shares: dict[int, int], owned: dict[int, npt.NDArray[np.integer]], rooms: dict[int, int]) -> None:
        self._quotas, self._rooms = shares, rooms
        for i, sequence in self._sequences.items():
            sequence._n_cells = owned[i]

    def _owned(self, shares: dict[int, int]) -> dict[int, npt.NDArray[np.integer]]:
        owned = {i: self._n_cells(shares[i]).copy() for i in sorted(self._sequences)}
        for head in np.ndindex(self._n_kept.shape):
            for _ in range(sum(cells[head] for cells in owned.values()) - self._n_kept[head]):
                max(owned.values(), key=lambda cells: cells[head])[head] -= 1
        return owned

    def _rooms_for(self, batch: Sequence[int]) -> dict[int, int]:
        n_out = len(self._sequences) - len(batch)
        n_min = COMMIT_EVERY if n_out * COMMIT_EVERY <= self._n_room - self._n_recent else 0
        return {i: (self._n_room - n_out * n_min) // len(batch) if i in batch else n_min for i in self._sequences}


def cells_for(
    budget: npt.NDArray[np.floating], ratio: float, n_tokens: int, *, n_min: int
) -> npt.NDArray[np.int64]:
    """Cells of each head for a number of tokens, as the native cache gives them.

    The budgets are scaled until the sum of the cells, none below `n_min` or above `n_tokens`, is the ratio's; what is left
    of the fractions goes to the largest ones.

    Parameters
    ----------
    budget : float array [n_layer, n_head_kv]
        Kept fractions.
    ratio
        Their mean.
    n_tokens
        Tokens to be kept a part of.
    n_min
        Protected tokens.
    """
    wanted = budget.astype(np.float64) * n_tokens + 1e-3
    low, high = min(n_min, n_tokens), float(n_tokens)
    target = math.floor(float(np.float32(ratio)) * n_tokens * budget.size + 0.5)

    def sizes(scale: float) -> npt.NDArray[np.float64]:
        return np.minimum(high, np.maximum(low, scale * wanted))

    lower, upper = 0.0, 1.0
    while sizes(upper).sum() < target and upper < 1e9:
        upper *= 2
    for _ in range(100):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if sizes(middle).sum() < target else (lower, middle)
    exact = sizes(upper)
    cells = exact.astype(np.int64)
    left = target - cells.sum()
    for i in np.argsort((cells - exact).ravel(), kind="stable"):
        if left <= 0:
            break
        if cells.flat[i] < n_tokens:
            cells.flat[i] += 1
            left -= 1
    return cells
