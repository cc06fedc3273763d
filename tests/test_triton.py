"""The Triton kernels' own tests, tests/triton/, in a process of their own.

Without a GPU they run in Triton's interpreter, which has to be chosen before kernels are
imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "triton"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="Triton is not installed: there are no wheels for it here")


@pytest.mark.long
@needs_triton
@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)
def test_kernels(file):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(
        [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
                         env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
