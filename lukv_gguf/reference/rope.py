"""Rotary position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lukv_gguf.reference.config import RopeConfig

_YARN_BETA_FAST, _YARN_BETA_SLOW = 32.0, 1.0  # full turns within the original context


class RotaryEmbedding:
    """Turns queries and keys by their positions.

    Parameters
    ----------
    config
        Base, rotated dimensions and scaling.
    interleaved
        Pairs are (0, 1), (2, 3), … instead of (i, i + n/2).
    frequency_divisors : Tensor [dim / 2], optional
        ``rope_freqs.weight`` of Llama 3, or one of LongRoPE's factors.

    References
    ----------
    Su et al., "RoFormer", arXiv 2104.09864; Peng et al., "YaRN", arXiv 2309.00071.
    """

    def __init__(
        self, config: RopeConfig, interleaved: bool, frequency_divisors: Tensor | None, device: torch.device
    ) -> None:
        self._dim = config.dim
        self._interleaved = interleaved
        self._magnitude = config.attention_factor
        exponents = torch.arange(0, config.dim, 2, dtype=torch.float64) / config.dim
        frequencies = config.base**-exponents
        if frequency_divisors is not None:
            frequencies = frequencies / frequency_divisors.to("cpu", torch.float64)
        scale: Tensor | float = config.position_scale
        if config.yarn:
            kept = _yarn_kept(config)
            scale = kept + (1.0 - kept) * config.position_scale
            self._magnitude *= 1.0 - 0.1 * math.log(min(config.position_scale, 1.0))
        self._frequencies = frequencies * scale
        self._device = device

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `rotate`, computed once for all layers.

        Parameters
        ----------
        positions : int Tensor [..., n_token]

        Returns
        -------
        tuple of Tensor [..., n_token, 1, dim / 2], float32
        """
        # In double precision, which MPS lacks: at position 10,000 a float32 angle is off by 1e-3.
        angles = (positions.to("cpu", torch.float64)[..., None] * self._frequencies)[..., None, :]
        cos, sin = angles.cos() * self._magnitude, angles.sin() * self._magnitude
        return cos.to(self._device, torch.float32), sin.to(self._device, torch.float32)

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate the first ``dim`` components of each head.

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
        rotated, rest = x[..., : self._dim], x[..., self._dim :]
        if self._interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated.chunk(2, dim=-1)
        turned = (first * cos - second * sin, first * sin + second * cos)
        joined = torch.stack(turned, dim=-1).flatten(-2) if self._interleaved else torch.cat(turned, dim=-1)
        return torch.cat((joined, rest), dim=-1) if rest.shape[-1] else joined

    def unrotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Undo `rotate`."""
        cos, sin = rotation
        scale = self._magnitude**-2
        return self.rotate(x, (cos * scale, -sin * scale))

    def mean_rotation(self, positions: Tensor, d_head: int) -> Tensor:
        """Mean of the rotations of several positions as a matrix, which multiplies a head from the left: [d, d]."""
        cos, sin = (part.mean(dim=0, keepdim=True) for part in self.at(positions))
        return self.rotate(torch.eye(d_head, device=self._device)[None], (cos, sin))[0].T


def _yarn_kept(config: RopeConfig) -> Tensor:
    """Share of each frequency that YaRN leaves as it is: 1 for the fastest, 0 for the slowest. [dim / 2]."""

    def dimension(turns: float) -> float:
        return config.dim * math.log(config.n_context_original / (turns * 2 * math.pi)) / (2 * math.log(config.base))

    low = max(0, math.floor(dimension(_YARN_BETA_FAST)))
    high = min(config.dim - 1, math.ceil(dimension(_YARN_BETA_SLOW)))
    position = torch.arange(config.dim // 2, dtype=torch.float64)
    return 1.0 - ((position - low) / max(0.001, high - low)).clamp(0.0, 1.0)
