"""Training of the metric ``foresight``: Golden Eviction on calibration texts, distilled into a small network per head.

After ForesightKV (arXiv 2602.03203), its supervised half. For each text and layer:

1. The future of each cell is known: what the rest of the text takes from it, and what the answers to the questions take
   from it, both as the oracle's importance ||A v W_O||.
2. Golden Eviction reads the text in steps. Where a head then has more cells than it may keep, those with the least
   future go. What the head held before each step is one example: its cells, and their future. The whole text is another.
3. The network of the head learns to order the cells of an example by their future, from pairs of cells.

The model passes layer by layer, as for a profile, and nothing is kept of a layer but its networks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from lukv_gguf import defaults, oracle
from lukv_gguf.answers import decode_answers
from lukv_gguf.checkpoint import Checkpoint, model_identity
from lukv_gguf.collect import plain_keys
from lukv_gguf.errors import LukvError
from lukv_gguf.gguf_header import read_header
from lukv_gguf.metrics import LayerState
from lukv_gguf.metrics.foresight import Foresight, network
from lukv_gguf.oracle import ResidualStreams
from lukv_gguf.profile import Progress, Protocol, _silent, _tokenize, default_dtype, find_device
from lukv_gguf.reference import ReferenceModel, Tokenizer
from lukv_gguf.reference.model import _Layer as Layer
from lukv_gguf.scorer import ARRAYS, FEATURES, Scorer

BLOCK = 64  # queries of the text whose attention is averaged
_LOSSES = ("mass", "hinge")
_MARGIN = 0.01
_WARMUP = 10
_MAX_NORM = 1.0


@dataclass(frozen=True)
class Training:
    """How scorers are trained.

    Attributes
    ----------
    n_hidden : int
        Hidden units of a network.
    n_step : int
        Steps of Adam for each layer; each sees one example, chosen at random.
    n_cell : int
        Cells of the example that are compared with each other.
    learning_rate, weight_decay : float
        The rate rises over the first steps and falls as a cosine.
    loss : str
        ``mass``: log(1 + exp(s_j - s_i)) for each pair with futures y_i > y_j, weighed by y_i - y_j. ``hinge``: the
        paper's max(0, 0.01 + s_j - s_i), all pairs alike.
    ratio : float
        Kept fraction of Golden Eviction.
    n_trace : int
        Steps in which it reads a text.
    window, kernel : int
        Parameters of the metric.
    seed : int
        Of the first weights, and of all choices.

    Raises
    ------
    LukvError
        A value that makes no sense.
    """

    n_hidden: int = 16
    n_step: int = 600
    n_cell: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    loss: str = "mass"
    ratio: float = defaults.RATIO
    n_trace: int = 8
    window: int = 32
    kernel: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.n_hidden, self.n_step, self.n_cell - 1, self.n_trace, self.window, self.kernel) < 1:
            raise LukvError("hidden units, steps, traces, window and kernel must be 1 or more, cells 2 or more")
        if not 0.0 < self.ratio <= 1.0 or not self.learning_rate > 0.0 or not self.weight_decay >= 0.0:
            raise LukvError("the ratio of Golden Eviction must be in (0, 1], the learning rate above 0")
        if self.loss not in _LOSSES:
            raise LukvError(f"unknown loss {self.loss!r}; known: {', '.join(_LOSSES)}")


@dataclass(frozen=True)
class Example:
    """Cells of each head at one time.

    Attributes
    ----------
    inputs : Tensor [H, n, F + d_key + d_value]
        See `Foresight.inputs`.
    future : Tensor [H, n]
        What is still to be taken from each cell, as a share of the head's.
    """

    inputs: Tensor
    future: Tensor


def train_scorer(
    path: str | Path,
    texts: Sequence[tuple[str, Sequence[str]]],
    training: Training | None = None,
    protocol: Protocol | None = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    start_over: bool = False,
) -> Scorer:
    """Train the scorers of a model on texts, each with questions about it.

    Parameters
    ----------
    path
        The GGUF file.
    texts
        Contexts and their questions; what exceeds the protocol's length is cut off.
    training, protocol
        By default `Training()` and `Protocol()`.
    device
        Where torch computes.
    progress
        Called with the name of a stage, steps done, and steps in all.
    checkpoint
        A folder that keeps what is done, so that the same call goes on from there after an interruption. Remove it with
        `checkpoint.discard_folder`.
    start_over
        Drop a checkpoint of another call instead of raising.

    Raises
    ------
    LukvError
        The model cannot be read or is not supported, or a text is too short.

    References
    ----------
    Dong et al., "ForesightKV", arXiv 2602.03203: Golden Eviction, pairwise ranking loss.
    """
    training, protocol, tell = training or Training(), protocol or Protocol(), progress or _silent
    place = find_device(device)
    dtype = default_dtype(place)
    metric = Foresight(window=training.window, kernel=training.kernel)
    tell("load", 0, 1)
    model = ReferenceModel.load(path, dtype=dtype, device=place, stream=True)
    with Tokenizer(path) as tokenizer:
        prompts = [
            _tokenize(tokenizer, model, context, questions[: protocol.n_query], protocol) for context, questions in texts
        ]
        end_tokens = tokenizer.end_tokens
    for prefix, _ in prompts:
        if len(prefix) < max(2 * BLOCK, protocol.sink + protocol.recent + training.window + 2):
            raise LukvError(f"a text of {len(prefix)} tokens is too short to train on")
    tell("load", 1, 1)

    key = _key(path, prompts, training, protocol, dtype)
    saved = Checkpoint(checkpoint, key, start_over) if checkpoint is not None else None
    answers = _answers(path, model, prompts, end_tokens, protocol, tell, saved)
    done, start = saved.layers() if saved is not None else ([], None)
    layers = list(done)
    for i, traces in enumerate(_measure(model, prompts, answers, training, protocol, metric, start), len(done)):
        tell("train", i, model.config.n_layer)
        arrays = train_layer(traces.examples, training, protocol, i)
        layers.append(arrays)
        if saved is not None:
            saved.save_layer(arrays, traces.streams)
    tell("train", model.config.n_layer, model.config.n_layer)
    return Scorer(
        **{name: np.stack([layer[name] for layer in layers]) for name in ARRAYS},
        d_key=model.config.d_key,
        params=metric.params,
        provenance={
            "trained_model": str(read_header(path).value("general.name") or Path(path).stem),
            "architecture": model.config.family.architecture,
            "weights": str(dtype).removeprefix("torch."),
            "texts": str(len(prompts)),
            "texts_sha256": hashlib.sha256(json.dumps([[c, list(q)] for c, q in texts]).encode()).hexdigest()[:16],
            "tokens": str(sum(len(prefix) for prefix, _ in prompts)),
            "questions": str(sum(len(suffixes) for _, suffixes in prompts)),
            **{name: str(value) for name, value in asdict(training).items() if name not in metric.params},
        },
    )


def _key(path: str | Path, prompts: list, training: Training, protocol: Protocol, dtype: torch.dtype) -> str:
    """A hash of all that the weights depend on."""
    description = [*model_identity(path), str(dtype), prompts, asdict(training), asdict(protocol)]
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()


def _answers(
    path: str | Path, model: ReferenceModel, prompts: list, end_tokens: frozenset[int], protocol: Protocol,
    tell: Progress, saved: Checkpoint | None,
) -> list[list[list[int]]]:  # fmt: skip
    """What the model answers to the questions of each text."""
    flat = saved.answers() if saved is not None else None
    if flat is None:
        n_ctx = model.config.rope.n_context_original + 1 if model.has_long_rope else 0
        flat = []
        for i, (prefix, suffixes) in enumerate(prompts):
            flat += decode_answers(
                path, prefix, suffixes, protocol.max_new_tokens, end_tokens=end_tokens, n_ctx=n_ctx,
                progress=lambda done, total, i=i: tell("answer", i * total + done, len(prompts) * total),
            )  # fmt: skip
        if saved is not None:
            saved.save_answers(flat)
    rest = iter(flat)
    return [[next(rest) for _ in suffixes] for _, suffixes in prompts]


@dataclass(frozen=True)
class _Traces:
    """The examples of one layer, and the residual streams behind it: those of all texts, one after the other."""

    examples: list[Example]
    streams: ResidualStreams


@dataclass(frozen=True)
class _TextState(LayerState):
    """A layer's state after a text, and what blocks of the text take from each cell: [n_block, H, T]."""

    blocks: Tensor | None = None


def _measure(
    model: ReferenceModel, prompts: list, answers: list[list[list[int]]], training: Training, protocol: Protocol,
    metric: Foresight, start: ResidualStreams | None,
) -> Iterator[_Traces]:  # fmt: skip
    """Carry all texts through one layer after the other."""
    starts: list[ResidualStreams | None] = [None] * len(prompts)
    if start is not None:
        lengths = [
            (len(prefix), sum(len(s) + max(0, min(protocol.max_new_tokens, len(a) + 1) - 1) for s, a in zip(suffixes, found)))
            for (prefix, suffixes), found in zip(prompts, answers)
        ]
        parts = zip(*(t.to(model.device).split(sizes) for t, sizes in zip((start.prefix, start.queries), map(list, zip(*lengths)))))
        starts = [ResidualStreams(start.layer, *part) for part in parts]
    passes = [
        oracle.teacher_force(
            model, prefix, suffixes, found, protocol.max_new_tokens, objective=protocol.objective, group=protocol.group,
            collector=_BlockCollector(protocol.sink, protocol.recent, protocol.group), start=at,
        )
        for (prefix, suffixes), found, at in zip(prompts, answers, starts)
    ]  # fmt: skip
    for measured in zip(*passes):
        examples = [e for text in measured for e in golden_eviction(text.state, text.importance, metric, training)]
        streams = [text.streams for text in measured]
        yield _Traces(
            examples,
            ResidualStreams(streams[0].layer, torch.cat([s.prefix for s in streams]), torch.cat([s.queries for s in streams])),
        )


@dataclass(frozen=True)
class _BlockCollector:
    """Takes the whole layer, and what each block of the text takes from the cells before it."""

    sink: int
    recent: int
    group: oracle.Group

    @torch.inference_mode()
    def __call__(self, model: ReferenceModel, index: int, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> _TextState:
        n_token = q.shape[1]
        norms = oracle._value_norms(v, model._output_weight(layer))
        position = torch.arange(n_token, device=q.device)
        repeated = k.repeat_interleave(model.config.n_group, 0)
        blocks = []
        for part in position.split(BLOCK):
            attention = model._attention_weights(layer, q[:, part], repeated, part, position).mean(dim=1)
            blocks.append(oracle._contribution(attention.view(1, *norms.shape), norms, self.group)[0])
        return _TextState(
            keys=k, values=v, plain_keys=plain_keys(layer, k, position), queries=q, layer=index,
            sink=self.sink, recent=self.recent, attention_scale=model.config.attention_scale,
            attention_cap=model.config.attention_cap, blocks=torch.stack(blocks),
        )  # fmt: skip


@torch.inference_mode()
def golden_eviction(state: _TextState, importance: Tensor, metric: Foresight, training: Training) -> list[Example]:
    """Read a text of T tokens in steps, and evict what has the least future.

    Parameters
    ----------
    state
        A layer after the whole text.
    importance : Tensor [Q, H, T]
        What the answers to each question take from the cells.

    Returns
    -------
    list of Example
        What each head held before each step that evicted, and all cells at the end of the text.
    """
    assert state.blocks is not None and state.queries is not None
    n_head_kv, n_token, _ = state.keys.shape
    n_group = len(state.queries) // n_head_kv
    n_keep = max(2, round(training.ratio * n_token))
    size = max(1, round(n_token / training.n_trace / BLOCK)) * BLOCK
    kept = [torch.empty(0, dtype=torch.long, device=state.keys.device)] * n_head_kv
    examples = []
    for end in range(size, n_token - BLOCK, size):
        new = torch.arange(end - size, end, device=state.keys.device)
        cells = [torch.cat([old, new]) for old in kept]
        if len(cells[0]) <= n_keep:
            kept = cells
            continue
        rest = state.blocks[end // BLOCK :].amax(dim=0)
        future = torch.stack([_future(rest[h, i], importance[:, h, i]) for h, i in enumerate(cells)])
        inputs = [
            metric.inputs(_cells_of(state, h, i, end, n_group, training.window)) for h, i in enumerate(cells)
        ]
        examples.append(Example(torch.cat(inputs), future))
        kept = [i[f.topk(n_keep).indices.sort().values] for i, f in zip(cells, future)]
    every = torch.arange(n_token, device=state.keys.device)
    inputs = [metric.inputs(_cells_of(state, h, every, n_token, n_group, training.window)) for h in range(n_head_kv)]
    future = torch.stack([_future(None, importance[:, h]) for h in range(n_head_kv)])
    return [*examples, Example(torch.cat(inputs), future)]


def _future(rest: Tensor | None, importance: Tensor) -> Tensor:
    """Shares of the future of n cells: half for the rest of the text [n], half for the questions [Q, n]."""
    questions = _shares(importance).mean(dim=0)
    return questions if rest is None else (questions + _shares(rest)) / 2


def _shares(t: Tensor) -> Tensor:
    return t / t.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def _cells_of(state: _TextState, head: int, cells: Tensor, end: int, n_group: int, window: int) -> LayerState:
    """What the metric sees of some cells of a head when the text has been read up to `end`."""
    assert state.values is not None and state.plain_keys is not None and state.queries is not None
    group = slice(head * n_group, (head + 1) * n_group)
    return LayerState(
        keys=state.keys[head, cells][None],
        values=state.values[head, cells][None],
        plain_keys=state.plain_keys[head, cells][None],
        queries=state.queries[group, max(0, end - window) : end],
        positions=cells,
        n_past=end,
        layer=state.layer,
        head=head,
        sink=state.sink,
        recent=state.recent,
        attention_scale=state.attention_scale,
        attention_cap=state.attention_cap,
    )


def train_layer(examples: Sequence[Example], training: Training, protocol: Protocol, layer: int) -> dict[str, np.ndarray]:
    """The networks of one layer's heads, as the arrays of a `Scorer` without their first dimension.

    Protected cells take no part.
    """
    random = torch.Generator().manual_seed(training.seed * 1_000_003 + layer)
    n_head_kv, _, n_input = examples[0].inputs.shape
    device, n_feature = examples[0].inputs.device, len(FEATURES)
    competing = [(protocol.sink, example.inputs.shape[1] - protocol.recent) for example in examples]
    seen = torch.cat([e.inputs[:, a:b, :n_feature] for e, (a, b) in zip(examples, competing)], dim=1)
    mean, deviation = seen.mean(dim=1), seen.std(dim=1).clamp(min=1e-3)

    def start(*shape: int, fan: int) -> Tensor:
        return (torch.randn(n_head_kv, *shape, generator=random) / fan**0.5).to(device).requires_grad_()

    n_hidden = training.n_hidden
    weights = [
        start(n_hidden, n_input, fan=n_input),
        torch.zeros(n_head_kv, n_hidden, device=device, requires_grad=True),
        start(n_hidden, fan=n_hidden),
        torch.zeros(n_head_kv, n_feature, device=device, requires_grad=True),
    ]
    optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(training.n_step))
    for _ in range(training.n_step):
        at = int(torch.randint(len(examples), (1,), generator=random))
        first, last = competing[at]
        chosen = first + torch.randperm(last - first, generator=random)[: training.n_cell]
        inputs, future = examples[at].inputs[:, chosen].clone(), examples[at].future[:, chosen].clone()
        inputs[..., :n_feature] = (inputs[..., :n_feature] - mean[:, None]) / deviation[:, None]
        loss = ranking_loss(network(*weights, inputs), future, training.loss)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, _MAX_NORM)
        optimizer.step()
        schedule.step()
    weight, bias, output, skip = (t.detach() for t in weights)
    # the features as they are: their mean and deviation become part of the weights
    scaled = weight[..., :n_feature] / deviation[:, None]
    bias = bias - (scaled @ mean[..., None])[..., 0]
    found = torch.cat([scaled, weight[..., n_feature:]], dim=-1), bias, output, skip / deviation
    return {name: t.cpu().numpy() for name, t in zip(ARRAYS, found)}


def ranking_loss(scores: Tensor, future: Tensor, loss: str) -> Tensor:
    """Sum over heads of the mean over pairs of cells, scores and future [H, n]; see `Training`."""
    ahead = (future[:, :, None] - future[:, None]).clamp(min=0.0)
    behind = scores[:, None] - scores[:, :, None]
    if loss == "hinge":
        weights, costs = (ahead > 0).to(scores.dtype), (_MARGIN + behind).clamp(min=0.0)
    else:
        weights, costs = ahead, softplus(behind)
    return ((weights * costs).sum(dim=(1, 2)) / weights.sum(dim=(1, 2)).clamp(min=1e-30)).sum()


def _rate(n_step: int) -> Callable[[int], float]:
    def rate(step: int) -> float:
        if step < _WARMUP:
            return (step + 1) / _WARMUP
        return 0.5 * (1.0 + np.cos(np.pi * (step - _WARMUP) / max(1, n_step - _WARMUP)))

    return rate
