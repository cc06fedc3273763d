"""Times the neighbours of the Triton kernels' launch choices, and writes the tables anew.

    python bench/tune.py --candidates FILE --target sm90    # compiles them; needs no GPU
    python bench/tune.py --time FILE --out DIR              # on a GPU

A candidate is one option of what a file's LAUNCH has for a kernel (tile, warps, stages,
registers), halved or doubled, or a stage more or less. Those that spill, do not fit or do not
compile are left out before a GPU sees them. There each is held against float64, then timed in turns
with what is chosen now: forward and backward at the shapes of the report (or of --only), in a
process that may die. The fastest of a kernel, if it gains more than MARGIN and than its times
spread, becomes a row, whose reason is the measurement. DIR gets the kernels' files with such rows,
and a line of tune.jsonl for each candidate. Rows are for a class of shapes and not for the shape
that was timed: bench/triton_static.py tells whether all of it still compiles without a spill,
bench/self_check.py whether it is right.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import json
import math
import multiprocessing
import os
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import patch

import timing  # before torch: it quiets torch's profiler

# isort: split
import torch
import triton

import ahead
import self_check
import table
import triton_static
from fastmix import env
from fastmix._triton import plans, target

KERNELS = Path(__file__).parents[1] / "kernels" / "triton"
FILES = ("cumulative_mean", "decay_conv", "gate_loop_diagonal", "gate_loop_heads", "linear_scan",
         "scan", "windowed_sgu")
MARGIN = 0.02  # of the time
SECONDS = 0.3  # to time one candidate for
SHARED = {"sm80": 163, "sm90": 227, "sm100": 227, "gfx942": 64}  # KB that a program may have


def file_of(name):
    return importlib.import_module(f"fastmix._triton.{name}")


def table_with(candidate, family):
    """The file's LAUNCH and a row for the candidate, of the narrowest class of shapes."""
    row = target.Row(candidate["kernel"], family, candidate["dtype"],
                     candidate["shapes"][-1] if candidate["shapes"] else target.ANY,
                     {candidate["option"]: candidate["value"]}, "")
    return target.Table(*file_of(candidate["file"]).LAUNCH.rows, row)


@contextlib.contextmanager
def using(tables):
    """Launchers look their choices up in these: {file: Table}."""
    with contextlib.ExitStack() as stack:
        stack.callback(plans.forget)
        for file, chosen in tables.items():
            stack.enter_context(patch.object(file_of(file), "LAUNCH", chosen))
        plans.forget()
        yield


def case_of(label):
    """Returns the case of self_check that has this label."""
    for case in self_check.chosen(True):
        if self_check.label(case) == label:
            return case
    raise LookupError(f"bench/self_check.py has no case {label}")


# ---- candidates, compiled: without a GPU


def neighbours(options):
    """[(option, value)], each one step from what is chosen."""
    found = []
    for name, value in options.items():
        if name in ("num_stages", "STAGES"):
            others = [value - 1, value + 1]
        elif name == "maxnreg":
            others = [round(0.75 * value / 8) * 8, min(255, round(1.25 * value / 8) * 8)]
        else:
            others = [value // 2, 2 * value]
        found += [(name, other) for other in others if other >= 1 and other != value]
    return found


def traced(label, arch, tables):
    """{key: Launch} of a case with other tables."""
    make, shape, how, dtype = case_of(label)
    with using(tables), triton_static.recording(arch) as launches, ahead.launchers_on_meta():
        self_check.run(make.__name__, *self_check.arguments(
            make, shape, how, getattr(torch, dtype), torch.device("meta")))
    return launches


@functools.lru_cache(maxsize=16)
def chosen_for(label, arch):
    """([candidates of a case], the keys of the kernels that it launches now)."""
    tables = {file: target.Table(*file_of(file).LAUNCH.rows) for file in FILES}
    launches = traced(label, arch, tables)
    return [dict(file=file, kernel=kernel, dtype=str(dtype)[6:], shapes=list(shapes), option=option,
                 before=options[option], value=value)
            for file, looked_up in tables.items()
            for (kernel, _, dtype, shapes), options in looked_up._chosen.items()
            for option, value in neighbours(options)], set(launches)


def why_not(candidate, label, arch):
    """What stands against a candidate for a case, or None. What it launches is compiled."""
    family = {"gfx942": "amd"}.get(arch, arch)
    try:
        launches = traced(label, arch, {candidate["file"]: table_with(candidate, family)})
        new = [launch for key, launch in launches.items() if key not in chosen_for(label, arch)[1]]
        for launch in new:
            compiled = launch.compiled()
            if compiled.spills or compiled.stack:
                return f"{launch.function.__name__} spills {compiled.spills or compiled.stack}"
            if compiled.shared > SHARED[arch] << 10:
                return f"{launch.function.__name__} needs {compiled.shared} bytes of shared memory"
    except Exception as error:  # whatever a launcher or the compiler raises
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None if new else "changes nothing"


def find_candidates(path, arch, headline, only, jobs, seconds):
    labels = [self_check.label(case) for case in self_check.chosen(not headline, headline, only)]
    candidates = {}
    for label in labels:
        for candidate in chosen_for(label, arch)[0]:
            candidates.setdefault(json.dumps(candidate), []).append(label)
    with concurrent.futures.ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn")) as pool:
        running = {(text, label): pool.submit(why_not, json.loads(text), label, arch)
                   for text, its in candidates.items() for label in its}
        concurrent.futures.wait(running.values(), None if seconds == math.inf else seconds)
        pool.shutdown(wait=False, cancel_futures=True)
    kept = []
    for text, its in candidates.items():
        reasons = ["no time to compile it" if running[text, label].cancelled() else
                   running[text, label].result() for label in its]
        if any(reason not in (None, "changes nothing") for reason in reasons):
            print(f"left out: {text}: {next(filter(None, reasons))}")
        elif None in reasons:
            kept.append(json.loads(text) | {
                "cases": [label for label, reason in zip(its, reasons) if reason is None]})
    path.write_text(table.lines_of_json({"target": arch, "candidates": kept}))
    print(f"{len(kept)} of {len(candidates)} candidates are to be timed for {arch}")


# ---- timing them


@functools.lru_cache(maxsize=1)
def truth_of(label, device):
    make, shape, how, dtype = case_of(label)
    torch.manual_seed(0)
    return self_check.Truth(make, shape, how, getattr(torch, dtype), torch.device(device))


def made_up(candidate):
    """Invents times, to try this program without a GPU: the smaller an option, the faster."""
    return {"now": timing.summary([1.0]),
            "tried": timing.summary([candidate["value"] / candidate["before"]])}


def evaluate(job, device, invented):
    """Runs a candidate at a case → {wrong: why}, or its times: {now, tried}."""
    candidate, label = job
    truth = truth_of(label, device)
    tried = {candidate["file"]: table_with(candidate, target.family())}
    try:
        with using(tried):
            judged = truth.judged()
        wrong = [f"{name} is off by {result['error']:.1e}, where {result['limit']:.1e} is allowed"
                 for name, result in judged.items() if "at" in result]
        if wrong:
            return {"wrong": "; ".join(wrong)}
        if invented:
            return made_up(candidate)
        step = functools.partial(self_check.run, *truth.call)
        with self_check.fastmix.force("triton"):
            return timing.side_by_side(
                {"now": (contextlib.nullcontext, step),
                 "tried": (functools.partial(using, tried), step)}, SECONDS, torch.device(device))
    except Exception as error:  # the others are still to be timed
        return {"wrong": f"{type(error).__name__}: {str(error)[:300]}",
                "ends": isinstance(error, torch.AcceleratorError)}


def judged_rows(measured):
    """A row for each candidate: what it was, and whether it is the one to take for its kernel."""
    rows, best = [], {}
    for candidate, results in measured:
        wrong = [result.get("wrong") or result.get("reason") for result in results.values()
                 if "tried" not in result]
        row = dict(candidate, status="wrong" if wrong else "slower", reason="; ".join(wrong))
        if not wrong:
            ratios = [result["tried"]["median"] / result["now"]["median"]
                      for result in results.values()]
            spreads = [timing.spread(result[name]) for result in results.values()
                       for name in ("now", "tried")]
            row["ratio"] = math.prod(ratios) ** (1 / len(ratios))
            row["times"] = {label: [result[name]["median"] for name in ("now", "tried")]
                            for label, result in results.items()}
            if row["ratio"] < 1 - max(MARGIN, *spreads):
                row["status"] = "faster"
                key = row["file"], row["kernel"], row["dtype"], tuple(row["shapes"][-1:])
                if key not in best or row["ratio"] < best[key]["ratio"]:
                    best[key] = row
        rows.append(row)
    for row in best.values():
        row["status"] = "taken"
    return rows


def written_row(row, where):
    """A taken candidate as the lines of a Row."""
    shapes = f'"{row["shapes"][-1]}"' if row["shapes"] else "ANY"
    times = ", ".join(f"{1e3 * before:.0f} -> {1e3 * after:.0f} us at {label}"
                      for label, (before, after) in row["times"].items())
    reason = textwrap.wrap(f"measured on {where}: {times}", 86)
    return (f'    Row("{row["kernel"]}", "{target.family()}", "{row["dtype"]}", {shapes}, '
            f'dict({row["option"]}={row["value"]}),\n        '
            + "".join(f'"{line} "\n        ' for line in reason[:-1]) + f'"{reason[-1]}"),\n')


def write_files(rows, folder, where):
    """The kernels' files with the rows that were taken, at the end of their tables."""
    for file in sorted({row["file"] for row in rows if row["status"] == "taken"}):
        source = (KERNELS / f"{file}.py").read_text()
        before, start, rest = source.partition("\nLAUNCH = Table(\n")
        body, end, after = rest.partition("\n)\n")
        added = "".join(written_row(row, where) for row in rows
                        if row["status"] == "taken" and row["file"] == file)
        (folder / f"{file}.py").write_text(f"{before}{start}{body}\n{added.rstrip()}{end}{after}")


REPORT = [
    ("kernel", lambda row, _: f"{row['file']} {row['kernel']}"),
    ("dtype", lambda row, _: " ".join([row["dtype"], *row["shapes"]])),
    ("option", lambda row, _: row["option"]), ("now", lambda row, _: str(row["before"])),
    ("tried", lambda row, _: str(row["value"])),
    ("µs now", lambda row, _: " / ".join(f"{1e3 * t[0]:.0f}" for t in row["times"].values())
        if "times" in row else "–"),
    ("tried", lambda row, _: " / ".join(f"{1e3 * t[1]:.0f}" for t in row["times"].values())
        if "times" in row else "–"),
    ("×", lambda row, _: f"{row['ratio']:.3f}" if "ratio" in row else "–"),
    ("", lambda row, _: f"{row['status']} {row['reason']}"[:120].strip())]


def time_candidates(path, out, device, minutes, invented):
    candidates = json.loads(path.read_text())["candidates"]
    jobs = [(candidate, label) for candidate in candidates for label in candidate["cases"]]
    jobs.sort(key=lambda job: job[1])  # a case's float64 is computed once
    results = [{} for _ in candidates]
    end = time.monotonic() + 60 * minutes
    with open(out / "tune.jsonl", "w", buffering=1) as file:
        def each(job, result):
            results[candidates.index(job[0])][job[1]] = result
            print(json.dumps(table.plain(dict(job[0], case=job[1], result=result))), file=file)

        left = self_check.hand_out(
            functools.partial(evaluate, device=device, invented=invented), jobs, 1,
            end - time.monotonic(), each)
    rows = judged_rows([
        (candidate, its) for candidate, its in zip(candidates, results)
        if len(its) == len(candidate["cases"])])
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else env.processor()[0]
    if invented:
        name += ", times made up"
    write_files(rows, out, f"{name}, Triton {triton.__version__}, commit {env.commit()}")
    rows.sort(key=lambda row: row.get("ratio", 0))
    print(table.grid(rows, REPORT, None, False))
    taken = sum(row["status"] == "taken" for row in rows)
    print(f"{len(rows)} candidates timed, {taken} rows written to {out}"
          + (f"; no time for {len(left)} measurements" if left else ""))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--candidates", metavar="FILE", type=Path, help="find, compile, write them")
    what.add_argument("--time", metavar="FILE", type=Path, help="time those of this file")
    parser.add_argument("--target", choices=list(SHARED), help="by default what is here")
    parser.add_argument("--only", default="", metavar="WORDS",
                        help="cases of bench/self_check.py, in place of the headlines")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("."))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after these")
    parser.add_argument("--made-up", action="store_true",
                        help="times that are made up, to try all else without a GPU")
    options = parser.parse_args(argv)
    if options.candidates:
        find_candidates(options.candidates, options.target or ahead.target_here(),
                        not options.only, options.only, options.jobs, 60 * options.minutes)
    elif not options.out.is_dir():
        parser.error(f"--out: {options.out} is no folder")
    else:
        time_candidates(options.time, options.out, options.device, options.minutes,
                        options.made_up)
    return 0


if __name__ == "__main__":
    sys.exit(main())
