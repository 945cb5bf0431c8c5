"""What sets the supported families of architectures apart from each other.

Only what neither the metadata nor the tensors of a file say stands here. Biases, Q/K norms, fused projections, experts
and the like are recognised by their tensors, as llama.cpp does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lukv_gguf.errors import LukvError


@dataclass(frozen=True)
class Family:
    """One value of ``general.architecture``.

    Attributes
    ----------
    interleaved_rope : bool
        RoPE turns the pairs (0, 1), (2, 3), … (ggml's NORM) instead of (i, i + n/2) (NEOX).
    norm : str
        ``rms``, or ``layer`` for LayerNorm.
    activation : str
        Of the MLP: ``silu`` or ``gelu`` (the tanh approximation).
    parallel_mlp : bool
        Attention and MLP read the same normalised input, and both are added to the residual stream.
    scaled_embedding : bool
        Embeddings are multiplied by the square root of their width.
    multipliers : bool
        ``embedding_scale``, ``residual_scale``, ``attention.scale`` and ``logit_scale`` (a divisor) apply.
    window_period : int
        Without ``attention.sliding_window_pattern``, every layer but each n-th has a sliding window. 0: the
        architecture has no sliding windows, whatever the file says.
    window_rope : str
        RoPE of the layers with a window: ``same`` as the others', ``unscaled``, or ``own`` base and no scaling.
    no_rope_period : int
        Every n-th layer has no RoPE. 0: all have it.
    soft_caps : tuple
        Caps of the attention scores and of the logits where the file has no key; None where none is read.
    square_root_layers : int
        The depth at which attention is scaled by sqrt(n_head / n_embd) instead of 1 / sqrt(d_key).
    normalized_experts : bool
        The weights of the chosen experts are made to sum to 1.
    """

    architecture: str
    interleaved_rope: bool
    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["silu", "gelu"] = "silu"
    parallel_mlp: bool = False
    scaled_embedding: bool = False
    multipliers: bool = False
    window_period: int = 0
    window_rope: Literal["same", "unscaled", "own"] = "same"
    no_rope_period: int = 0
    soft_caps: tuple[float | None, float | None] = (None, None)
    square_root_layers: int = 0
    normalized_experts: bool = True


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("llama", interleaved_rope=True),  # also Mistral, Mixtral, SmolLM2 and others
        Family("qwen2", interleaved_rope=False),
        Family("qwen2moe", interleaved_rope=False, normalized_experts=False),
        Family("qwen3", interleaved_rope=False),
        Family("qwen3moe", interleaved_rope=False),
        Family(
            "gemma2",
            interleaved_rope=False,
            activation="gelu",
            scaled_embedding=True,
            window_period=2,
            soft_caps=(50.0, 30.0),
            square_root_layers=46,
        ),
        Family(
            "gemma3",
            interleaved_rope=False,
            activation="gelu",
            scaled_embedding=True,
            window_period=6,
            window_rope="own",
            soft_caps=(None, 0.0),
            square_root_layers=62,
        ),
        Family("phi3", interleaved_rope=False),
        Family("granite", interleaved_rope=True, multipliers=True),
        Family("starcoder2", interleaved_rope=False, norm="layer", activation="gelu"),
        Family("olmo2", interleaved_rope=False, window_period=4, window_rope="unscaled"),
        Family("smollm3", interleaved_rope=True, no_rope_period=4),
        Family("exaone", interleaved_rope=False),
        Family("command-r", interleaved_rope=True, norm="layer", parallel_mlp=True),
    )
}


def get_family(architecture: str) -> Family:
    """The family of an architecture.

    Raises
    ------
    LukvError
        It is not supported.
    """
    if architecture not in FAMILIES:
        raise LukvError(
            f"architecture {architecture!r} is not supported; supported architectures: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[architecture]
