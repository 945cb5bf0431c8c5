"""A model in, a model with its budgets out: check, profile, solve, embed."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from lukv_gguf import __version__, calibration, defaults, metadata
from lukv_gguf.errors import LukvError
from lukv_gguf.gguf_header import GgufHeader, check_writable, missing_shards, name_beside, read_header
from lukv_gguf.metadata import LukvMetadata

if TYPE_CHECKING:
    from lukv_gguf.profile import Profile

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""

EMBEDDED_SUFFIX = "-lukv"
STRIPPED_SUFFIX = "-stripped"
WRITE_STAGE = "write"
_N_RATIOS = 99
_OTHER_KEYS_BYTES = 64 << 10


def default_output(model: str | PathLike[str]) -> Path:
    """Where an embedded model goes: ``MODEL-lukv.gguf`` beside ``MODEL.gguf``."""
    return name_beside(model, EMBEDDED_SUFFIX)


def default_stripped_output(model: str | PathLike[str]) -> Path:
    """Where a stripped model goes: ``MODEL-stripped.gguf`` beside ``MODEL.gguf`` or ``MODEL-lukv.gguf``."""
    embedded = name_beside(model, EMBEDDED_SUFFIX)
    stem, _, tail = embedded.name.rpartition(EMBEDDED_SUFFIX)
    return embedded.with_name(f"{stem}{STRIPPED_SUFFIX}{tail}")


def embed_model(
    model: str | PathLike[str],
    output: str | PathLike[str] | None = None,
    *,
    ratio: float = defaults.RATIO,
    policy: str = defaults.POLICY,
    metric: str = defaults.METRIC,
    floor: float = defaults.FLOOR,
    blend: float = defaults.BLEND,
    sink: int = defaults.SINK,
    recent: int = defaults.RECENT,
    objective: str = defaults.OBJECTIVE,
    calibration_text: tuple[str, list[str]] | None = None,
    overwrite: bool = False,
    progress: StageProgress | None = None,
) -> LukvMetadata:
    """Profile a model, solve its budgets, and write a copy that carries them.

    Everything that can be checked without the profile is checked before it.

    Parameters
    ----------
    model : a GGUF file; of a split model, its first shard.
    output : the copy; by default :func:`default_output`.
    ratio : kept fraction of the whole KV cache, in (0, 1].
    policy : ``capacity`` or ``prefill``.
    metric : name of the intra-head metric.
    floor : kept fraction that no head falls below, at most `ratio`.
    blend : share of uniform budgets mixed in, in [0, 1].
    sink, recent : tokens never evicted at the start and at the end.
    objective : ``relative`` or ``paper``, the importance that is minimised.
    calibration_text : context and questions; by default those that ship with the package.
    overwrite : replace an existing `output`; one that carries a LU-KV table is always replaced.
    progress : called with (stage, steps done, steps in all).

    Returns
    -------
    LukvMetadata
        What was embedded.

    Raises
    ------
    LukvError
        A parameter or the model is unusable, or the output cannot be written.
    """
    header = read_header(model)
    output = default_output(model) if output is None else Path(output)
    if not 0.0 < ratio <= 1.0:
        raise LukvError(f"ratio must be in (0, 1], is {ratio}")
    if not 0.0 <= floor <= ratio:
        raise LukvError(f"floor must be in [0, ratio], is {floor} with ratio {ratio}")
    if not 0.0 <= blend <= 1.0:
        raise LukvError(f"blend must be in [0, 1], is {blend}")
    if policy not in metadata.POLICIES:
        raise LukvError(f"policy must be {' or '.join(metadata.POLICIES)}, is {policy!r}")
    _check_output(header, output, overwrite)
    context, questions = calibration_text or calibration.load_default()

    from lukv_gguf.profile import profile_model  # torch: slow to import, and not needed for the checks

    profile = profile_model(
        model,
        context=context,
        questions=questions,
        metric=metric,
        metric_params=None,
        sink=sink,
        recent=recent,
        objective=objective,
        progress=progress,
    )
    meta = build_metadata(profile, ratio=ratio, policy=policy, floor=floor, blend=blend)
    metadata.embed(model, output, meta, lambda done, total: progress and progress(WRITE_STAGE, done, total))
    return meta


def build_metadata(
    profile: Profile,
    *,
    ratio: float = defaults.RATIO,
    policy: str = defaults.POLICY,
    floor: float = defaults.FLOOR,
    blend: float = defaults.BLEND,
) -> LukvMetadata:
    """The record to embed for a profile; parameters as in :func:`embed_model`."""
    return LukvMetadata(
        ratio=ratio,
        metric=profile.metric,
        metric_params=profile.metric_params,
        sink=profile.sink,
        recent=profile.recent,
        policy=policy,
        budget=profile.budget_at(ratio, floor, blend),
        profile_ratios=profile.ratios,
        profile_budget=profile.budgets(floor, blend),
        provenance={
            "tool": f"lukv-gguf {__version__}",
            "date": datetime.date.today().isoformat(),
            **profile.provenance,
            "floor": str(floor),
            "blend": str(blend),
        },
    )


def strip_model(
    model: str | PathLike[str],
    output: str | PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    progress: StageProgress | None = None,
) -> Path:
    """Write a copy without a LU-KV table, by default to :func:`default_stripped_output`, and return its path.

    Raises
    ------
    LukvError
        `output` exists and `overwrite` is false, there is no table, or a file cannot be read or written.
    """
    read_header(model)  # first of all, whether there is such a model
    output = default_stripped_output(model) if output is None else Path(output)
    if output.exists() and not overwrite:
        raise LukvError(f"{output}: exists; overwrite it with -f or choose another name with -o")
    metadata.strip(model, output, lambda done, total: progress and progress(WRITE_STAGE, done, total))
    return output


def _check_output(header: GgufHeader, output: Path, overwrite: bool) -> None:
    n_layer, n_head_kv = metadata.model_shape(header)
    missing_shards(header, output)
    check_writable(output, header.file_size + 4 * (_N_RATIOS + 1) * n_layer * n_head_kv + _OTHER_KEYS_BYTES)
    if output.exists() and not overwrite and not _has_table(output):
        raise LukvError(f"{output}: exists; overwrite it with -f or choose another name with -o")


def _has_table(path: Path) -> bool:
    try:
        return any(key.startswith(metadata.PREFIX) for key in read_header(path).pairs)
    except LukvError:
        return False
