"""The ``lukv.*`` keys of a GGUF file: one record, read, validated, written and removed.

A stock llama.cpp ignores these keys, and embedding them leaves every tensor and every other key byte-identical.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType, Keys

from lukv_gguf import scorer
from lukv_gguf.errors import LukvError
from lukv_gguf.gguf_header import ByteProgress, GgufHeader, encode_pair, read_header, rewrite
from lukv_gguf.scorer import Scorer

LAYOUT_VERSION = 1
POLICIES = ("capacity", "prefill")
MEAN_TOLERANCE = 0.01
"""How far the mean of a budget may be from its ratio."""

PREFIX = "lukv."
KEY_VERSION = "lukv.version"
KEY_ENABLED = "lukv.enabled"
KEY_RATIO = "lukv.ratio"
KEY_METRIC = "lukv.metric"
KEY_SINK = "lukv.sink"
KEY_RECENT = "lukv.recent"
KEY_POLICY = "lukv.policy"
KEY_LAYERS = "lukv.layers"
KEY_HEADS_KV = "lukv.heads_kv"
KEY_BUDGET = "lukv.budget"
KEY_PROFILE_RATIOS = "lukv.profile.ratios"
KEY_PROFILE_BUDGET = "lukv.profile.budget"
KEY_SCORER_HIDDEN = "lukv.scorer.hidden"
KEY_SCORER_D_KEY = "lukv.scorer.key_length"
PREFIX_METRIC = "lukv.metric."
PREFIX_SCORER = "lukv.scorer."
PREFIX_PROVENANCE = "lukv.provenance."

TYPES: Mapping[str, GGUFValueType] = {
    KEY_VERSION: GGUFValueType.UINT32,
    KEY_ENABLED: GGUFValueType.BOOL,
    KEY_RATIO: GGUFValueType.FLOAT32,
    KEY_METRIC: GGUFValueType.STRING,
    KEY_SINK: GGUFValueType.UINT32,
    KEY_RECENT: GGUFValueType.UINT32,
    KEY_POLICY: GGUFValueType.STRING,
    KEY_LAYERS: GGUFValueType.UINT32,
    KEY_HEADS_KV: GGUFValueType.UINT32,
    KEY_BUDGET: GGUFValueType.ARRAY,
    KEY_PROFILE_RATIOS: GGUFValueType.ARRAY,
    KEY_PROFILE_BUDGET: GGUFValueType.ARRAY,
}
"""Every key that a file must have, with its type; the arrays hold FLOAT32. Parameters of the metric are FLOAT32 or
UINT32, provenance is STRING."""
SCORER_TYPES: Mapping[str, GGUFValueType] = {
    KEY_SCORER_HIDDEN: GGUFValueType.UINT32,
    KEY_SCORER_D_KEY: GGUFValueType.UINT32,
    **{PREFIX_SCORER + name: GGUFValueType.ARRAY for name in scorer.ARRAYS},
}
"""The keys of a trained metric's scorer, all of them or none."""

_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_MAX_UINT32 = 2**32 - 1

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False, kw_only=True)
class LukvMetadata:
    """What a file says about LU-KV. A record is always valid: its constructor checks everything.

    Attributes
    ----------
    ratio : kept fraction of the whole cache that `budget` was solved for, in (0, 1].
    metric, metric_params : intra-head metric and its parameters by name (int becomes u32, float f32).
    sink, recent : tokens never evicted at the start and at the end of a sequence.
    policy : ``capacity`` or ``prefill``.
    budget : float32 [L, H], kept fraction of each layer and KV head at `ratio`; its mean is `ratio`.
    profile_ratios : float32 [n], ascending kept fractions in (0, 1].
    profile_budget : float32 [n, L, H], the budgets at each of them.
    scorer : the weights of a trained metric.
    provenance : where the profile came from, by name.
    version : layout of the keys, 1.
    enabled : whether the runtime uses the table unless told otherwise.

    Raises
    ------
    LukvError
        A value that no file may hold; the message names the key.
    """

    ratio: float
    metric: str
    sink: int
    recent: int
    policy: str
    budget: FloatArray
    profile_ratios: FloatArray
    profile_budget: FloatArray
    metric_params: Mapping[str, float | int] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    scorer: Scorer | None = None
    version: int = LAYOUT_VERSION
    enabled: bool = True

    def __post_init__(self) -> None:
        for name in ("budget", "profile_ratios", "profile_budget"):
            array = np.array(getattr(self, name), dtype=np.float32)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        object.__setattr__(self, "ratio", _as_float32(self.ratio))
        params = {k: _as_float32(v) if isinstance(v, float) else v for k, v in self.metric_params.items()}
        object.__setattr__(self, "metric_params", params)
        object.__setattr__(self, "provenance", dict(self.provenance))
        _check(self)

    @property
    def n_layer(self) -> int:
        """L."""
        return self.budget.shape[0]

    @property
    def n_head_kv(self) -> int:
        """H."""
        return self.budget.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON knows them; arrays as nested lists, with the digits that single precision has."""
        return {
            "version": self.version,
            "enabled": self.enabled,
            "ratio": self.ratio,
            "metric": self.metric,
            "metric_params": dict(self.metric_params),
            "sink": self.sink,
            "recent": self.recent,
            "policy": self.policy,
            "layers": self.n_layer,
            "heads_kv": self.n_head_kv,
            "budget": _as_lists(self.budget),
            "profile_ratios": _as_lists(self.profile_ratios),
            "profile_budget": _as_lists(self.profile_budget),
            "scorer": None if self.scorer is None else {"hidden": self.scorer.n_hidden, "digest": self.scorer.digest},
            "provenance": dict(self.provenance),
        }


def read_metadata(path: str | PathLike[str]) -> LukvMetadata | None:
    """Read and validate the ``lukv.*`` keys of a file.

    Returns
    -------
    LukvMetadata, or None if the file has no such key.

    Raises
    ------
    LukvError
        The file cannot be read, or a key is missing, of the wrong type, out of range, or does not fit the model.
    """
    header = read_header(path)
    if not any(key.startswith(PREFIX) for key in header.pairs):
        return None
    try:
        return _from_header(header)
    except LukvError as error:
        raise LukvError(f"{path}: {error}; embed the table again, or remove it with `lukv-gguf strip`") from None


def model_shape(header: GgufHeader) -> tuple[int, int]:
    """Layers and KV heads per layer, (L, H), of the model in a file.

    Raises
    ------
    LukvError
        The file does not say, or the layers differ in their number of KV heads.
    """
    arch = header.value(Keys.General.ARCHITECTURE)
    layers_key = Keys.LLM.BLOCK_COUNT.format(arch=arch)
    heads_key = Keys.Attention.HEAD_COUNT_KV.format(arch=arch)
    if heads_key not in header.pairs:  # without grouped-query attention the key may be left out
        heads_key = Keys.Attention.HEAD_COUNT.format(arch=arch)
    for key in (Keys.General.ARCHITECTURE, layers_key, heads_key):
        if key not in header.pairs:
            raise LukvError(f"{header.path}: metadata key {key} is missing: not a language model?")
    n_layer, counts = header.value(layers_key), np.unique(header.value(heads_key))
    if not isinstance(n_layer, int) or counts.dtype.kind not in "iu":
        raise LukvError(f"{header.path}: {layers_key} and {heads_key} must be integers")
    if len(counts) != 1:
        raise LukvError(f"{header.path}: {heads_key} differs from layer to layer, which is not supported")
    return n_layer, int(counts[0])


def head_sizes(header: GgufHeader) -> tuple[int, int]:
    """Sizes of a key and of a value of the model in a file, (d_key, d_value).

    Raises
    ------
    LukvError
        The file does not say.
    """
    arch = header.value(Keys.General.ARCHITECTURE)
    sizes = []
    for key in (Keys.Attention.KEY_LENGTH, Keys.Attention.VALUE_LENGTH):
        size = header.value(key.format(arch=arch))
        if size is None:
            width, heads = (header.value(k.format(arch=arch)) for k in (Keys.LLM.EMBEDDING_LENGTH, Keys.Attention.HEAD_COUNT))
            if not isinstance(width, int) or not isinstance(heads, int) or not heads:
                raise LukvError(f"{header.path}: metadata key {key.format(arch=arch)} is missing: not a language model?")
            size = width // heads
        sizes.append(int(size))
    return sizes[0], sizes[1]


def embed(
    path_in: str | PathLike[str],
    path_out: str | PathLike[str],
    meta: LukvMetadata,
    progress: ByteProgress | None = None,
    in_place_ok: bool = True,
) -> None:
    """Copy a model with `meta` as its ``lukv.*`` keys, in place of any that it has.

    Tensors and all other keys stay byte-identical. `path_out` is replaced only once the new file is complete; see
    :func:`lukv_gguf.gguf_header.rewrite` for links, split models and durability.

    Parameters
    ----------
    path_in : a GGUF file; of a split model, its first shard.
    path_out : the copy; may be `path_in`, unless `in_place_ok` is false.
    meta : what to embed.
    progress : called with (bytes written, bytes in all).

    Raises
    ------
    LukvError
        `meta` does not fit the model, the input is unusable, or the output cannot be written.
    """
    header = read_header(path_in)
    shape = model_shape(header)
    if meta.budget.shape != shape:
        ours, theirs = shape_text(*meta.budget.shape), shape_text(*shape)
        raise LukvError(f"{path_in}: {KEY_BUDGET} is for {ours}, the model has {theirs}")
    if meta.scorer is not None and meta.scorer.shape != (*shape, *head_sizes(header)):
        ours, theirs = scorer.shape_text(*meta.scorer.shape), scorer.shape_text(*shape, *head_sizes(header))
        raise LukvError(f"{path_in}: the scorer is for {ours}, the model has {theirs}")
    if not in_place_ok:
        _refuse_same_file(path_in, path_out)
    rewrite(header, path_out, lambda key: key.startswith(PREFIX), _encode(meta), progress)


def strip(path_in: str | PathLike[str], path_out: str | PathLike[str], progress: ByteProgress | None = None) -> None:
    """Copy a model without its ``lukv.*`` keys, valid or damaged; the reverse of :func:`embed`.

    Raises
    ------
    LukvError
        There is nothing to strip, the input is unusable, or the output cannot be written.
    """
    header = read_header(path_in)
    if not any(key.startswith(PREFIX) for key in header.pairs):
        raise LukvError(f"{path_in}: has no LU-KV table, nothing to strip")
    rewrite(header, path_out, lambda key: key.startswith(PREFIX), [], progress)


def _encode(meta: LukvMetadata) -> list[bytes]:
    values = {
        KEY_VERSION: meta.version,
        KEY_ENABLED: meta.enabled,
        KEY_RATIO: meta.ratio,
        KEY_METRIC: meta.metric,
        KEY_SINK: meta.sink,
        KEY_RECENT: meta.recent,
        KEY_POLICY: meta.policy,
        KEY_LAYERS: meta.n_layer,
        KEY_HEADS_KV: meta.n_head_kv,
        KEY_BUDGET: meta.budget,
        KEY_PROFILE_RATIOS: meta.profile_ratios,
        KEY_PROFILE_BUDGET: meta.profile_budget,
    }
    pairs = [encode_pair(key, value_type, values[key]) for key, value_type in TYPES.items()]
    for name, value in meta.metric_params.items():
        value_type = GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.UINT32
        pairs.append(encode_pair(PREFIX_METRIC + name, value_type, value))
    if meta.scorer is not None:
        found = {KEY_SCORER_HIDDEN: meta.scorer.n_hidden, KEY_SCORER_D_KEY: meta.scorer.d_key}
        found |= {PREFIX_SCORER + name: getattr(meta.scorer, name) for name in scorer.ARRAYS}
        pairs += [encode_pair(key, value_type, found[key]) for key, value_type in SCORER_TYPES.items()]
    for name, text in meta.provenance.items():
        pairs.append(encode_pair(PREFIX_PROVENANCE + name, GGUFValueType.STRING, text))
    return pairs


def _from_header(header: GgufHeader) -> LukvMetadata:
    values = {key: _typed_value(header, key, value_type) for key, value_type in TYPES.items()}
    # Before the shapes: another layout may have changed them.
    _check_version(values[KEY_VERSION])
    n_layer, n_head_kv = values[KEY_LAYERS], values[KEY_HEADS_KV]
    model_layers, model_heads = model_shape(header)
    _require(n_layer == model_layers, KEY_LAYERS, f"is {n_layer}, the model has {model_layers} layers")
    _require(n_head_kv == model_heads, KEY_HEADS_KV, f"is {n_head_kv}, the model has {model_heads} KV heads")
    n_ratios = len(values[KEY_PROFILE_RATIOS])
    _require(n_ratios > 0, KEY_PROFILE_RATIOS, "is empty")
    for key, shape in ((KEY_BUDGET, (n_layer, n_head_kv)), (KEY_PROFILE_BUDGET, (n_ratios, n_layer, n_head_kv))):
        size, wanted = values[key].size, math.prod(shape)
        _require(size == wanted, key, f"has {size} values, expected {wanted} ({' x '.join(map(str, shape))})")
        values[key] = values[key].reshape(shape)
    params = {}
    provenance = {}
    for key, pair in header.pairs.items():
        if key.startswith(PREFIX_METRIC):
            numeric = pair.type in (GGUFValueType.FLOAT32, GGUFValueType.UINT32)
            _require(numeric, key, f"must be of type FLOAT32 or UINT32, is {pair.type.name}")
            params[key.removeprefix(PREFIX_METRIC)] = header.value(key)
        elif key.startswith(PREFIX_PROVENANCE):
            provenance[key.removeprefix(PREFIX_PROVENANCE)] = _typed_value(header, key, GGUFValueType.STRING)
    return LukvMetadata(
        version=values[KEY_VERSION],
        enabled=values[KEY_ENABLED],
        ratio=values[KEY_RATIO],
        metric=values[KEY_METRIC],
        metric_params=params,
        sink=values[KEY_SINK],
        recent=values[KEY_RECENT],
        policy=values[KEY_POLICY],
        budget=values[KEY_BUDGET],
        profile_ratios=values[KEY_PROFILE_RATIOS],
        profile_budget=values[KEY_PROFILE_BUDGET],
        provenance=provenance,
        scorer=_scorer_from_header(header, n_layer, n_head_kv, params),
    )


def _scorer_from_header(header: GgufHeader, n_layer: int, n_head_kv: int, params: Mapping[str, Any]) -> Scorer | None:
    if not any(key.startswith(PREFIX_SCORER) for key in header.pairs):
        return None
    values = {key: _typed_value(header, key, value_type) for key, value_type in SCORER_TYPES.items()}
    n_hidden, d_key, (_, d_value) = values[KEY_SCORER_HIDDEN], values[KEY_SCORER_D_KEY], head_sizes(header)
    n_features, heads = len(scorer.FEATURES), (n_layer, n_head_kv)
    shapes = {"input": (*heads, n_hidden, n_features + d_key + d_value), "skip": (*heads, n_features)}
    arrays = {}
    for name in scorer.ARRAYS:
        key, shape = PREFIX_SCORER + name, shapes.get(name, (*heads, n_hidden))
        size, wanted = values[key].size, math.prod(shape)
        _require(size == wanted, key, f"has {size} values, expected {wanted} ({' x '.join(map(str, shape))})")
        arrays[name] = values[key].reshape(shape)
    return Scorer(**arrays, d_key=d_key, params=params)


def _typed_value(header: GgufHeader, key: str, value_type: GGUFValueType) -> Any:
    pair = header.pairs.get(key)
    if pair is None:
        raise LukvError(f"{key} is missing")
    _require(pair.type == value_type, key, f"must be of type {value_type.name}, is {pair.type.name}")
    if value_type == GGUFValueType.ARRAY:
        element = header.array_type(key)
        _require(element == GGUFValueType.FLOAT32, key, f"must hold FLOAT32, holds {element.name}")
    return header.value(key)


def _check(meta: LukvMetadata) -> None:
    _check_version(meta.version)
    _require(isinstance(meta.enabled, bool), KEY_ENABLED, f"must be true or false, is {meta.enabled!r}")
    _require(0.0 < meta.ratio <= 1.0, KEY_RATIO, f"must be in (0, 1], is {meta.ratio}")
    _require(bool(_NAME.fullmatch(meta.metric)), KEY_METRIC, f"is not a name: {meta.metric!r}")
    for key, count in ((KEY_SINK, meta.sink), (KEY_RECENT, meta.recent)):
        _require(_is_uint32(count), key, f"must be a whole number of tokens, is {count!r}")
    _require(meta.policy in POLICIES, KEY_POLICY, f"must be {' or '.join(POLICIES)}, is {meta.policy!r}")
    for name, value in meta.metric_params.items():
        key = PREFIX_METRIC + name
        _require(bool(_NAME.fullmatch(name)), key, "is not a name")
        finite = _is_uint32(value) or (isinstance(value, float) and math.isfinite(value))
        _require(finite, key, f"must be a number, is {value!r}")
    for name, text in meta.provenance.items():
        key = PREFIX_PROVENANCE + name
        _require(bool(_NAME.fullmatch(name)), key, "is not a name")
        _require(isinstance(text, str), key, f"must be text, is {text!r}")

    _require(meta.budget.ndim == 2 and meta.budget.size > 0, KEY_BUDGET, f"has shape {meta.budget.shape}, not [L, H]")
    _check_budgets(KEY_BUDGET, meta.budget[None], np.array([meta.ratio]))
    ratios = meta.profile_ratios
    _require(ratios.ndim == 1 and ratios.size > 0, KEY_PROFILE_RATIOS, "is empty")
    in_range = np.all((ratios > 0.0) & (ratios <= 1.0)) and np.all(np.diff(ratios) > 0.0)
    _require(bool(in_range), KEY_PROFILE_RATIOS, "must be ascending, in (0, 1]")
    shape = (len(ratios), *meta.budget.shape)
    found = meta.profile_budget.shape
    _require(found == shape, KEY_PROFILE_BUDGET, f"has shape {found}, not {shape}")
    _check_budgets(KEY_PROFILE_BUDGET, meta.profile_budget, ratios)


def _check_version(version: int) -> None:
    _require(version == LAYOUT_VERSION, KEY_VERSION, f"is {version}, this program knows {LAYOUT_VERSION}")


def _check_budgets(key: str, budgets: FloatArray, ratios: npt.NDArray[np.floating]) -> None:
    """Check budgets [n, L, H] against their ratios [n]."""
    valid = (budgets >= 0.0) & (budgets <= 1.0)  # false for NaN
    if not valid.all():
        *_, layer, head = where = tuple(np.argwhere(~valid)[0])
        raise LukvError(f"{key} holds {budgets[where]} for layer {layer}, head {head}; budgets are in [0, 1]")
    means = budgets.mean(axis=(1, 2), dtype=np.float64)
    far = np.flatnonzero(np.abs(means - ratios) > MEAN_TOLERANCE)
    if far.size:
        raise LukvError(f"{key} keeps {means[far[0]]:.3f} on average, far from its ratio {ratios[far[0]]:.3f}")


def _require(condition: bool, key: str, complaint: str) -> None:
    if not condition:
        raise LukvError(f"{key} {complaint}")


def _is_uint32(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_UINT32


def _as_float32(value: float) -> float:
    """The shortest decimal that single precision stores as `value`: 0.2 comes back as 0.2, not 0.20000000298."""
    return float(str(np.float32(value)))


def _as_lists(array: FloatArray) -> Any:
    return [_as_lists(row) for row in array] if array.ndim else _as_float32(array)


def shape_text(n_layer: int, n_head_kv: int) -> str:
    """How messages name a shape."""
    return f"{n_layer} layers x {n_head_kv} KV heads"


def _refuse_same_file(path_in: str | PathLike[str], path_out: str | PathLike[str]) -> None:
    if Path(path_out).exists() and os.path.samefile(path_in, path_out):
        raise LukvError(f"{path_out}: the output is the input; choose another name with -o")
