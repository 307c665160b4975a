"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import secrets

import pytest
import torch


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Fresh random numbers in every run; a failure prints the seed, and GROKCURV_TEST_SEED repeats it."""
    seed = int(os.environ.get("GROKCURV_TEST_SEED") or secrets.randbits(31))
    print(f"GROKCURV_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)
