"""What Triton's compiler makes of the kernels is no worse than the table of its version says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: there are no wheels for it here")


@pytest.mark.long
@needs_triton
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


@needs_triton
def test_a_wider_load_that_becomes_narrow_is_worse(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    from triton_static import KEY, worse

    row = dict.fromkeys(KEY, "any") | dict(
        spills=0, stack=0, registers=64, shared=0, matrix=0, loads={"128": 8, "16": 4}, stores={})
    assert worse([row], [row]) == []
    assert worse([row | {"loads": {"128": 7, "16": 6}}], [row])
    assert worse([row | {"stores": {"32": 1}}], [row])


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
def test_loads_are_as_wide_from_batches_that_are_far_apart(monkeypatch):
    """Beyond 2^31 elements a stride is of another type."""
    monkeypatch.syspath_prepend(BENCH)
    import torch
    import triton_static
    from fastmix._triton import cumulative_mean

    with triton_static.recording("sm90", lambda key: False) as found:
        for n in (4096, 1 << 20):
            x = torch.empty(16, n, 2048, dtype=torch.bfloat16, device="meta")
            cumulative_mean.forward(x)
    near, far = (triton_static.examine(*kernel) for kernel in found.values())
    assert near.loads == far.loads and max(near.loads) >= 64


# Bytes of shared memory. Consumer cards (8.6, 8.9, 12.0) are launched like 8.0.
SHARED = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}


TABLES = sorted((BENCH / "results").glob("triton-static*.json"))


def test_tables_are_of_the_same_kernels():
    """By three versions of Triton, for as many targets, dtypes and shapes."""
    first, *others = (
        sorted((r["operator"], r["target"], r["dtype"], r["shape"], r["name"])
               for r in json.loads(path.read_text())["kernels"]) for path in TABLES)
    assert len(others) == 2 and all(other == first for other in others)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_no_kernel_of_a_table_spills(path):
    kernels = json.loads(path.read_text())["kernels"]
    assert {row["target"] for row in kernels} == {"sm80", "sm90", "sm100", "gfx942"}
    assert [row for row in kernels if row["spills"] or row["stack"]] == []
    assert [row for row in kernels if row["shared"] > SHARED[row["target"]]] == []
