"""Seeds and generators that depend on named parts, so that no draw depends on what was drawn before it."""

import hashlib

import torch


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else, such as (seed, "noise", step)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with :func:`derived_seed` of the parts."""
    return torch.Generator().manual_seed(derived_seed(*parts))
