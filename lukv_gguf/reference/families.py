"""What sets the supported families of architectures apart from each other."""

from __future__ import annotations

from dataclasses import dataclass

from lukv_gguf.errors import LukvError


@dataclass(frozen=True)
class Family:
    """One value of ``general.architecture``.

    Attributes
    ----------
    interleaved_rope : bool
        RoPE turns the pairs (0, 1), (2, 3), … (ggml's NORM) instead of (i, i + n/2) (NEOX).
    qkv_bias : bool
        The query, key and value projections must have a bias; elsewhere one may be there.
    qk_norm : bool
        Queries and keys pass an RMSNorm per head before RoPE.
    """

    architecture: str
    interleaved_rope: bool
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("llama", interleaved_rope=True),  # also Mistral, SmolLM2 and others
        Family("qwen2", interleaved_rope=False, qkv_bias=True),
        Family("qwen3", interleaved_rope=False, qk_norm=True),
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
