"""KVZip: keep what the model attends to when it repeats its context."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lukv_gguf.metrics.base import LayerState, Metric, Needs


class KVZip(Metric):
    """The largest attention that a cell receives, over the group and over all tokens of a repetition of the context.

    The model is asked to repeat its context, and the context is its answer, in chunks. While a chunk is repeated, the
    softmax runs over the protected tokens at the start, the chunk and the repetition itself.

    The native cache does it when it is asked to, `lukv_gguf.runtime.kvzip`, on a context that it holds as a whole.

    Parameters: ``chunk``, tokens that are repeated at a time.

    References
    ----------
    Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416.
    """

    name = "kvzip"
    summary = "what the model attends to when it repeats its context"
    cost = "more than reading the context a second time"
    native = True
    policies: ClassVar = ("prefill",)
    defaults: ClassVar = {"chunk": 2048}
    minima: ClassVar = {"chunk": 1}

    @property
    def needs(self) -> Needs:
        return Needs(reconstruction=True, chunk=int(self.params["chunk"]))

    def score(self, state: LayerState) -> Tensor:
        assert state.reconstruction is not None
        return state.reconstruction
