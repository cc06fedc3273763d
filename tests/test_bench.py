"""bench/run.py end to end, at sizes where it takes seconds."""

import csv
import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from fastmix import env, ops
from fastmix.native import library

BENCH = Path(__file__).parents[1] / "bench"
SIZES = ["--seq", "64", "--dim", "32", "--heads", "2", "--device", "cpu"]
SMALL = [*SIZES, "--generate", "2"]
ROWS = {"linear_scan complex", "gate_loop 32×1", "gate_loop 2×16", "gate_loop 2×16 real",
        "decay_conv", "fft_conv", "windowed_sgu w=128", "causal_sgu", "cumulative_mean"}
MODELS = {"MetaformerGPT", "GatedExponentialSmoothingLM", "GatedDsConvLM", "GatedStateSpacesLM",
          "gMLPGPT", "GateLoopTransformer"}
MODES = ("forward", "forward_backward")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*flags) → (exit status, the report as read from its JSON)."""
    monkeypatch.syspath_prepend(BENCH)
    import generation
    import machine
    import run as report
    import timing
    monkeypatch.setattr(generation, "CONTEXT", 64)
    monkeypatch.setattr(report, "SECONDS", 0.02)
    monkeypatch.setattr(machine, "COPIED", {"cpu": (1 << 20,)})
    monkeypatch.setattr(machine, "SIDES", {"cpu": (256,)})
    monkeypatch.setattr(timing, "_cold", lambda device: torch.empty(1))

    def main(*flags):
        path = tmp_path / "report.json"
        status = report.main([*SMALL, *flags, "--json", str(path)])
        return status, json.loads(path.read_text())
    return main


@pytest.fixture
def uncompiled(run, monkeypatch):
    """The same without torch.compile of the originals, which takes minutes."""
    import models
    import rows
    monkeypatch.setattr(rows, "add_compiled", lambda *arguments: None)
    monkeypatch.setattr(models, "add_compiled", lambda *arguments: None)
    return run


def test_a_half_type_beside_float32(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)
    import dtypes
    import timing
    monkeypatch.setattr(dtypes, "SECONDS", 0)
    monkeypatch.setattr(timing, "_cold", lambda device: torch.empty(1))
    dtypes.main([*SIZES, "--dtype", "float16"])
    table = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row for row, *_ in table} == ROWS - {"linear_scan complex"}
    for _, *cells in table:
        wide, half, ratio = ([float(number) for number in cell.split("/")] for cell in cells)
        assert min(*wide, *half) > 0
        assert ratio == pytest.approx([w / h for w, h in zip(wide, half)], rel=0.05)


def test_whole_report(uncompiled, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_bytes(b"It was the best of times, it was the worst of times. " * 9)
    status, report = uncompiled("--text", str(text), "--csv", str(tmp_path / "rows.csv"),
                                "--plot", str(tmp_path / "plot.png"), "--minutes", "60")
    assert status == 0
    header = report["header"]
    assert header["torch"] == torch.__version__
    assert header["copy_gb_s"] > 0 and header["matmul_gflop_s"] > 0
    assert header["instruction_set"] == library.instruction_set()

    assert {row["row"] for row in report["operators"]} == ROWS
    for row in report["operators"]:
        assert row["status"] == row["original"]["status"] == "ok", row["row"]
        assert row["original"]["n"] == row["n"] == 64
        assert row["errors"]["values"] < 1e-5 and row["errors"]["gradients"] < 1e-5
        for mode in MODES:
            timing = row[f"{mode}_ms"]
            assert 0 < timing["p20"] <= timing["median"] <= timing["p80"]
            theirs = row["original"][f"{mode}_ms"]["median"]
            # Three numbers of seven digits, of which each may be off by 5e-7 of itself.
            assert row["ratio_original"][mode] == pytest.approx(
                theirs / timing["median"], rel=1.5e-6)
            assert row["tokens_per_s"][mode] == pytest.approx(64e3 / timing["median"])
        assert row["peak_bytes"] > 0 and row["original"]["peak_bytes"] > 0

    assert {row["model"] for row in report["models"]} == MODELS
    for row in report["models"]:
        assert row["status"] == "ok", row["model"]
        assert row["errors"]["losses"] < 1e-5 and row["errors"]["gradients"] < 2e-4
        assert row["ratio_original"] > 0 and row["tokens_per_s"] > 0 and row["peak_bytes"] > 0

    assert {(row["model"], row["batch"], row["n"]) for row in report["generation"]} == {
        (name, batch, 64) for name in [*MODELS, "gMLPGPT causal"] for batch in (1, 16)}
    for row in report["generation"]:
        assert row["status"] == row["original"]["status"] == "ok", row["row"]
        assert row["errors"]["logits"] < 1e-4
        token = row["token_ms"]
        assert token["runs"] == 2 and 0 < token["median"] <= row["worst_ms"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / token["median"])
        theirs = row["original"]["token_ms"]["median"]
        assert row["ratio_original"] == pytest.approx(theirs / token["median"], rel=1.5e-6)
        assert min(row["first_ms"]["median"], row["ratio_plain"], row["ratio_floor"],
                   row["cache_bytes"]) > 0

    assert {row["row"] for row in report["steps"]} == ROWS
    for row in report["steps"]:
        assert row["status"] == "ok" and row["errors"]["values"] < 1e-4, row["row"]
        assert 0 < row["step_us"]["median"] <= row["worst_us"] and row["ratio_addition"] > 0

    for name in ROWS:
        assert {row["n"] for row in report["curve"] if row["row"] == name} >= {4, 8, 16}, name
    with open(tmp_path / "rows.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(ROWS) + len(MODELS) + 2 * (len(MODELS) + 1)
    assert [float(line["forward_ms.median"]) for line in lines[: len(ROWS)]] == [
        row["forward_ms"]["median"] for row in report["operators"]]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ROWS | MODELS)
    assert "\x1b" not in printed
    if library.instruction_set():
        assert f"\nkernels for {library.instruction_set()}, torch's own for " in printed
    assert "\n## Operators: one step\n" in printed
    best = max(report["operators"], key=lambda row: row["ratio_original"]["forward_backward"])
    assert f"In short: {best['row']} runs forward and backward" in printed
    speeds = printed.partition("× original")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(speeds) == len(ROWS)
    for line in speeds:  # of the times, forward and with backward, and of the ratio
        assert line.count("±") == 3, line


@pytest.mark.long
def test_without_time_every_row_and_curve_is_there(uncompiled, tmp_path, capsys):
    """What gives are the calls timed, then originals' lengths, then the longest of the curve."""
    status, report = uncompiled("--minutes", "0.001", "--plot", str(tmp_path / "plot.png"))
    assert status == 0
    assert {row["row"] for row in report["operators"]} == ROWS
    assert {row["model"] for row in report["models"]} == MODELS
    for row in report["operators"]:
        assert row["forward_ms"]["runs"] == 3 and row["ratio_original"]["forward"] > 0
        lengths = {r["n"] for r in report["curve"] if r["row"] == row["row"]}
        assert lengths == {4, 8, 16}
    assert "all operators at n=32" in capsys.readouterr().out


def test_a_slow_original_is_measured_at_a_shorter_length(uncompiled, monkeypatch, tmp_path,
                                                         capsys):
    import operators
    import rows
    step = operators.decay_conv(1, 64, 32, 2).original

    def slow(*inputs):
        function, arguments = step(*inputs)

        def call(x, *others):
            time.sleep(2e-3 * x.shape[1])
            return function(x, *others)
        return call, arguments

    def case(*sizes):
        made = build(*sizes)
        made.original = slow
        return made

    build = operators.decay_conv
    monkeypatch.setitem(operators.ROWS, "decay_conv", [case])
    monkeypatch.setattr(rows, "ORIGINAL_CALLS", 20)  # of 0.13 s each, where a second is allowed
    _, report = uncompiled("--ops", "decay_conv", "--models", "none", "--minutes", "0.001",
                           "--plot", str(tmp_path / "plot.png"))
    row, = report["operators"]
    assert row["n"] == 64 and row["original"]["n"] < 64
    for point in report["curve"]:
        assert (point["original"]["status"] == "ok") == (point["n"] < row["original"]["n"])
    assert row["ratio_original"]["forward"] > 1
    assert "because the original takes about" in capsys.readouterr().out


def test_a_slow_model_is_measured_at_a_shorter_length(uncompiled, monkeypatch, capsys):
    import models
    monkeypatch.setattr(models, "ORIGINAL_STEPS", 10**5)  # of ms, in a second
    _, report = uncompiled("--ops", "none", "--models", "MetaformerGPT", "--generate", "0",
                           "--minutes", "0.001")
    row, = report["models"]
    assert row["status"] == "ok" and row["n"] == 64 and row["arguments"]["max_seq_len"] == 64
    assert row["original"]["n"] == 4 and row["ratio_original"] > 0
    assert row["tokens_per_s"] == pytest.approx(64e3 / row["step_ms"]["median"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "both sides at n=4, because the original takes about" in printed
    assert "ok [1]" in printed
    monkeypatch.setattr(ops, "decay_conv", scaled(ops.decay_conv))
    _, report = uncompiled("--ops", "none", "--models", "MetaformerGPT", "--generate", "0",
                           "--minutes", "0.001")
    row, = report["models"]
    assert row["status"] == "wrong" and row["n"] == 64
    assert not {"step_ms", "tokens_per_s", "ratio_original", "peak_bytes"} & row.keys()


def broken(*arguments, **others):
    raise KeyError("abacus")


def test_whatever_an_original_raises_stands_in_its_row(uncompiled, monkeypatch, capsys):
    import metaformer_gpt.metaformer_gpt as published
    monkeypatch.setattr(published, "cummean", broken)
    monkeypatch.setattr(published.MetaformerGPT, "forward", broken)
    status, report = uncompiled("--ops", "cumulative_mean", "--models", "MetaformerGPT", "gMLPGPT")
    assert status == 0
    row, = report["operators"]
    model, other = report["models"]
    assert row["status"] == "ok" and row["original"]["status"] == "fails"
    assert model["status"] == "unchecked" and model["original"]["status"] == "fails"
    assert other["status"] == "ok" and other["ratio_original"] > 0
    assert capsys.readouterr().out.count("KeyError: 'abacus'") >= 2


def test_what_breaks_while_it_is_timed_is_left_out_alone(uncompiled, monkeypatch, tmp_path, capsys):
    import rows
    add_times = rows.add_times
    monkeypatch.setattr(rows, "add_times", lambda contest, *rest: broken() if
                        contest.case.operator == "decay_conv" else add_times(contest, *rest))
    status, report = uncompiled("--ops", "decay_conv", "cumulative_mean", "--models", "none",
                                "--plot", str(tmp_path / "plot.png"))
    assert status == 1 and [row["row"] for row in report["operators"]] == ["cumulative_mean"]
    assert {row["row"] for row in report["curve"]} == {"cumulative_mean"}
    assert "left out: decay_conv n=64, which raised KeyError" in capsys.readouterr().out


def test_a_curve_that_is_wrong_is_red_too(uncompiled, monkeypatch, tmp_path, capsys):
    decay_conv = ops.decay_conv
    monkeypatch.setattr(ops, "decay_conv", lambda x, *others: decay_conv(x, *others) * (
        1.001 if x.shape[1] == 8 else 1))
    status, report = uncompiled("--ops", "decay_conv", "--models", "none",
                                "--plot", str(tmp_path / "plot.png"))
    assert status == 1 and [row["status"] for row in report["operators"]] == ["ok"]
    line, = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert [cell.strip() for cell in line.split("|")[1:3]] == ["decay_conv", "8"]


def test_files_are_written_whoever_reads_the_report(uncompiled, monkeypatch, tmp_path):
    def gone(*arguments, **options):
        raise BrokenPipeError

    flags = "--ops", "cumulative_mean", "--models", "none", "--csv", str(tmp_path / "rows.csv")
    monkeypatch.setattr(env, "print", gone, raising=False)
    duplicated = []
    monkeypatch.setattr("os.dup2", lambda *files: duplicated.append(files))
    status, report = uncompiled(*flags)
    assert status == 0 and report["operators"] and duplicated
    assert "cumulative_mean" in (tmp_path / "rows.csv").read_text()


def test_a_file_that_cannot_be_written_after_all_is_named(uncompiled, monkeypatch, capsys):
    import table
    monkeypatch.setattr(table, "write_csv", broken)
    status, report = uncompiled("--ops", "cumulative_mean", "--models", "none", "--csv", "rows.csv")
    said = capsys.readouterr()
    assert status == 1 and "--csv rows.csv: 'abacus'" in said.err
    assert "| cumulative_mean " in said.out


@pytest.mark.parametrize("names", [
    ["decay_conv"], *(pytest.param(more, marks=pytest.mark.long) for more in (
        ["decay_conv", "fft_conv"], ["decay_conv", "fft_conv", "cumulative_mean"]))])
def test_titles_of_plots_are_whole(names, monkeypatch, tmp_path):
    """Nothing is written into the outermost pixels, where it would be cut."""
    monkeypatch.syspath_prepend(BENCH)
    from matplotlib.image import imread

    import plot
    report = json.loads((BENCH / "results" / "cpu-2core-avx512-native.json").read_text())
    report["header"]["device"] = "A Processor(R) With A Name(TM) Of Many Letters 9999X @ 2.90GHz"
    for part in "operators", "curve":
        report[part] = [row for row in report[part] if row["row"] in names]
    plot.draw(report, tmp_path / "plot.png")
    pixels = imread(tmp_path / "plot.png")[..., :3]
    for edge in pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]:
        assert (edge == 1).all()


def test_room_is_half_of_what_is_free(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCH)
    import machine
    cpu, meminfo = torch.device("cpu"), tmp_path / "meminfo"
    assert machine.room(cpu, meminfo, tmp_path) == machine.UNKNOWN // 2
    meminfo.write_text("MemTotal:  4000 kB\nMemAvailable:  2000 kB\n")
    assert machine.room(cpu, meminfo, tmp_path) == 1000 << 10
    for most, room in ("max", 1000 << 10), (1 << 20, (1 << 20) - 4096 >> 1), (4095, 0):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text("4096\n")
        assert machine.room(cpu, meminfo, tmp_path) == room
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 4000\nfile 4090\n")
    assert machine.room(cpu, meminfo, tmp_path) == (4095 - 96) // 2


def test_two_reports_beside_each_other(uncompiled, tmp_path, capsys):
    flags = "--ops", "decay_conv", "cumulative_mean", "--models", "none"
    _, report = uncompiled(*flags)
    row, _ = report["operators"]
    for mode in MODES:  # a report in which decay_conv was a thousand times as slow
        row[f"{mode}_ms"] = {key: 1000 * row[f"{mode}_ms"][key] for key in ("median", "p20", "p80")}
    report["operators"].pop()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(report))
    capsys.readouterr()
    uncompiled(*flags, "--compare", str(other), "--plot", str(tmp_path / "plot.png"))
    printed = capsys.readouterr().out
    assert printed.split("\n\n")[-1].startswith("In short: decay_conv ")
    printed = printed.partition("## Beside another report")[2]
    assert printed.count("faster") == 2 and "cumulative_mean" not in printed
    assert (tmp_path / "plot.png").exists()
    for missing in "curve", "models":
        other.write_text(json.dumps({key: part for key, part in report.items() if key != missing}))
        with pytest.raises(SystemExit):
            uncompiled(*flags, "--compare", str(other))
        assert "is not a report of bench/run.py --json" in capsys.readouterr().err


def test_a_noisy_machine_is_called_so(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import table
    report = json.loads((BENCH / "results" / "cpu-2core-avx512-native.json").read_text())
    for row in table.rows_of(report):
        for key in set(table.TIMES) & row.keys():
            row[key]["p20"] = row[key]["p80"] = row[key]["median"]
    assert "Noisy" not in table.text(report, colour=False)
    timing = report["operators"][0]["forward_ms"]
    timing["p80"] = 2 * timing["median"]
    assert f"Noisy: the times of {report['operators'][0]['row']} n=8192 spread" in table.text(
        report, colour=False)


def test_vectors_that_move_to_and_from_the_stack_are_counted(monkeypatch):
    """Those of eight bytes that NEON's functions save for their caller are not."""
    monkeypatch.syspath_prepend(BENCH)
    import cpu_static

    listing = """
0000000000000000 <void fastmix::neon::(anonymous namespace)::mix<float>(long)>:
   0:\tstp\td8, d9, [sp, #64]
   4:\tldp\tq0, q1, [sp, #16]
   8:\tstr\tq0, [x29, #16]
   c:\tfmla\tv0.4s, v1.4s, v2.s[0]
  10:\tret

0000000000000020 <fastmix::avx2::(anonymous namespace)::run(int)::{lambda(long)#1}::operator()()>:
  20:\tmov    %rsp,%rbp
  24:\tvmovaps %ymm0,0x20(%rsp)
  28:\tvmovups 0x20(%rbp),%ymm0
  2c:\tvmovups (%rdi),%ymm0
  30:\tvfmadd231ps %ymm1,%ymm2,%ymm3
"""
    monkeypatch.setattr(cpu_static.subprocess, "run",
                        lambda *args, **named: types.SimpleNamespace(stdout=listing))
    assert list(cpu_static.counts(Path("made.o"))) == [("mix<float>", 5, 3, 2),
                                                       ("run…", 5, 4, 2)]


def test_necessary_bytes_and_flops(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import operators

    case = operators.gate_loop_diagonal(2, 5, 32, 4)
    elements = 2 * 5 * 32
    assert case.necessary(case.tensors(torch.bfloat16, torch.device("cpu"))) == {
        "forward": (12 * elements, 0), "forward_backward": (34 * elements, 0)}
    case = operators.windowed_sgu(2, 11, 32, 4, window=4)
    reached = [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7]
    assert case.flops == 2 * 2 * 32 * sum(reached)


def scaled(function):
    return lambda *args, **kwargs: 1.001 * function(*args, **kwargs)


def wrong_backward(function):
    def call(*args, **kwargs):
        y = function(*args, **kwargs)
        return y.detach() + 1.001 * (y - y.detach())
    return call


def poisoned(function):
    def call(*args, **kwargs):
        y = function(*args, **kwargs).clone()
        y[0, 0] = math.nan
        return y
    return call


@pytest.mark.parametrize("spoil", [scaled, wrong_backward, poisoned])
def test_wrong_result_is_red_and_carries_no_time(uncompiled, monkeypatch, spoil, capsys):
    monkeypatch.setattr(ops, "decay_conv", spoil(ops.decay_conv))
    flags = ("--ops", "decay_conv", "cumulative_mean", "--models", "MetaformerGPT",
             "--generate", "0")
    status, report = uncompiled(*flags)
    wrong, right = report["operators"]
    model, = report["models"]
    assert (wrong["status"], right["status"], model["status"]) == ("wrong", "ok", "wrong")
    assert "forward_ms" in right
    for row in wrong, model:
        assert not {"forward_ms", "forward_backward_ms", "step_ms", "tokens_per_s",
                    "ratio_original", "peak_bytes"} & row.keys()
    import table
    red = [line for line in table.text(report, colour=True).splitlines() if "\x1b[31m" in line]
    assert red and all("WRONG" in line or "–" in line for line in red)
    assert all("decay_conv" in line or "MetaformerGPT" in line for line in red)

    assert uncompiled("--check", *flags)[0] == 1
    assert "WRONG" in capsys.readouterr().out


def test_check_fails_on_what_is_missing(uncompiled, monkeypatch, capsys):
    status, report = uncompiled("--check", "--ops", "decay_conv", "--models", "none",
                                "--impl", "fallback", "abacus")
    assert status == 1
    assert [row["status"] for row in report["operators"]] == ["ok", "failed"]
    assert "no implementation abacus" in capsys.readouterr().out

    for module in "metaformer_gpt.metaformer_gpt", "gated_state_spaces_pytorch.mhesa":
        monkeypatch.setitem(sys.modules, module, None)
    flags = "--ops", "decay_conv", "--models", "MetaformerGPT"
    status, report = uncompiled(*flags)
    row, = report["operators"]
    assert row["status"] == "ok" and row["original"]["status"] == "not installed"
    assert report["models"][0]["status"] == "unchecked"
    assert capsys.readouterr().out.count("not installed") >= 2
    assert uncompiled("--check", *flags)[0] == 1


@pytest.mark.long
def test_forced_implementation_and_half_type(uncompiled):
    """Originals that cannot run in a half type are measured in float32, and that is said."""
    status, report = uncompiled("--impl", "fallback", "--dtype", "bfloat16", "--ops", "decay_conv",
                                "cumulative_mean", "--models", "MetaformerGPT", "--minutes", "60")
    decay, mean = report["operators"]
    model, = report["models"]
    for row in decay, mean, model:
        assert row["status"] == "ok" and row["implementation"] == "fallback", row
    assert decay["original"]["dtype"] == "float32"
    assert "fails in bfloat16" in decay["original"]["reason"]
    assert mean["original"]["dtype"] == model["original"]["dtype"] == "bfloat16"


def test_original_that_needs_too_much_memory(uncompiled, monkeypatch, capsys):
    import machine
    monkeypatch.setattr(machine, "room", lambda device: 1 << 20)
    _, report = uncompiled("--ops", "gate_loop", "--models", "none")
    diagonal, matrix, real = report["operators"]
    assert diagonal["original"]["n"] == 64
    # 11 complex64 arrays of 64 × 2 × 16 × 16 make 2.9 MB, of real gates as well; a quarter of the
    # room is for what is shortened.
    assert matrix["original"]["n"] == 4 and matrix["ratio_original"]["forward"] > 0
    assert real["original"]["n"] == 4
    assert "both sides at n=4, because the original needs about" in capsys.readouterr().out
    matrix["compiled"] = {"status": "fails to compile", "n": 4, "reason": "no pencil"}
    import table
    assert "fails to compile [1][2]" in table.text(report, colour=False)


def test_ctrl_c_prints_what_there_is(uncompiled, monkeypatch, capsys):
    import rows
    measured = rows.operator_rows

    def interrupted(make, n, *arguments, **options):
        if n == 64 and make(n).row == "cumulative_mean":
            raise KeyboardInterrupt
        return measured(make, n, *arguments, **options)

    monkeypatch.setattr(rows, "operator_rows", interrupted)
    status, report = uncompiled("--ops", "decay_conv", "cumulative_mean")
    assert status == 130
    assert [row["row"] for row in report["operators"]] == ["decay_conv"]
    printed = capsys.readouterr().out
    assert "| decay_conv " in printed and "at Ctrl-C" in printed


def test_ctrl_c_beside_a_shorter_original_keeps_the_row(uncompiled, monkeypatch):
    import rows

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "original_length", lambda *arguments: (8, "takes about 9 s a call"))
    monkeypatch.setattr(rows, "add_shorter_original", interrupted)
    status, report = uncompiled("--ops", "decay_conv", "--models", "none")
    row, = report["operators"]
    assert status == 130 and row["status"] == "ok" and row["forward_ms"]["median"] > 0


def test_what_cannot_run_ends_with_a_status(uncompiled, capsys):
    status, report = uncompiled("--impl", "cuda", "--ops", "decay_conv", "--models", "none")
    assert status == 1 and [row["status"] for row in report["operators"]] == ["failed"]
    assert "FAILED" in capsys.readouterr().out


def test_kernels_are_compiled_before_the_time_begins(uncompiled, monkeypatch):
    import rows
    import run as report
    order = []
    measured = rows.operator_rows
    monkeypatch.setattr(rows, "operator_rows", lambda make, n, *rest, **options: order.append(
        (make(n).operator, n)) or measured(make, n, *rest, **options))

    class Schedule(report.Schedule):
        def __init__(self, *arguments):
            order.append("the clock")
            super().__init__(*arguments)

    monkeypatch.setattr(report, "Schedule", Schedule)
    uncompiled("--ops", "decay_conv", "--models", "GatedDsConvLM")
    assert set(order[:2]) == {("decay_conv", 16), ("fft_conv", 16)}
    assert order[2:] == ["the clock", ("decay_conv", 64)]


def test_a_step_faster_than_its_floor_is_remarked_on(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import table
    report = json.loads((BENCH / "results" / "cpu-2core-avx512-native.json").read_text())
    assert "its matrix products alone" not in table.text(report, colour=False)
    report["models"][0]["linear_floor_ms"] = 2 * report["models"][0]["step_ms"]["median"]
    assert "its matrix products alone" in table.text(report, colour=False)


def test_committed_reports_are_small_and_have_a_row_a_line():
    files = [*(BENCH / "results").glob("cpu-*"), BENCH / "results" / "triton-dry.json"]
    folders = [BENCH / "results", BENCH / "expected"]
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < 400_000
    for file in files:
        report = json.loads(file.read_text())
        paths = [value for value in report.get("settings", {}).values()
                 if str(value).startswith("/")]
        assert not paths, "of one machine"
        rows = [row for value in report.values() if isinstance(value, list) for row in value
                if isinstance(row, dict)]
        assert rows and len(rows) < len(file.read_text().splitlines()) < len(rows) + 20


def test_the_page_of_benchmarks_is_what_the_reports_say(monkeypatch):
    """`python bench/page.py` writes it anew."""
    monkeypatch.syspath_prepend(BENCH)
    import page
    text = page.PAGE.read_text("utf-8")
    assert page.written(text) == text
    assert len(page.SECTION.findall(text)) == 2
    assert page.written(text.replace("| decay_conv ", "| another ", 1)) == text


@pytest.mark.long
def test_compiled_original(run):
    _, report = run("--ops", "cumulative_mean", "--models", "none")
    row, = report["operators"]
    assert row["compiled"]["status"] == "ok"
    assert row["ratio_compiled"]["forward"] > 0 and row["ratio_compiled"]["forward_backward"] > 0


def test_compiled_originals_are_left_out_where_time_is_over(run):
    _, report = run("--minutes", "1e-9", "--ops", "decay_conv", "--models", "MetaformerGPT")
    row, model = *report["operators"], *report["models"]
    assert row["status"] == model["status"] == "ok"
    assert "compiled" not in row and "compiled" not in model
    for name in "decay_conv", "MetaformerGPT":
        assert any(f"compiled original of {name} n=64" in what for what in report["left_out"])


class ForwardOnly(torch.autograd.Function):
    """A kernel whose backward a compiler refuses."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward on this GPU.")


def test_peers(monkeypatch, tmp_path, capsys):
    """Stand-ins for the packages, with their arguments and layouts, on the CPU."""
    monkeypatch.syspath_prepend(BENCH)
    import peers
    from fastmix import reference

    def install(name, **functions):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**functions))

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
        assert scale == 1
        return reference.gate_loop(q, k, v, g.exp()), None

    install("accelerated_scan.scalar", scan=lambda forget, inputs: reference.linear_scan(
        forget.mT, inputs.mT).mT)
    install("fla.ops.hgrn", chunk_hgrn=lambda x, g, initial_state=None: (
        ForwardOnly.apply(reference.linear_scan(g.exp(), x)), None))
    install("fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    install("fla.ops.retention", chunk_retention=lambda q, k, v, scale=None: (q + k + v, None))
    monkeypatch.setitem(sys.modules, "accelerated_scan.complex", None)
    monkeypatch.setattr(peers, "SECONDS", 0.01)
    given, gate_loop = set(), ops.gate_loop

    def recorded(q, k, v, gates=None, gate_logits=None):
        given.add((gates if gate_logits is None else gate_logits).shape)
        return gate_loop(q, k, v, gates, gate_logits=gate_logits)

    monkeypatch.setattr(ops, "gate_loop", recorded)
    path = tmp_path / "peers.json"
    peers.main(["--batch", "2", "--seq", "40", "--dim", "32", "--heads", "2", "--dtype", "float32",
                "--device", "cpu", "--json", str(path)])
    *rows, retention = json.loads(path.read_text())["rows"]
    assert [row["status"] for row in rows] == [
        "ok", "forward only", "not installed", "ok", "forward only", "ok", "ok"]
    for row in rows:
        if row["status"] in ("ok", "forward only"):
            assert row["off"] < 1e-4, row
            for mode in MODES if row["status"] == "ok" else ("forward",):
                assert row["ratio"][mode] == pytest.approx(
                    row[f"peer_{mode}_ms"]["median"] / row[f"{mode}_ms"]["median"])
        if row["status"] == "forward only":
            assert row["reason"] == "its gradients: no backward on this GPU."
            assert "forward_backward_ms" not in row
    assert retention["status"] == "disagrees" and "forward_ms" not in retention
    # Real logits, complex ones and decays.
    assert given == {(2, 40, 2), (2, 40, 2, 2), (2,)}
    printed = capsys.readouterr().out
    assert "not installed" in printed and "disagrees: differs by" in printed


@pytest.mark.long
def test_peers_on_cpus(monkeypatch, tmp_path, capsys):
    """Ways of plain torch, and stand-ins for two packages: one is right, the other is not."""
    monkeypatch.syspath_prepend(BENCH)
    import peers_cpu

    def linear_recurrence(a, initial, x):
        rows = a if a.ndim == 2 else a[:, None].expand(x.shape)
        return ops.linear_scan(rows.mT[None], x.mT[None])[0].mT

    packages = {"philtorch.lpv": linear_recurrence,
                "philtorch.lti": lambda a, initial, x: a[:, None] * x}
    for name, function in packages.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(linear_recurrence=function))
    for name in "philtorch", "jax", "numba":
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if name < "numba" else None)
    monkeypatch.setattr(peers_cpu, "SECONDS", 0.01)
    names = ["linear_scan real", "gate_loop 2×16 real", "decay_conv", "fft_conv",
             "windowed_sgu w=128", "causal_sgu", "cumulative_mean"]
    monkeypatch.setattr(peers_cpu, "WAYS", {
        make: [way for way in ways if way.name not in ("torch.compile", "torch associative_scan")]
        for make, ways in peers_cpu.WAYS.items()})
    path = tmp_path / "peers.json"
    peers_cpu.main(["--batch", "2", "--seq", "150", "--dim", "32", "--heads", "2",
                    "--ops", *names, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert list(dict.fromkeys(row["row"] for row in rows)) == names
    statuses = {(row["implementation"], row["row"]): row["status"] for row in rows}
    for (name, operator), status in statuses.items():
        wanted = ("not installed" if name.startswith(("JAX", "numba"))
                  else "disagrees" if (name, operator) == ("philtorch", "decay_conv") else "ok")
        assert status == wanted, (name, operator)
    for row in rows:
        if row["status"] == "ok":
            assert max(row["peer_errors"].values()) < 1e-5 and row["forward_ms"]["runs"] >= 3
            assert ("forward_backward_ms" in row) == (not row["implementation"].startswith("scipy"))
        else:
            assert "forward_ms" not in row
    layouts = {row["layout"] for row in rows if row["implementation"] == "torch in chunks of 64"}
    assert layouts == {"(b, h, n, d)", "(b, n, h, d)"}
    assert "disagrees" in capsys.readouterr().out


def test_a_model_that_forgets_its_cache_is_wrong(uncompiled, monkeypatch, capsys):
    decay_conv = ops.decay_conv
    monkeypatch.setattr(ops, "decay_conv", lambda *arguments, initial_state=None, **others:
                        decay_conv(*arguments, **others))
    flags = "--ops", "none", "--models", "GatedExponentialSmoothingLM"
    status, report = uncompiled(*flags)
    assert status == 1 and report["models"][0]["status"] == "ok"
    assert [row["status"] for row in report["generation"]] == ["wrong"] * 2
    assert not any("token_ms" in row or "first_ms" in row for row in report["generation"])
    assert capsys.readouterr().out.count("WRONG") >= 2
    status, report = uncompiled("--check", *flags)
    assert status == 1 and [row["status"] for row in report["generation"]] == ["wrong"]
    status, report = uncompiled("--ops", "decay_conv", "--models", "none")
    assert status == 1 and [row["status"] for row in report["operators"]] == ["ok"]
    assert [row["status"] for row in report["steps"]] == ["wrong"]
    assert "step_us" not in report["steps"][0]


def test_texts_that_do_not_fit_are_left_out(uncompiled, monkeypatch):
    import generation
    import machine
    monkeypatch.setattr(machine, "room", lambda device: generation.bytes_needed(16, 64, 32))
    flags = "--ops", "none", "--models", "GateLoopTransformer"
    _, report = uncompiled(*flags, "--contexts", "16", "128", "64")
    assert [(row["batch"], row["n"]) for row in report["generation"]] == [
        (1, 16), (1, 64), (1, 128), (16, 16), (16, 64)]
    assert any("batch 16 n=128, as its prompt needs" in what for what in report["left_out"])


def test_texts_are_never_left_out_for_time(uncompiled, monkeypatch):
    import generation
    monkeypatch.setattr(generation, "CONTEXT", 16)
    flags = "--ops", "none", "--models", "GateLoopTransformer", "--minutes", "1e-9"
    _, report = uncompiled(*flags)
    assert [(row["batch"], row["n"]) for row in report["generation"]] == [
        (1, 16), (1, 64), (16, 16)]
    assert "text" not in str(report["left_out"])
    for row in report["generation"]:
        assert row["status"] == "ok" and row["token_ms"]["runs"] == 2


def test_the_worst_token_may_be_one_that_begins_an_epoch(uncompiled, monkeypatch):
    import generation
    from fastmix.ops import _fft_conv_state
    begun, elapsed = [], generation.elapsed
    begin = _fft_conv_state._begin_epoch
    monkeypatch.setattr(_fft_conv_state, "_begin_epoch",
                        lambda *arguments: (begun.append(1), begin(*arguments))[1])

    def timed(function, device):
        before = len(begun)
        ms = elapsed(function, device)
        return 1e9 if len(begun) > before and function.__name__ == "step" else ms

    monkeypatch.setattr(generation, "elapsed", timed)
    _, report = uncompiled("--ops", "none", "--models", "GatedDsConvLM", "MetaformerGPT")
    assert {row["model"]: row["worst_ms"] >= 1e9 for row in report["generation"]} == {
        "GatedDsConvLM": True, "MetaformerGPT": False}
    assert all(row["token_ms"]["median"] < 1e9 for row in report["generation"])


def test_one_step_and_tokens_by_themselves(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)
    import steps
    monkeypatch.setattr(steps, "CALLS", 4)
    rows = steps.main(["--seq", "64", "4096", "--dim", "32", "--heads", "2", "--depth", "2",
                       "--generate", "2", "--seconds", "0.01", "--ops", "decay_conv", "fft_conv",
                       "--models", "gMLPGPT causal", "GatedDsConvLM"])
    assert [(row["row"], row["status"]) for row in rows] == [
        ("decay_conv", "ok"), ("fft_conv", "ok"), ("gMLPGPT causal, text, batch 1", "ok"),
        *[("GatedDsConvLM, text, batch 1", "ok")] * 2]
    printed = capsys.readouterr().out
    assert "× an addition" in printed and "× floor" in printed and "depth 2" in printed


def test_turns_and_peak(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import contextlib

    import timing

    calls = []
    functions = {name: (contextlib.nullcontext, lambda name=name: calls.append(name))
                 for name in "ab"}
    result = timing.side_by_side(functions, 0, torch.device("cpu"), least=3)
    assert calls == ["a", "b"] * 3 and result["a"]["runs"] == result["b"]["runs"] == 3

    def two_then_one():
        a = torch.zeros(1 << 20)
        b = a + 1
        del a
        return b + 1
    assert timing.peak_bytes(two_then_one, torch.device("cpu")) // (4 << 20) == 2


class Gpu:
    """A torch.cuda that notes what is asked of it. A call takes 3 ms on it, and 1 ms to launch; it
    is idle before all is launched unless it was given more than `enough` ms to do."""

    def __init__(self, enough):
        self.enough, self.done, self.busy = enough, [], 0

    def _sleep(self, cycles):
        self.busy = cycles / 2e6
        self.done.append(f"busy {self.busy:.0f}")

    def Event(self, enable_timing):
        event = types.SimpleNamespace()
        event.record = lambda: self.done.append("start" if self.done[-1] != "call" else "end")
        event.query = lambda: self.busy <= self.enough
        event.synchronize = lambda: self.done.append("wait")
        event.elapsed_time = lambda end: 3.0
        return event

    def call(self):
        self.done.append("call")
        time.sleep(1e-3)


@pytest.mark.parametrize("enough, tried, host", [(0, [8], True), (20, [8, 32], True),
                                                 (1000, [8, 32, 128], False)])
def test_a_gpu_is_busy_until_all_is_launched(monkeypatch, enough, tried, host):
    """Else the host's time would be taken for the GPU's."""
    monkeypatch.syspath_prepend(BENCH)
    import contextlib

    import timing
    gpu = Gpu(enough)
    monkeypatch.setattr(torch, "cuda", gpu)
    monkeypatch.setattr(timing, "_cold", lambda device: torch.empty(1))
    device = types.SimpleNamespace(type="cuda")
    took = timing.side_by_side({"a": (contextlib.nullcontext, gpu.call)}, 0, device)["a"]
    rounds = [*tried, tried[-1], tried[-1]]
    assert gpu.done == [what for busy in rounds
                        for what in (f"busy {busy}", "start", "call", "end", "wait")]
    assert took["median"] == 3 and took["runs"] == 3
    assert 1 <= took["host"] < 3 if host else took["host"] is None

    import table
    gpu.done.clear()
    assert timing.elapsed(gpu.call, device) == 3 and gpu.done[:3] == ["busy 8", "start", "call"]
    row = {"forward_ms": took, "forward_backward_ms": took}
    assert (table.host(row, None) == "– / –") == (not host)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                    reason="Triton is not installed: there are no wheels for it here")
def test_kernels_move_no_more_than_the_table_says():
    done = subprocess.run([sys.executable, BENCH / "dry.py", "--check"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "none moves" in done.stdout


def test_bytes_that_kernels_move():
    """Bytes an element in bfloat16, where channels fill the GPU."""
    rows = json.loads((BENCH / "results" / "triton-dry.json").read_text())["rows"]
    moved = {(row["row"], row["mode"]): row["moved"] / row["elements"] for row in rows
             if row["batch"] == 8 and row["n"] >= 4096}
    forward, both = (moved["gate_loop 1024×1", mode] for mode in MODES)
    assert forward < 12.1 and both - forward < 24
    assert moved["decay_conv", "forward"] < 4.1
    assert moved["cumulative_mean", "forward_backward"] < 8.1


def test_bytes_that_a_training_step_holds():
    """In float32, little beside the result and the gradients: 4 bytes an element each."""
    rows = json.loads((BENCH / "results" / "triton-dry.json").read_text())["rows"]
    held = {row["row"]: row["held"] / row["elements"] for row in rows
            if row["batch"] == 8 and row["n"] >= 4096 and "held" in row}
    assert 24 <= held["gate_loop 1024×1"] < 24.3 and 8 <= held["decay_conv"] < 8.2
    assert 8 <= held["cumulative_mean"] < 8.1 and 12 <= held["windowed_sgu w=128"] < 13.5


@pytest.mark.parametrize("flags, message", [
    (["--heads", "3"], "--dim must be divisible"), (["--seq", "0"], "at least 1"),
    (["--check", "--plot", "x.png"], "--check takes no times"), (["--text", "/no/such"], "no file"),
    (["--ops", "none", "--plot", "x.png"], "--plot draws operators"),
    (["--csv", "/no/such/rows.csv"], "--csv: /no/such/rows.csv cannot be written"),
    (["--plot", "/no/such/x.png"], "--plot: /no/such/x.png cannot be written"),
    (["--plot", "x.txt"], "--plot: x.txt must end with one of ."),
    (["--plot", "x.png"], "needs matplotlib")])
def test_bad_flags(run, monkeypatch, capsys, flags, message):
    """All of them before anything is measured."""
    if "matplotlib" in message:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as error:
        run(*flags)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("command, message", [
    (["peers.py", "--json", "/no/such/x.json"], "--json: /no/such/x.json cannot be written"),
    (["peers_cpu.py", "--json", "/no/such/x.json"], "--json: /no/such/x.json cannot be written"),
    (["peers_cpu.py", "--ops", "gate_lop"], "--ops must be of 'linear_scan real', "),
    (["threads.py", "--plot", "/no/such/x.png"], "--plot: /no/such/x.png cannot be written"),
    (["self_check.py", "--json", "/no/such/x.json"], "--json: /no/such/x.json cannot be written"),
    (["compare.py", "/no/such/x.json", "/no/such/y.json"], "No such file or directory")])
def test_other_tools_refuse_paths_before_they_measure(command, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr(sys, "argv", [str(BENCH / command[0]), *command[1:]])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_threads_have_a_row_for_each_operator_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)
    import threads
    monkeypatch.setattr(threads, "SECONDS", 0.02)
    path = tmp_path / "threads.png"
    threads.main(["--seq", "300", "--dim", "32", "--batch", "1", "3", "--heads", "1", "2", "--ops",
                  "decay_conv", "gate_loop", "--plot", str(path)])
    large, small = capsys.readouterr().out.strip().split("\n\n")
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in large.splitlines()[2:]]
    names = [line.split("|")[1].strip() for line in small.splitlines()[2:]]
    assert len(names) == 4 and "/ 64 threads" in small and "efficiency %" in large
    assert {name for name, *_ in cells} >= set(names)
    assert [cell for cell in cells if cell[0] == "decay_conv"] == [
        ["decay_conv", batch, heads] for heads in ("1", "2") for batch in ("1", "3")]
    assert [cell[1] for cell in cells if cell[0] == "gate_loop 32×1"] == ["1", "3"]  # of any heads
    assert path.stat().st_size > 5000


def test_parts_of_a_training_step(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)
    import parts
    parts.main(["--seq", "64", "--dim", "32", "--heads", "2", "--models", "GateLoopTransformer"])
    names, _, values = [[cell.strip() for cell in line.split("|")[1:-1]]
                        for line in capsys.readouterr().out.splitlines()]
    assert values[0] == "GateLoopTransformer"
    spent = dict(zip(names[1:], map(float, values[1:]), strict=True))
    for part in ("products", "mixing", "copies", "sums, products of tensors", "Adam"):
        assert spent[part] > 0, spent


@pytest.mark.long
def test_command_line(tmp_path):
    """It keeps nothing that torch.compile makes: the next report may be for other instructions."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES")  # conftest.py sets it
    done = subprocess.run(
        [sys.executable, BENCH / "run.py", *SIZES, "--ops", "cumulative_mean",
         "--models", "none"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "| cumulative_mean " in done.stdout and "measuring the machine" in done.stderr
    assert not (tmp_path / "fxgraph").exists()
