"""A model in, a model with its budgets out: check, profile, solve, embed."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lukv_gguf import __version__, calibration, defaults, metadata
from lukv_gguf import scorer as scorer_module
from lukv_gguf.errors import LukvError
from lukv_gguf.gguf_header import GgufHeader, check_writable, missing_shards, name_beside, read_header
from lukv_gguf.metadata import LukvMetadata
from lukv_gguf.scorer import Scorer, load_scorer

if TYPE_CHECKING:
    from lukv_gguf.metrics import Metric
    from lukv_gguf.profile_file import Profile

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


def checkpoint_folder(output: Path) -> Path:
    """Where an interrupted profile waits to be taken up again: beside the output."""
    return output.with_name(f"{output.name}.partial")


def embed_model(
    model: str | PathLike[str],
    output: str | PathLike[str] | None = None,
    *,
    ratio: float = defaults.RATIO,
    policy: str = defaults.POLICY,
    metric: str | None = None,
    scorer_path: str | PathLike[str] | None = None,
    floor: float | None = None,
    blend: float | None = None,
    allocation: str = defaults.ALLOCATION,
    profile_path: str | PathLike[str] | None = None,
    calibration_text: tuple[str, list[str]] | None = None,
    overwrite: bool = False,
    progress: StageProgress | None = None,
    **protocol: Any,
) -> LukvMetadata:
    """Profile a model or take a profile, solve its budgets, and write a copy that carries them.

    Everything that can be checked without the profile is checked before it.

    Parameters
    ----------
    model : a GGUF file; of a split model, its first shard.
    output : the copy; by default :func:`default_output`.
    ratio : kept fraction of the whole KV cache, in (0, 1].
    policy : ``capacity`` or ``prefill``.
    metric : the intra-head metric, ``NAME`` or ``NAME:PARAM=VALUE:…``; by default that of the profile file, or
        `defaults.METRIC`.
    scorer_path : the scorer of a trained metric (``lukv-gguf train-scorer``), which goes into the file, too.
    floor : share of the ratio that no head falls below, in [0, 1]; by default `defaults.REFINED_FLOOR` for ``lukv`` that
        was refined, `defaults.FLOOR` for other ``lukv``, and 0 for other allocations.
    blend : share of uniform budgets mixed in, in [0, 1]; by default `defaults.BLEND` for ``lukv`` that was not refined, and
        0 otherwise.
    allocation : ``lukv``, ``uniform``, ``pyramidkv`` or ``adakv``. Only ``lukv`` and ``adakv`` need a profile.
    profile_path : a profile file, also of another quantisation of the model. Without it, the model is profiled.
    calibration_text : context and questions; by default those that ship with the package.
    overwrite : replace an existing `output`; one that carries a LU-KV table is always replaced.
    progress : called with (stage, steps done, steps in all).
    protocol : fields of :class:`lukv_gguf.profile.Protocol`, and ``device``. With a profile file, none.

    Returns
    -------
    LukvMetadata
        What was embedded.

    Raises
    ------
    LukvError
        A parameter, the profile or the model is unusable, or the output cannot be written.
    """
    header = read_header(model)
    output = default_output(model) if output is None else Path(output)
    if not 0.0 < ratio <= 1.0:
        raise LukvError(f"ratio must be in (0, 1], is {ratio}")
    for name, share in (("floor", floor), ("blend", blend)):
        if share is not None and not 0.0 <= share <= 1.0:
            raise LukvError(f"{name} must be in [0, 1], is {share}")
    if policy not in metadata.POLICIES:
        raise LukvError(f"policy must be {' or '.join(metadata.POLICIES)}, is {policy!r}")
    _check_output(header, output, overwrite)

    from lukv_gguf import metrics  # torch: slow to import, and not needed for the checks

    scorer = None if scorer_path is None else load_scorer(scorer_path)
    if metric is not None or profile_path is None:
        chosen = metrics.parse(metric or defaults.METRIC, scorer)
        metrics.require_native(chosen)

    checkpoint = profile = None
    if profile_path is not None:
        profile = _read_profile(profile_path, metric, header)
        chosen = metrics.get(profile.metric, scorer, **profile.metric_params)
        metrics.require_native(chosen)
    if policy not in chosen.policies:
        raise LukvError(f"metric {chosen.name} needs the policy {' or '.join(chosen.policies)} (--policy), not {policy}")
    if chosen.trained:
        chosen.check_model(*metadata.model_shape(header), *metadata.head_sizes(header))
    elif scorer is not None:
        raise LukvError(f"{scorer_path}: a scorer is for a trained metric, {chosen.name} is none")
    if profile is None and allocation in ("uniform", "pyramidkv"):
        profile = blank_profile(chosen, metadata.model_shape(header), protocol)
    elif profile is None:
        from lukv_gguf.profile import profile_model

        context, questions = calibration_text or calibration.load_default()
        checkpoint = checkpoint_folder(output)
        if allocation != "lukv" and protocol.get("refine") is None:
            protocol["refine"] = 0  # only the scores count
        profile = profile_model(
            model,
            context=context,
            questions=questions,
            metric=chosen.name,
            metric_params=chosen.params,
            scorer=scorer,
            progress=progress,
            checkpoint=checkpoint,
            start_over=overwrite,
            **{"refine_ratio": ratio, **protocol},
        )
    if allocation != "lukv":
        profile = profile.allocated(allocation)
    options = {"ratio": ratio, "policy": policy, "floor": floor, "blend": blend, "allocation": allocation}
    meta = build_metadata(profile, **options, scorer=scorer if chosen.trained else None)
    metadata.embed(model, output, meta, lambda done, total: progress and progress(WRITE_STAGE, done, total))
    if checkpoint is not None:
        from lukv_gguf.checkpoint import discard_folder

        discard_folder(checkpoint)
    return meta


def _read_profile(path: str | PathLike[str], metric: str | None, header: GgufHeader) -> Profile:
    from lukv_gguf import metrics
    from lukv_gguf.profile_file import choose_profile

    chosen = None if metric is None else metrics.parse(metric)
    profile = choose_profile(Path(path), None if chosen is None else chosen.name)
    if chosen is not None and ":" in metric and chosen.params != profile.metric_params:
        made_for = ":".join([profile.metric, *(f"{name}={value}" for name, value in profile.metric_params.items())])
        raise LukvError(f"{path}: made for {made_for}, not for {metric}")
    found, wanted = profile.budget.shape[1:], metadata.model_shape(header)
    if found != wanted:
        raise LukvError(
            f"{path}: made for a model of {metadata.shape_text(*found)}, "
            f"{header.path} has {metadata.shape_text(*wanted)}"
        )
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return replace(profile, provenance={**profile.provenance, "profile_sha256": digest})


def blank_profile(chosen: Metric, shape: tuple[int, int], protocol: Mapping[str, Any]) -> Profile:
    """What an allocation needs that looks at nothing but the shape (L, H): a uniform profile."""
    from lukv_gguf.profile_file import GRID_RATIOS, Profile

    return Profile(
        metric=chosen.name,
        metric_params=dict(chosen.params),
        sink=protocol.get("sink", defaults.SINK),
        recent=protocol.get("recent", defaults.RECENT),
        ratios=GRID_RATIOS,
        budget=np.broadcast_to(GRID_RATIOS[:, None, None], (len(GRID_RATIOS), *shape)).copy(),
        gap=np.full(shape, np.nan),
        provenance={},
    )


def build_metadata(
    profile: Profile,
    *,
    ratio: float = defaults.RATIO,
    policy: str = defaults.POLICY,
    floor: float | None = None,
    blend: float | None = None,
    allocation: str = defaults.ALLOCATION,
    scorer: Scorer | None = None,
) -> LukvMetadata:
    """The record to embed for a profile, with the scorer of a trained metric; parameters as in :func:`embed_model`.

    Raises
    ------
    LukvError
        The metric needs another scorer, or has none.
    """
    if profile.metric == scorer_module.METRIC:
        if scorer is None:
            raise LukvError(f"the metric {profile.metric} needs a scorer: train one with lukv-gguf train-scorer")
        if profile.provenance.get("scorer", scorer.digest) != scorer.digest:
            raise LukvError(f"the profile of {profile.metric} was made with another scorer")
    # a table that was embedded before has its floor and blend already
    is_solved = allocation == "lukv" and "allocation" not in profile.provenance
    is_refined = is_solved and "refine_steps" in profile.provenance
    if floor is None:
        floor = defaults.REFINED_FLOOR if is_refined else defaults.FLOOR if is_solved else 0.0
    if blend is None:
        blend = defaults.BLEND if is_solved and not is_refined else 0.0
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
        scorer=scorer,
        provenance={
            "tool": f"lukv-gguf {__version__}",
            "date": datetime.date.today().isoformat(),
            **profile.provenance,
            "allocation": allocation,
            "floor": str(floor),
            "blend": str(blend),
        },
    )


def profile_of(meta: LukvMetadata, model: str) -> Profile:
    """The table of an embedded model as a profile: its budgets, blended as they are, and no measurements."""
    from lukv_gguf.profile_file import Profile

    return Profile(
        metric=meta.metric,
        metric_params=meta.metric_params,
        sink=meta.sink,
        recent=meta.recent,
        ratios=meta.profile_ratios.astype(np.float64),
        budget=meta.profile_budget.astype(np.float64),
        gap=np.full(meta.budget.shape, np.nan),
        provenance={**meta.provenance, "profiled_model": model},
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
