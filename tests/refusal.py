"""Calls that must be refused in words, eager and compiled alike."""

import pytest
import torch

both_ways = pytest.mark.parametrize("way", ["eager", "compiled"])


def check_refusal(way, call, args, options, error, message, name=None):
    """Of an operator, or of a module of that name."""
    run = torch.compile(call, backend="eager") if way == "compiled" else call
    with pytest.raises(error, match=f"^{name or call.__name__}: {message}"):
        run(*args, **options)
