"""What Triton's compiler makes of the kernels is no worse than the table of its version says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
VERSIONS = ["3.6.0", "3.7.1", "3.9.0"]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: there are no wheels for it here")
needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")


@pytest.fixture
def static(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import triton_static

    return triton_static


@pytest.mark.long
@needs_triton
def test_no_kernel_is_worse_than_the_table(static):
    import triton

    if triton.__version__ not in static.versions_in_table():
        pytest.skip(f"no kernels of Triton {triton.__version__} in the table yet: "
                    "python bench/triton_static.py adds them")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, BENCH / "triton_static.py", "--check"],
                         env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr[-2000:]}"
    assert "none worse" in ran.stdout


def a_row(static, **others):
    return dict.fromkeys(static.KEY, "any") | dict(
        ir="1234abcd", warps=4, registers=64, shared=0, matrix=0, loads={128: 8, 16: 4}, stores={},
        spills=0, stack=0) | others


@needs_triton
def test_a_wider_load_that_becomes_narrow_is_worse(static):
    row = a_row(static)
    assert static.worse([row], [row]) == []
    assert static.worse([row | {"loads": {128: 7, 16: 6}}], [row])
    assert static.worse([row | {"stores": {32: 1}}], [row])


@needs_triton
@pytest.mark.parametrize("change", [
    dict(registers=65), dict(shared=1), dict(spills=1), dict(stack=8), dict(matrix=1),
    dict(constants="others")])
def test_more_of_anything_and_what_is_not_in_the_table_are_worse(static, change):
    row = a_row(static)
    assert len(static.worse([row | change], [row])) == 1


@needs_triton
def test_a_table_is_written_as_it_is_read_and_keeps_other_versions(static, monkeypatch, tmp_path):
    monkeypatch.setattr(static, "TABLE", tmp_path / "triton.csv")
    columns = (*static.KEY, *static.COLUMNS)
    rows = [{name: row[name] for name in columns} for row in (
        a_row(static), a_row(static, constants="BACKWARD ROWS=4", loads={}, stores={64: 2}))]
    static.write_table("3.7.1", rows)
    assert static.read_table("3.7.1") == sorted(rows, key=static._key)
    static.write_table("3.9.0", rows[:1])
    assert static.versions_in_table() == ["3.7.1", "3.9.0"]
    assert len(static.read_table("3.7.1")) == 2 and static.read_table("3.9.0") == rows[:1]
    static.write_table("3.7.1", rows[:1])  # no version has the other kernel any more
    assert len(static.TABLE.read_text().splitlines()) == 2


@needs_triton
def test_blank_cells_of_a_table_are_short_for_others(static, monkeypatch, tmp_path):
    monkeypatch.setattr(static, "TABLE", tmp_path / "triton.csv")

    def row(**others):
        return {name: a_row(static, **others)[name] for name in (*static.KEY, *static.COLUMNS)}

    tables = {
        "3.6.0": [row(), row(name="second", loads={})],
        "3.7.1": [row(loads={}), row(name="second"), row(name="third", target="sm90")],
        "3.9.0": [row(registers=65, loads={}), row(name="third", target="sm90")]}
    for version in ("3.9.0", "3.6.0", "3.7.1"):
        static.write_table(version, tables[version])
    assert {version: static.read_table(version) for version in tables} == tables
    lines = [line.split(",") for line in static.TABLE.read_text().splitlines()[1:]]
    alike = ["", "", "", ""]
    assert [line[:4] for line in lines] == [["any"] * 4, alike, ["", "sm90", "", ""]]
    ours = slice(len(static.KEY) + 2 * len(static.COLUMNS), None)  # of 3.9.0
    assert lines[0][ours] == ["", "", "65", "", "", "", ""]
    assert lines[1][ours][0] == "-" and lines[2][ours] == [""] * 7


@needs_triton
@needs_compiler
def test_what_is_in_the_table_is_not_compiled(static, monkeypatch):
    """Nor is anything of another target or dtype looked at."""
    known = {row["ir"] for row in static.read_table("3.7.1")}
    monkeypatch.setattr(static.Launch, "ir", lambda self: next(iter(known)))
    monkeypatch.setattr(static.Launch, "compiled", lambda self: pytest.fail("compiled"))
    part = ("sm90", "bfloat16", "cumulative_mean")
    _, results = static._measure_part(part, known)
    assert len(results) == 6 and all("registers" not in row for _, row in results)
    assert {(row["target"], row["dtype"], row["operator"]) for _, row in results} == {part}


@needs_triton
@needs_compiler
def test_ir_is_of_what_is_computed_and_not_of_how_it_is_written(static, monkeypatch, tmp_path):
    """Names, comments, helper functions and lines do not matter; a constant does."""
    import torch

    def ir_of(source):
        path = tmp_path / f"kernel_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with static.recording("sm90") as launches:
            module.double[(1,)](torch.empty(64, device="meta"))
        (launch,) = launches.values()
        return launch.ir()

    head = "import triton\nimport triton.language as tl\n"
    plain = ("@triton.jit\ndef double(x):\n"
             "    at = x + tl.arange(0, 64)\n    tl.store(at, tl.load(at) * 2)\n")
    helped = ("@triton.jit\ndef times(x, by):\n    return x * by\n\n\n@triton.jit\ndef double(y):\n"
              "    # Twice.\n    here = y + tl.arange(0, 64)\n"
              "    tl.store(here, times(tl.load(here), 2))\n")
    assert ir_of(head + plain) == ir_of(head + helped)
    assert ir_of(head + plain) != ir_of(head + plain.replace("* 2", "* 3"))


@pytest.mark.long
@needs_triton
@needs_compiler
def test_loads_are_as_wide_from_batches_that_are_far_apart(static):
    """Beyond 2^31 elements a stride is of another type."""
    import torch

    from fastmix._triton import cumulative_mean

    with static.recording("sm90") as launches:
        for n in (4096, 1 << 20):
            x = torch.empty(16, n, 2048, dtype=torch.bfloat16, device="meta")
            cumulative_mean.forward(x)
    near, far = (launch.compiled() for launch in launches.values())
    assert near.loads == far.loads and max(near.loads) >= 64


# Bytes of shared memory. Consumer cards (8.6, 8.9, 12.0) are launched like 8.0.
SHARED = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}


@needs_triton
def test_tables_are_of_the_same_kernels(static):
    """By three versions of Triton, for as many targets, dtypes and shapes."""
    assert static.versions_in_table() == VERSIONS
    first, *others = ([static._key(row) for row in static.read_table(version)]
                      for version in VERSIONS)
    assert all(other == first for other in others)
    assert len(set(first)) == len(first)


@needs_triton
@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_of_a_table_fit_their_targets(static, version):
    """None spills: writing the table asserts that."""
    kernels = static.read_table(version)
    assert {row["target"] for row in kernels} == set(SHARED)
    assert [row for row in kernels if row["shared"] > SHARED[row["target"]]] == []


@needs_triton
def test_a_kernel_that_spills_is_not_written(static, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(static, "TABLE", tmp_path / "triton.csv")
    for change in (dict(spills=1), dict(stack=8)):
        monkeypatch.setattr(static, "measure", lambda *_, c=change: [a_row(static, **c)])
        assert static._record([], 1)
        assert not static.TABLE.exists() and "spill" in capsys.readouterr().out
