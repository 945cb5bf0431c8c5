"""Trained scorers of the metric ``foresight``: the record, and one self-describing file.

A scorer file is a NumPy archive (``.npz``, no pickled objects). L layers, H KV heads, n hidden units, F features and the
sizes d_key and d_value of a head:

| array | shape | meaning |
| --- | --- | --- |
| ``description`` | | JSON: format, version, features, parameters of the metric, provenance |
| ``input`` | [L, H, n, F + d_key + d_value] | weights of the features, of the key and of the value |
| ``bias`` | [L, H, n] | of the hidden units |
| ``output`` | [L, H, n] | weights of the hidden units |
| ``skip`` | [L, H, F] | weights of the features past the hidden units |
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lukv_gguf import __version__
from lukv_gguf.errors import LukvError, reading
from lukv_gguf.gguf_header import replacing

METRIC = "foresight"
"""The metric that scorers are for."""
FORMAT, VERSION = "lukv-scorer", 1
FEATURES = ("key_cosine", "key_norm", "value_norm", "attention", "attention_pooled", "attention_rms", "age")
"""What a scorer sees of a cell besides its key and value; `lukv_gguf.metrics.foresight` computes them."""
ARRAYS = ("input", "bias", "output", "skip")

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Scorer:
    """A small network for each head; see `lukv_gguf.metrics.foresight` for what it computes.

    Attributes
    ----------
    input : float32 array [L, H, n, F + d_key + d_value]
    bias, output : float32 array [L, H, n]
    skip : float32 array [L, H, F]
    d_key : int
        Size of a key; that of a value follows.
    params : mapping
        Parameters of the metric that the features were computed with.
    provenance : mapping
        How it came about.

    Raises
    ------
    LukvError
        The arrays do not fit together, or hold something that is not a number.
    """

    input: FloatArray
    bias: FloatArray
    output: FloatArray
    skip: FloatArray
    d_key: int
    params: Mapping[str, int]
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ARRAYS:
            array = np.array(getattr(self, name), dtype=np.float32)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
            if not np.isfinite(array).all():
                raise LukvError(f"scorer: {name} holds values that are not finite")
        if self.input.ndim != 4:
            raise LukvError(f"scorer: input has shape {self.input.shape}, not [L, H, n, features]")
        head, n_hidden = self.input.shape[:2], self.input.shape[2]
        wanted = {"bias": (*head, n_hidden), "output": (*head, n_hidden), "skip": (*head, len(FEATURES))}
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise LukvError(f"scorer: {name} has shape {getattr(self, name).shape}, not {shape}")
        if not n_hidden or not 0 < self.d_key < self.input.shape[3] - len(FEATURES):
            raise LukvError(f"scorer: input of shape {self.input.shape} has no room for keys of {self.d_key} and values")

    @property
    def n_hidden(self) -> int:
        """n."""
        return self.input.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the models that it is for: (L, H, d_key, d_value)."""
        return (*self.input.shape[:2], self.d_key, self.input.shape[3] - len(FEATURES) - self.d_key)

    @property
    def digest(self) -> str:
        """A hash of the weights: 16 hex digits."""
        return hashlib.sha256(b"".join(getattr(self, name).tobytes() for name in ARRAYS)).hexdigest()[:16]


def shape_text(n_layer: int, n_head_kv: int, d_key: int, d_value: int) -> str:
    """How messages name the shape of a scorer or model."""
    return f"{n_layer} layers x {n_head_kv} KV heads with keys of {d_key} and values of {d_value}"


def save_scorer(path: str | PathLike[str], scorer: Scorer) -> None:
    """Write a scorer, in place of `path` once the file is complete.

    Raises
    ------
    LukvError
        It cannot be written.
    """
    description = {
        "format": FORMAT,
        "version": VERSION,
        "features": FEATURES,
        "d_key": scorer.d_key,
        "params": dict(scorer.params),
        "provenance": {
            "trained_with": f"lukv-gguf {__version__}",
            "trained_on": datetime.date.today().isoformat(),
            **scorer.provenance,
        },
    }
    arrays = {name: getattr(scorer, name) for name in ARRAYS}
    with replacing(Path(path)) as file:
        np.savez_compressed(file, description=np.array(json.dumps(description, indent=1)), **arrays)


def load_scorer(path: str | PathLike[str]) -> Scorer:
    """Read and check a scorer file.

    Raises
    ------
    LukvError
        It cannot be read, is no scorer, is damaged, or is of a later version.
    """
    with reading(path, "scorer"), np.load(path, allow_pickle=False) as file:
        description: dict[str, Any] = json.loads(str(file["description"]))
        if description["format"] != FORMAT:
            raise ValueError("another format")
        if description["version"] != VERSION or tuple(description["features"]) != FEATURES:
            raise LukvError(f"{path}: a scorer of another version than {VERSION}: train it again")
        found = {
            **{name: file[name] for name in ARRAYS},
            "d_key": int(description["d_key"]),
            "params": {name: int(value) for name, value in description["params"].items()},
            "provenance": {name: str(value) for name, value in description["provenance"].items()},
        }
    try:
        return Scorer(**found)
    except LukvError as error:
        raise LukvError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:  # arrays that are none of numbers
        raise LukvError(f"{path}: not a scorer, or a damaged one ({error})") from None
