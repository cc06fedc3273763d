"""What Triton's compiler makes of the kernels is no worse than the table of its version says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                    reason="Triton is not installed: there are no wheels for it here")
def test_no_kernel_is_worse_than_the_table(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import triton_static

    path = triton_static.table_path()
    if not path.exists():
        pytest.skip(f"no {path.name} yet: python bench/triton_static.py writes it")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, BENCH / "triton_static.py", "--check"],
                         env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr[-2000:]}"
    assert "none worse" in ran.stdout


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("triton-static*.json")),
                         ids=lambda path: path.stem)
def test_no_kernel_of_a_table_spills(path):
    kernels = json.loads(path.read_text())["kernels"]
    assert {row["target"] for row in kernels} == {"sm80", "sm90", "sm100", "gfx942"}
    assert [row for row in kernels if row["spills"] or row["stack"]] == []
