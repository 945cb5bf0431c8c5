"""The policies of the native cache on the reference model, head by head: what the C++ code is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lukv_gguf.collect import future_rotation, output_norms, plain_keys
from lukv_gguf.errors import LukvError
from lukv_gguf.metrics import LayerState, Metric
from lukv_gguf.reference.model import ReferenceModel, _Layer

COMMIT_EVERY = 64
"""Recent tokens that make the native cache commit while tokens are generated."""
GENERATION_SIZE = 32
"""Tokens that a batch may have to count as generation."""


@dataclass
class _Head:
    """The cells of a head in the order of their positions: keys, values, positions, and what a metric asks for.

    The last `n_recent` cells of all heads are the recent ones.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    output_norms: Tensor  # [G, n_cells]
    attention_sums: Tensor  # [G, n_cells]
    past: Tensor
    key_sum: Tensor  # [d], of all tokens up to the last commit: k / ||k||

    def select(self, keep: Tensor) -> None:
        """Keep some of the cells, by index or by mask."""
        for name in ("keys", "values", "positions", "past"):
            setattr(self, name, getattr(self, name)[keep])
        self.output_norms, self.attention_sums = self.output_norms[:, keep], self.attention_sums[:, keep]


@dataclass
class _Queries:
    """What is left of the queries of a layer: the last w [n_head, w, d], and sums over those before RoPE."""

    last: Tensor
    n: int
    sum: Tensor
    outer_sum: Tensor

    @property
    def mean(self) -> Tensor:
        return self.sum / max(self.n, 1)

    @property
    def covariance(self) -> Tensor:
        return self.outer_sum / max(self.n, 1) - self.mean[:, :, None] * self.mean[:, None]


class BoundedDecoder:
    """A decoder whose heads own a number of cells each.

    It computes what ``native/src/llama-kv-cache-lukv*.cpp`` does, in the plainest way. Not fast: the attention of every
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
        n_group = config.n_group
        self._heads = [
            [
                _Head(
                    torch.empty(0, config.d_key),
                    torch.empty(0, config.d_value),
                    torch.empty(0, dtype=torch.long),
                    torch.empty(n_group, 0),
                    torch.empty(n_group, 0),
                    torch.empty(0),
                    torch.zeros(config.d_key),
                )
                for _ in range(config.n_head_kv)
            ]
            for _ in range(config.n_layer)
        ]
        shape = config.n_head, config.d_key
        self._queries = [
            _Queries(torch.empty(config.n_head, 0, config.d_key), 0, torch.zeros(shape), torch.zeros(*shape, shape[1]))
            for _ in range(config.n_layer)
        ]

    def positions(self, layer: int, head: int) -> npt.NDArray[np.int64]:
        """Positions that a head can attend to, ascending."""
        return np.sort(self._heads[layer][head].positions.numpy())

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
            self._remember_queries(i, layer, q, new)
            norms = self._output_norms(layer, v)
            heads = [
                self._attend(i, head, q, k[:, head], v[:, head], norms[head], new) for head in range(len(norms))
            ]
            x = model._finish_layer(layer, x, torch.cat(heads, dim=1).flatten(1))
        self._n_past += len(tokens)
        self._n_recent += len(tokens)
        return model._to_logits(x)

    def commit(self, n_cells: npt.NDArray[np.integer] | None = None) -> None:
        """Bring every head down to its cells (or to other ones, as policy ``prefill`` does once)."""
        n_cells = self._n_cells if n_cells is None else n_cells
        for i in range(self._model.config.n_layer):
            for head in range(self._model.config.n_head_kv):
                cells = self._heads[i][head]
                cells.key_sum = cells.key_sum + normalize(cells.keys[len(cells.keys) - self._n_recent :], dim=-1).sum(dim=0)
                cells.select(self._select(i, head, int(n_cells[i, head])))
        self._n_recent = 0

    def truncate(self, n_past: int) -> None:
        """Forget the tokens from `n_past` on. What was evicted does not come back, and sums keep what went into them."""
        self._n_recent -= min(self._n_recent, self._n_past - n_past)
        for queries in self._queries:
            queries.last = queries.last[:, : max(0, queries.last.shape[1] - (self._n_past - n_past))]
        self._n_past = n_past
        for heads in self._heads:
            for head in heads:
                head.select(head.positions < n_past)

    def _select(self, layer: int, head: int, n_cells: int) -> Tensor:
        cells = self._heads[layer][head]
        if len(cells.positions) <= n_cells:
            return torch.arange(len(cells.positions))
        state = self._state(layer, head)
        score = self._metric.score(state)[0]
        if self._metric.needs.past:
            cells.past = self._metric.carry(state)[0]
        # protected cells first, then by score, then the later position
        order = np.lexsort((cells.positions.numpy(), score.numpy(), state.is_protected.numpy()))[::-1]
        return torch.from_numpy(np.sort(order[:n_cells]))

    def _state(self, layer: int, head: int) -> LayerState:
        """What the metric sees of one head."""
        config, needs = self._model.config, self._metric.needs
        cells, queries = self._heads[layer][head], self._queries[layer]
        group = slice(head * config.n_group, (head + 1) * config.n_group)
        sink, recent = self._protected
        rotation = plain = None
        if needs.plain_keys:
            plain = plain_keys(self._model._layers[layer], cells.keys[None], cells.positions)
        if needs.query_mean:
            rotation = future_rotation(
                self._model._layers[layer], self._n_past, needs.n_future, config.d_key, self._model.device
            )
        return LayerState(
            keys=cells.keys[None],
            values=cells.values[None],
            plain_keys=plain,
            queries=queries.last[group],
            query_mean=queries.mean[group],
            query_covariance=queries.covariance[group],
            future_rotation=rotation,
            output_norms=cells.output_norms[None],
            attention_sums=cells.attention_sums,
            key_sum=cells.key_sum[None] if needs.key_sum else None,
            past=cells.past[None],
            positions=cells.positions,
            n_past=self._n_past,
            layer=layer,
            head=head,
            sink=sink,
            recent=recent,
            attention_scale=config.attention_scale,
            attention_cap=config.attention_cap,
        )

    def _remember_queries(self, index: int, layer: _Layer, q: Tensor, new: Tensor) -> None:
        """Take from queries [n_token, n_head, d] what the metric asks for."""
        needs, queries = self._metric.needs, self._queries[index]
        last = torch.cat([queries.last, q.transpose(0, 1)], dim=1)
        queries.last = last[:, max(0, last.shape[1] - needs.window) :]
        if needs.query_mean:
            counted = new >= self._protected[0]
            plain = q if layer.rope is None else layer.rope.unrotate(q, layer.rope.at(new))
            plain = plain[counted].transpose(0, 1)
            queries.n += int(counted.sum())
            queries.sum += plain.sum(dim=1)
            queries.outer_sum += plain.mT @ plain

    def _output_norms(self, layer: _Layer, v: Tensor) -> Tensor:
        """||v W_O||_1 of the values [n_token, n_head_kv, d] if the metric asks for them: [n_head_kv, G, n_token]."""
        config = self._model.config
        if not self._metric.needs.output_norms:
            return torch.zeros(config.n_head_kv, config.n_group, len(v))
        return output_norms(v.transpose(0, 1), self._model._output_weight(layer))

    def _attend(self, layer: int, head: int, q: Tensor, k: Tensor, v: Tensor, norms: Tensor, new: Tensor) -> Tensor:
        config, cells = self._model.config, self._heads[layer][head]
        nothing = torch.zeros(config.n_group, len(new))
        cells.keys = torch.cat([cells.keys, k])
        cells.values = torch.cat([cells.values, v])
        cells.positions = torch.cat([cells.positions, new])
        cells.output_norms = torch.cat([cells.output_norms, norms], dim=1)
        cells.past = torch.cat([cells.past, nothing[0]])
        group = q[:, head * config.n_group : (head + 1) * config.n_group].transpose(0, 1)
        scores = self._model._cap(group @ cells.keys.T * config.attention_scale)
        seen = cells.positions <= new[:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        cells.attention_sums = torch.cat([cells.attention_sums, nothing], dim=1) + weights.sum(dim=1)
        return (weights @ cells.values).transpose(0, 1)


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
        self._twins: dict[int, int] = {}  # sequences without cells of their own, and the one whose cells they have
        self._quotas: dict[int, int] = {}
        self._rooms: dict[int, int] = {}
        self._stale = False

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens of each sequence that has some."""
        return {i: self._sequences[self._source(i)]._n_past for i in sorted({*self._sequences, *self._twins})}

    @property
    def twins(self) -> list[list[int]]:
        """The sequences that have the same cells, for each that is not alone."""
        return [
            [source, *(i for i in sorted(self._twins) if self._twins[i] == source)]
            for source in sorted({*self._twins.values()})
        ]

    def owned(self, sequence: int) -> npt.NDArray[np.integer]:
        """Cells that each head of a sequence may keep, int array [n_layer, n_head_kv]."""
        return self._sequences[self._source(sequence)]._n_cells

    def positions(self, sequence: int, layer: int, head: int) -> npt.NDArray[np.int64]:
        """Positions that a head can attend to, ascending."""
        if self._source(sequence) not in self._sequences:
            return np.empty(0, np.int64)
        return self._sequences[self._source(sequence)].positions(layer, head)

    def decode(self, batch: Mapping[int | tuple[int, ...], Sequence[int]]) -> dict[int | tuple[int, ...], Tensor]:
        """Read as many tokens of each of some sequences: one llama.cpp ubatch.

        A tuple stands for sequences that get the same tokens, and had the same so far.

        Returns
        -------
        dict of Tensor [tokens, n_vocab]
            Logits, float32.
        """
        groups = {key: key if isinstance(key, tuple) else (key,) for key in batch}
        self._separate(list(groups.values()))
        sources = {key: self._source(min(group)) for key, group in groups.items()}
        logits = self._decode({sources[key]: tokens for key, tokens in batch.items()})
        for key, group in groups.items():
            self._twins |= {i: sources[key] for i in group if i != sources[key]}
        return {key: logits[source] for key, source in sources.items()}

    def _decode(self, batch: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
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
                renew |= self._outgrew(i, shares[i])
        if renew:
            self._renew(batch, shares)
        else:
            for i in full:
                self._sequences[i].commit()
        return {i: self._sequences[i].decode(tokens, bounded=False) for i, tokens in batch.items()}

    def commit(self) -> None:
        """Bring every head of every sequence down to what it owns."""
        shares = self._shares({})
        if self._stale or any(self._outgrew(i, shares[i]) for i in self._sequences):
            self._renew({}, shares)
        for sequence in self._sequences.values():
            sequence.commit()

    def truncate(self, sequence: int, n_past: int) -> None:
        """Forget the tokens of a sequence from `n_past` on; all of them frees what it owned."""
        if n_past <= 0:
            others = [i for i, source in sorted(self._twins.items()) if source == sequence]
            if others:
                self._hand_over(sequence, others[0])
            elif sequence in self._twins:
                del self._twins[sequence]
            else:
                self._sequences.pop(sequence, None)
        elif n_past < self.lengths.get(sequence, 0):
            self._separate([(sequence,)])
            self._sequences[sequence].truncate(n_past)

    def keep(self, sequence: int) -> None:
        """Forget all other sequences."""
        if sequence in self._twins:
            self._hand_over(self._twins[sequence], sequence)
        self._sequences = {i: kept for i, kept in self._sequences.items() if i == sequence}
        self._twins = {}

    def copy(self, source: int, target: int) -> None:
        """Make an empty sequence a copy of another one; where there is no room, it is made with the next batch."""
        self._copy({target: self._source(source)})

    def _copy(self, sources: Mapping[int, int]) -> None:
        for target, source in sources.items():
            self._sequences[target] = self._clone(self._sequences[source])
        shares = self._shares({})
        owned, rooms = self._owned(shares), self._rooms_for(list(sources))
        for i, sequence in self._sequences.items():
            for head in np.ndindex(self._n_kept.shape):
                n_kept = len(sequence._heads[head[0]][head[1]].positions) - sequence._n_recent
                self._stale |= n_kept > owned[i][head] or sequence._n_recent > rooms[i]
        self._settle(shares, owned, rooms)

    def _source(self, sequence: int) -> int:
        return self._twins.get(sequence, sequence)

    def _separate(self, groups: Sequence[tuple[int, ...]]) -> None:
        """Give twins that are not in the same group, or not both in none, cells of their own."""
        part = {i: n for n, group in enumerate(groups) for i in group}
        owners: dict[tuple[int, int | None], int] = {}
        twins = {}
        for i, source in sorted(self._twins.items()):
            owners.setdefault((source, part.get(source)), source)
            twins[i] = owners.setdefault((source, part.get(i)), i)
        copies = {i: self._twins[i] for i, owner in twins.items() if i == owner}
        if copies:
            self._copy(copies)
        self._twins = {i: owner for i, owner in twins.items() if i != owner}

    def _hand_over(self, sequence: int, twin: int) -> None:
        """A sequence is emptied; the cells are those of one of its twins."""
        for values in (self._sequences, self._quotas, self._rooms):
            values[twin] = values.pop(sequence)
        del self._twins[twin]
        self._twins = {i: twin if source == sequence else source for i, source in self._twins.items()}

    def _shares(self, more: Mapping[int, int]) -> dict[int, int]:
        lengths = {
            i: (self._sequences[i]._n_past if i in self._sequences else 0) + more.get(i, 0) for i in {*self._sequences, *more}
        }
        total = sum(lengths.values())
        return {i: max(self._size * length // total, min(length, self._n_protected)) for i, length in lengths.items()}

    def _outgrew(self, i: int, share: int) -> bool:
        """Whether a sequence would lose cells at its quota, and its share is worth a new layout."""
        sequence = self._sequences[i]
        evicts = any(
            len(sequence._heads[layer][head].positions) > sequence._n_cells[layer, head]
            for layer, head in np.ndindex(sequence._n_cells.shape)
        )
        return evicts and self._is_worth_it(sequence._n_past, self._quotas[i], share)

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
