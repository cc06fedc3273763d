"""Attention-free sequence mixers, fast: `fastmix.nn`, `fastmix.ops`, `python -m fastmix.env`."""

import os

from fastmix import ops
from fastmix.dispatch import force, implementations, load

__version__ = "0.1.0"
__all__ = ["force", "implementations", "ops"]

load()

if os.environ.get("FASTMIX_IMPLEMENTATION"):
    # Never left: it holds for the life of the process.
    _forced = force(os.environ["FASTMIX_IMPLEMENTATION"])
    _forced.__enter__()
