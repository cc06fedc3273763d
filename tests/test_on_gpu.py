"""bench/on_gpu.sh and what it runs, as far as that can be tried without a GPU."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
SCRIPT = BENCH / "on_gpu.sh"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="compiles with Triton")


# ---- stages


def test_every_stage_ends_within_nine_minutes():
    listed = subprocess.run([SCRIPT, "--list"], capture_output=True, text=True, check=True).stdout
    seconds = Counter()
    for line in listed.splitlines():
        stage, _, limit = line.split()
        seconds[stage] += int(limit)
    assert list(seconds) == ["truth", "tests", "tune", "sanitize", "report", "counters"]
    assert max(seconds.values()) <= 540


@pytest.fixture
def day(tmp_path):
    """day(stage) → the running script, with an interpreter that notes what it is asked for. It is
    slow at linear_scan while a file "slow" is there, and fails at decay_conv while "bad" is."""
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
cd {tmp_path}
case "$*" in
    -c*) ;;
    - | "-m zipfile"*) exec {sys.executable} "$@" ;;
    *) echo "$*" >> asked ;;
esac
case "$*" in
    *linear_scan*) [ ! -e slow ] || sleep 60 ;;
    *decay_conv*) [ ! -e bad ] || {{ echo 'the very reason'; exit 3; }} ;;
esac
""")
    python.chmod(0o755)

    def run(stage, *flags, work="work"):
        return subprocess.Popen(
            [SCRIPT, "--rehearse", *flags, stage, tmp_path / "out"], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | {"PYTHON": str(python), "WORK": str(tmp_path / work)})
    return run


def test_a_stage_goes_on_where_it_was_killed(day, tmp_path):
    asked = tmp_path / "asked"
    (tmp_path / "slow").touch()
    running = day("truth")
    while not (asked.exists() and "linear_scan" in asked.read_text()):
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    (tmp_path / "slow").unlink()
    before = asked.read_text().splitlines()
    assert [line.split()[0] for line in before] == [
        "-m", "bench/ahead.py", "bench/self_check.py", "bench/run.py"]
    asked.unlink()

    said, _ = (again := day("truth")).communicate()
    assert again.returncode == 0 and "all steps passed" in said, said
    assert said.count("passed before") == 3
    assert asked.read_text().splitlines()[0] == before[-1]
    files = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert "truth.tar.gz" in files and len(files) <= 8

    # On another machine, from the archive.
    said, _ = day("truth", "--from", str(tmp_path / "out"), work="elsewhere").communicate()
    assert said.count("passed before") == 9, said


def test_a_step_that_fails_stops_no_other(day, tmp_path):
    (tmp_path / "bad").touch()
    said, _ = (ran := day("truth")).communicate()
    assert ran.returncode == 1 and said.splitlines()[-1].endswith("s: mixers")
    assert "    the very reason" in said and said.count(": ok") + said.count("ok, ") == 8
    with tarfile.open(tmp_path / "out" / "truth.tar.gz") as archive:
        names = [Path(name).name for name in archive.getnames()]
    assert "mixers.txt" in names and "mixers.done" not in names and "fft-conv.done" in names


def test_wheels_are_put_on_the_path_and_what_is_absent_is_named(day, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "fla-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("fla/__init__.py", "")
    for flags in [], ["--wheels", str(wheels)]:
        said, _ = (ran := day("tune", *flags, work=f"work{len(flags)}")).communicate()
        absent, = [line for line in said.splitlines() if line.startswith("not installed, so left")]
        assert ran.returncode == 0 and ("fla" in absent) == (not flags), said


@pytest.mark.parametrize("flags, said", [
    ([], "STAGE OUT"), (["dance", "out"], "STAGE OUT"), (["truth"], "STAGE OUT"),
    (["--wheels", "/no/such", "truth", "out"], "--wheels needs a folder that is there")])
def test_on_gpu_refuses(flags, said, tmp_path):
    ran = subprocess.run([SCRIPT, *flags], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 2 and said in ran.stderr


# ---- the self-check


@pytest.fixture
def self_check(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import self_check
    return self_check


def test_what_is_most_in_doubt_comes_first(self_check, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cases = self_check.chosen(long=True)
    labels = [self_check.label(case) for case in cases]
    assert len(set(labels)) == len(labels) > 300
    scans = sum(case[0] is self_check.linear_scan for case in cases)
    assert all(label.startswith("linear_scan ") for label in labels[:scans])
    headlines = [self_check.label(case) for case in self_check.chosen(False, headline=True)]
    others = [label for label in headlines if not label.startswith("linear_scan ")]
    assert labels[scans:][:len(others)] == others and len(others) == 9
    for label in labels[::40]:
        assert label in map(self_check.label, self_check.chosen(True, only=label))


@pytest.mark.long
def test_a_process_that_dies_or_whose_gpu_failed_is_replaced(self_check, monkeypatch, tmp_path):
    (tmp_path / "odd_work.py").write_text("""import os
def work(case):
    if case == "die":
        os._exit(7)
    return {"process": os.getpid(), "ends": case == "broken"}
""")
    monkeypatch.syspath_prepend(tmp_path)
    import odd_work
    found = {}
    left = self_check.hand_out(odd_work.work, ["a", "b", "die", "c", "broken", "d"], 1, 600,
                               lambda case, result: found.update({case: result}))
    assert left == [] and list(found) == ["a", "b", "die", "c", "broken", "d"]
    assert found["die"]["reason"] == "its process died, exit status 7"
    processes = [found[case]["process"] for case in ("a", "b", "c", "broken", "d")]
    assert processes[0] == processes[1] and processes[2] == processes[3]
    assert len(set(processes)) == 3
    assert self_check.hand_out(odd_work.work, ["a", "b"], 1, 0, None) == ["a", "b"]


def test_a_wrong_case_is_explained_in_ten_lines(self_check, monkeypatch):
    import fastmix
    run = self_check.run

    def wrong(operator, tensors, others, weights=None):
        results, weights = run(operator, tensors, others, weights)
        if fastmix.dispatch.forced() == "triton":
            results["gradient of x"][0, 3, 1] += 1
        return results, weights

    monkeypatch.setattr(self_check, "run", wrong)
    monkeypatch.setattr(self_check.fastmix, "force", pretend_force(monkeypatch))
    case = self_check.cumulative_mean, (1, 260, 15), {}, "float32"
    row = self_check.check(case, "cpu")
    assert not row["ok"] and "at" not in row["results"]["output"]
    assert row["results"]["gradient of x"]["at"] == [0, 3, 1]
    lines = self_check.explained(row, "cuda").splitlines()
    assert len(lines) <= 10 and lines[0] == "WRONG cumulative_mean 1x260x15 float32"
    assert "most at [0, 3, 1]" in lines[2] and "0.0256 % of [1, 260, 15]" in lines[2]
    assert lines[-1].endswith('--only "cumulative_mean 1x260x15 float32"')

    def raises(*arguments):
        raise torch.AcceleratorError("CUDA error: an illegal memory access")
    monkeypatch.setattr(self_check, "run", raises)
    row = self_check.check(case, "cpu")
    assert row["ends"] and "illegal memory access" in self_check.explained(row, "cuda")


def pretend_force(monkeypatch):
    """fastmix.force, in which the fallback stands for Triton's kernels."""
    import contextlib

    import fastmix

    @contextlib.contextmanager
    def force(name):
        with monkeypatch.context() as patched:
            patched.setattr(fastmix.dispatch, "forced", lambda: name)
            with real("fallback"):
                yield

    real = fastmix.force
    return force


# ---- compiling ahead, and predictions


@needs_triton
def test_what_is_compiled_ahead_is_found_from_a_packed_cache(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import ahead
    import self_check
    labels = list(map(self_check.label, self_check.chosen(False)))
    index = labels.index("cumulative_mean 1x260x15 float32")
    launches = ahead.launches_of("sm90", False, False, index)
    key = next(key for key in launches if key[1] == "_sums")
    assert ahead.compile_one("sm90", False, False, index, key) is None
    made = {path.suffix: path for path in tmp_path.rglob("*") if path.is_file()}
    assert ".cubin" in made and ".ptx" in made
    for suffix, path in made.items():
        if suffix not in (".cubin", ".json"):
            path.unlink()
    before = made[".cubin"].stat().st_mtime_ns
    assert ahead.compile_one("sm90", False, False, index, key) is None
    assert made[".cubin"].stat().st_mtime_ns == before and not list(tmp_path.rglob("*.ptx"))


@needs_triton
def test_kernels_of_every_headline_can_be_traced(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import ahead
    import self_check
    for index in range(len(self_check.HEADLINES)):
        assert ahead.launches_of("sm90", False, True, index)


@needs_triton
def test_predictions_are_what_the_script_makes(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCH)
    import predictions
    predictions.write(tmp_path / "made.csv")
    made = (tmp_path / "made.csv").read_text()
    assert made == predictions.TABLE.read_text(), (
        "kernels, or their counts, have changed: python bench/predictions.py")
    lines = list(csv.DictReader(made.splitlines()))
    assert len(lines) == 18
    for line in lines:
        assert int(line["us"]) > int(line["floor_us"]) > 0 and line["reason"]

    page = (ROOT / "docs" / "gpu.md").read_text("utf-8").partition("| | target | expected |")[2]
    for name in "gate_loop 1024×1", "decay_conv", "windowed_sgu w=128":
        both = [line for line in lines if line["row"] == name and line["batch"] == "8"]
        percent = [round(100 * int(line["floor_us"]) / int(line["us"])) for line in both]
        said = next(line for line in page.splitlines() if line.startswith(f"| {name}"))
        assert "{} / {} %".format(*percent) in said.split("|")[3], name

    report = tmp_path / "report.json"
    report.write_text("""{"settings": {"batch": 8}, "header": {"device": "A GPU", "copy_gb_s": 4200,
        "matmul_gflop_s": 780000}, "operators": [
        {"row": "decay_conv", "n": 8192, "status": "ok", "ratio_original": {"forward": 12},
         "forward_ms": {"median": 0.074, "host": 0.2}, "forward_backward_ms": {"median": 0.1}},
        {"row": "cumulative_mean", "n": 8192, "status": "wrong"}]}""")
    predictions.main(["--beside", str(report), str(tmp_path / "absent.json")])
    printed = capsys.readouterr().out
    cells = next([cell.strip() for cell in line.split("|")[1:-1]]
                 for line in printed.splitlines() if line.startswith("| decay_conv"))
    assert cells[:3] == ["decay_conv", "8×8192", "fwd"] and cells[5] == "74.0"
    assert float(cells[6]) == pytest.approx(74 / int(cells[4]), abs=0.01)
    assert cells[7:9] == ["200", "12.0"]
    assert printed.count("wrong") == 2 and printed.count("not measured") == 14
    assert "A GPU: copy 4200 GB/s" in printed


# ---- tuning


CANDIDATE = dict(file="cumulative_mean", kernel="_sums", dtype="float32", shapes=[],
                 option="tile_bytes", before=128, cases=["cumulative_mean 1x260x15 float32"])


@pytest.mark.long
@needs_triton
def test_candidates_are_found_and_compiled(tmp_path):
    ran = subprocess.run(
        [sys.executable, BENCH / "tune.py", "--candidates", tmp_path / "found.json", "--target",
         "sm90", "--only", "cumulative_mean 1x260x15 float32 sliced=True", "--jobs", "1"],
        capture_output=True, text=True, env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())["candidates"]
    case, = CANDIDATE["cases"]
    own = [candidate for candidate in found if candidate["file"] == "cumulative_mean"]
    assert own == [CANDIDATE | {"value": value, "cases": [f"{case} sliced=True"]}
                   for value in (64, 256)]
    others = {(candidate["file"], candidate["kernel"]) for candidate in found[len(own):]}
    assert others == {("scan", "tile")}  # which it launches with, too


@needs_triton
def test_candidates_that_spill_do_not_fit_or_change_nothing_are_left_out(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import triton_static
    import tune
    compiled = types.SimpleNamespace(spills=0, stack=0, shared=1024)
    monkeypatch.setattr(triton_static.Launch, "compiled", lambda launch: compiled)
    label, = CANDIDATE["cases"]

    def why_not(**changes):
        return tune.why_not(CANDIDATE | {"value": 64} | changes, label, "sm90")

    assert why_not() is None
    assert why_not(value=128) == "changes nothing"
    assert why_not(option="no_such_option").startswith("TypeError: ")
    compiled.shared = 228 << 10
    assert why_not() == "_ends needs 233472 bytes of shared memory"
    compiled.stack = 8
    assert why_not() == "_ends spills 8"


@needs_triton
def test_launches_on_the_host_are_counted_and_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import host
    import operators
    monkeypatch.setattr(host, "ROUNDS", 2)
    row = host.measure(operators.windowed_sgu, 8, 8192)
    assert row["launches"] == {"forward": 2, "forward_backward": 12}
    for way in "long", "planned":  # of two calls each, on whatever machine
        assert all(0 < row[f"launchers {way}"][mode] < us for mode, us in row[way].items())


@pytest.mark.long
@needs_triton
def test_the_tuner_writes_the_fastest_that_is_right(tmp_path):
    """End to end but for the times, in the interpreter: one candidate is slower, one gives wrong
    results, one does not run, two are faster."""
    (tmp_path / "odd.py").write_text("""import sys
sys.path.insert(0, sys.argv.pop(1))
import self_check, tune
judged = self_check.Truth.judged
def judge(truth):
    results = judged(truth)
    if tune.file_of("cumulative_mean").LAUNCH.rows[-1].options == {"tile_bytes": 16}:
        results["output"]["at"] = [0]
    return results
self_check.Truth.judged = judge
if __name__ == "__main__":
    tune.main()
""")
    candidates = [CANDIDATE | {"value": value} for value in (64, 256, 16, 32)]
    candidates.append(CANDIDATE | {"option": "no_such_option", "value": 2})
    found = tmp_path / "found.json"
    found.write_text(json.dumps({"target": "sm90", "candidates": candidates}))
    ran = subprocess.run(
        [sys.executable, tmp_path / "odd.py", BENCH, "--time", found, "--out", tmp_path,
         "--device", "cpu", "--made-up"], capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"})
    assert ran.returncode == 0, ran.stderr
    assert "5 candidates timed, 1 rows written" in ran.stdout
    status = {}
    for line in ran.stdout.splitlines()[2:7]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        status[cells[2], cells[4]] = cells[8].split()[0]
    assert status == {("tile_bytes", "64"): "faster", ("tile_bytes", "256"): "slower",
                      ("tile_bytes", "16"): "wrong", ("tile_bytes", "32"): "taken",
                      ("no_such_option", "2"): "wrong"}
    assert len((tmp_path / "tune.jsonl").read_text().splitlines()) == 5
    before = (ROOT / "kernels" / "triton" / "cumulative_mean.py").read_text().splitlines()
    after = (tmp_path / "cumulative_mean.py").read_text().splitlines()
    added = [line for line in after if line not in before]
    assert [line for line in after if line not in added] == [
        line for line in before if line in after] and len(after) == len(before) + len(added)
    assert added[0] == '    Row("_sums", "interpreter", "float32", ANY, dict(tile_bytes=32),'
    reason = " ".join(line.strip() for line in added[1:]).replace('" "', "")  # of several lines
    assert "times made up" in reason and "1000 -> 250 us at cumulative_mean" in reason
    assert max(map(len, added)) <= 100
    compile("\n".join(after), "cumulative_mean.py", "exec")


def test_neighbours_are_a_step_away(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    tune = pytest.importorskip("tune", reason="needs Triton")
    assert tune.neighbours({"num_warps": 4, "num_stages": 1, "maxnreg": 168}) == [
        ("num_warps", 2), ("num_warps", 8), ("num_stages", 2), ("maxnreg", 128), ("maxnreg", 208)]
