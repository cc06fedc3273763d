"""Two reports side by side: what moved by more than its noise.

    python bench/run.py --compare before.json
    python bench/compare.py before.json after.json
"""

import argparse
import json
from pathlib import Path

from tabulate import tabulate

from table import TIMES, rows_of, significant
from timing import spread

TITLES = dict(zip(TIMES, ("forward", "fwd+bwd", "step", "first token", "token")))


def read(path):
    """A report that --json wrote; ValueError if the file holds something else."""
    report = json.loads(Path(path).read_text())
    parts = {"header", "settings", "operators", "models", "curve"}
    if not isinstance(report, dict) or not parts <= report.keys():
        raise ValueError(f"{path} is not a report of bench/run.py --json, which has "
                         f"{', '.join(sorted(parts))}")
    return report


def key(row):
    return row.get("row") or row["model"], row["n"], row["implementation"]


def moved(before, after):
    """Whether two timings differ by more than both spread."""
    return before["p80"] < after["p20"] or after["p80"] < before["p20"]


def text(report, other):
    """A table of the rows that both reports have."""
    lines = []
    earlier = {key(row): row for row in rows_of(other)}
    for row in rows_of(report):
        twin = earlier.get(key(row), {})
        for ms in (ms for ms in TIMES if ms in row and ms in twin):
            times = twin[ms], row[ms]
            lines.append([
                row.get("row") or row["model"], row["n"], TITLES[ms],
                *(f"{significant(t['median'])} ±{100 * spread(t):.0f}%" for t in times),
                f"{times[0]['median'] / times[1]['median']:.2f}",
                "" if not moved(*times) else
                "faster" if times[1]["median"] < times[0]["median"] else "slower"])
    if not lines:
        return "No row of this report is in the other one."
    machines = [f"{r['header']['device']}, {r['header']['threads']} cores used, "
                f"kernels for {r['header'].get('instruction_set') or 'an unknown set'}, "
                f"commit {r['header']['commit']}"
                for r in (other, report)]
    settings = {name: (other["settings"].get(name), report["settings"].get(name))
                for name in ("batch", "dim", "heads", "dtype", "depth")}
    different = [f"{name} {a} and {b}" for name, (a, b) in settings.items() if a != b]
    return "\n".join([
        "## Beside another report", "", f"other: {machines[0]}", f"this:  {machines[1]}",
        *[f"not the same settings: {', '.join(different)}"] * bool(different), "",
        tabulate(lines, ["row", "n", "", "other ms", "this ms", "× as fast", "moved"], "pipe",
                 disable_numparse=True, colalign=["left", "right", "left", *["right"] * 3, "left"]),
        "", "Moved: what lies between the 20th and the 80th percentile does not overlap."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    options = parser.parse_args()
    try:
        reports = read(options.after), read(options.before)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(text(*reports))
