"""Calls that must be refused in words, eager and compiled alike."""

import pytest
import torch


def check_refusal(operator, args, options, error, message):
    for call in (operator, torch.compile(operator, backend="eager")):
        with pytest.raises(error, match=f"{operator.__name__}: {message}"):
            call(*args, **options)
