"""What Triton's compiler makes of the kernels is no worse than the table of its version says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
# What is compiled again here; the table has float32 of every target.
TARGETS = {"sm90": ["bfloat16", "float32"], "sm80": ["bfloat16"], "sm100": ["bfloat16"],
           "gfx942": ["bfloat16"]}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                    reason="Triton is not installed: there are no wheels for it here")
def test_no_kernel_is_worse_than_the_table(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import triton_static

    path = triton_static.table_path()
    if not path.exists():
        pytest.skip(f"no {path.name} yet: python bench/triton_static.py writes it")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = [subprocess.Popen(
        [sys.executable, BENCH / "triton_static.py", "--check", "--targets", target,
         "--dtypes", *dtypes],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for target, dtypes in TARGETS.items()]
    for target, process in zip(TARGETS, running):
        out, err = process.communicate()
        assert process.returncode == 0, f"{target}: {out}\n{err[-2000:]}"
        assert "none worse" in out


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("triton-static*.json")),
                         ids=lambda path: path.stem)
def test_no_kernel_of_a_table_spills(path):
    kernels = json.loads(path.read_text())["kernels"]
    assert {row["target"] for row in kernels} == set(TARGETS)
    assert [row for row in kernels if row["spills"] or row["stack"]] == []
