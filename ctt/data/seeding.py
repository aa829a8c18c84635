"""Random numbers that depend on what they are for, never on what was drawn before.

A stopped run can then go on with the very same draws, whatever the number of loader processes.
"""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a seed in 0..2**63-1 for the purpose that `parts` spell out."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a fresh generator on `device`, seeded for the purpose that `parts` spell out."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
