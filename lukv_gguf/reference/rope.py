"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from lukv_gguf.reference.config import ModelConfig


class RotaryEmbedding:
    """Turns queries and keys by their positions.

    Parameters
    ----------
    config
        Base, rotated dimensions, position scale and the pairing of the family.
    frequency_divisors : Tensor [rope_dim / 2], optional
        ``rope_freqs.weight`` of Llama 3.

    References
    ----------
    Su et al., "RoFormer", arXiv 2104.09864.
    """

    def __init__(self, config: ModelConfig, frequency_divisors: Tensor | None, device: torch.device) -> None:
        self._rope_dim = config.rope_dim
        self._interleaved = config.family.interleaved_rope
        exponents = torch.arange(0, config.rope_dim, 2, dtype=torch.float64, device=device) / config.rope_dim
        self._frequencies = config.rope_position_scale * config.rope_base**-exponents
        if frequency_divisors is not None:
            self._frequencies = self._frequencies / frequency_divisors.to(device, torch.float64)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `rotate`, computed once for all layers.

        Parameters
        ----------
        positions : int Tensor [..., n_token]

        Returns
        -------
        tuple of Tensor [..., n_token, 1, rope_dim / 2], float32
        """
        # In double precision: at position 10,000 a float32 angle is off by 1e-3.
        angles = (positions.to(torch.float64)[..., None] * self._frequencies)[..., None, :]
        return angles.cos().to(torch.float32), angles.sin().to(torch.float32)

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate the first ``rope_dim`` components of each head.

        Parameters
        ----------
        x : Tensor [..., n_token, n_head, d_head]
        rotation
            From `at`.

        Returns
        -------
        Tensor, like `x`
        """
        cos, sin = rotation
        rotated, rest = x[..., : self._rope_dim], x[..., self._rope_dim :]
        if self._interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated.chunk(2, dim=-1)
        turned = (first * cos - second * sin, first * sin + second * cos)
        joined = torch.stack(turned, dim=-1).flatten(-2) if self._interleaved else torch.cat(turned, dim=-1)
        return torch.cat((joined, rest), dim=-1) if rest.shape[-1] else joined
