"""Calls that must be refused in words, eager and compiled alike."""

import pytest
import torch


def check_refusal(call, args, options, error, message, name=None):
    """Of an operator, or of a module of that name."""
    for run in (call, torch.compile(call, backend="eager")):
        with pytest.raises(error, match=f"^{name or call.__name__}: {message}"):
            run(*args, **options)
