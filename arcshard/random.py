"""Keys of random draws from whole numbers such as (seed, rank, step), and RNG states."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 62) - 1


def hash_key(*numbers: int) -> int:
    """Hashes several whole numbers into one 62-bit key (splitmix64 steps; Steele et al. 2014)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9
        state &= 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK


def get_rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Returns the RNG states that dropout and masks use: the CPU's, and on CUDA the device's."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


def set_rng_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    """Restores what `get_rng_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
