"""The report as text (markdown, red where a result is wrong), as JSON and as CSV."""

import csv
import importlib.util
import json
import math
import os
import textwrap
from pathlib import Path

from tabulate import tabulate

from rows import both_shorter
from timing import spread

RED = "\x1b[31m{}\x1b[0m"
BAD = ("wrong", "failed")
TIMES = ("forward_ms", "forward_backward_ms", "step_ms", "first_ms", "token_ms")
NOISY = 0.25  # a spread beyond which a time says little
MODES = ("forward", "forward_backward")


def rows_of(report):
    """All of them; reports of earlier versions have none of text."""
    return report["operators"] + report["models"] + report.get("generation", [])


def text(report, colour, beside=""):
    """The report; `beside`, its comparison with another one, stands before the last lines."""
    notes = Notes()
    operators, models, settings = report["operators"], report["models"], report["settings"]
    generation = report.get("generation", [])
    timed = not settings["check"]
    parts = [heading(report["header"], settings)]
    if operators and timed:
        on_gpu = report["header"]["device_type"] == "cuda"
        speed = SPEED + [("host µs", host)] * on_gpu
        parts += ["## Operators: speed", grid(operators, speed, notes, colour),
                  "## Operators: beside torch's own copy and matmul, and memory",
                  grid(operators, RATES, notes, colour), READING + f"\n{ON_GPU}" * on_gpu]
    if operators:
        wrong = [row for row in report.get("curve", []) if row["status"] in BAD]
        parts += ["## Operators: error against float64",
                  grid(operators + wrong, EXACTNESS, notes, colour), EXAM]
    steps = report.get("steps", [])
    if steps:
        parts += ["## Operators: one step", grid(steps, STEPS, notes, colour), ONE_STEP]
    if models and timed:
        parts += ["## Models: training steps", grid(models, TRAINING, notes, colour)]
    if models:
        parts += ["## Models: losses and gradients beside the original's",
                  grid(models, LEARNING, notes, colour),
                  STEP.format(text=settings["text"] or "the Python standard library's sources",
                              depth=models[0]["arguments"]["depth"])]
    if generation:
        parts += ["## Generation", grid(generation, WRITING if timed else WRITTEN, notes, colour)]
    if generation and timed:
        parts.append(TOKENS.format(depth=generation[0]["arguments"]["depth"]))
    if notes.texts:
        parts.append(notes.lines())
    if report["left_out"]:
        parts.append("\n".join(textwrap.fill(f"left out: {what}", 100, subsequent_indent="    ")
                               for what in report["left_out"]))
    parts += [beside, *(textwrap.fill(line, 100) for line in (noise(report), essence(report)))]
    return "\n\n".join(filter(None, parts))


def noise(report):
    """What to think of the times, where they spread so far that ratios say little."""
    noisy = [f"{row.get('row') or row['model']} n={row['n']}"
             for row in rows_of(report)
             if any(spread(row[key]) > NOISY for key in TIMES if key in row)]
    if not noisy:
        return ""
    return (f"Noisy: the times of {', '.join(noisy)} spread by more than ±{100 * NOISY:.0f}%. "
            "Something else runs on this machine: take these rows' ratios as rough.")


def essence(report):
    """The report in two sentences."""
    rows = [row for row in report["operators"] if "ratio_original" in row]
    rows.sort(key=lambda row: row["ratio_original"]["forward_backward"])
    sentences = []
    if rows:
        best, original = rows[-1], rows[-1]["original"]
        memory = ""
        if original["n"] == best["n"]:
            percent = 100 * best["peak_bytes"] / original["peak_bytes"]
            memory = f" in {percent:.0f} % of its memory"
        ratios = [significant(row["ratio_original"]["forward_backward"])
                  for row in (rows[0], rows[-1], rows[len(rows) // 2])]
        sentences.append(
            f"{best['row']} runs forward and backward {ratios[1]} times as fast as the published "
            f"code{memory}" + (f"; of {len(rows)} rows the slowest gains {ratios[0]} times, the "
                               f"middle one {ratios[2]}." if len(rows) > 1 else "."))
    gains = [row["ratio_original"] for row in report["models"] if "ratio_original" in row]
    if gains:
        ends = dict.fromkeys(map(significant, (min(gains), max(gains))))
        sentences.append(f"Models take training steps {' to '.join(ends)} times as fast as the "
                         "published ones.")
    gains = [row["ratio_original"] for row in report.get("generation", [])
             if "ratio_original" in row]
    if gains:
        ends = dict.fromkeys(map(significant, (min(gains), max(gains))))
        sentences.append(f"Tokens come {' to '.join(ends)} times as fast as the published ones.")
    return " ".join(["In short:", *sentences]) if sentences else ""


READING = """\
Medians of calls taken in turns with the baselines, caches flushed before each call; ± is half
of what lies between the 20th and the 80th percentile. Of two numbers, the first is forward
without gradients, the second forward and backward. "% of torch's" is the time that torch's own
copy takes for the bytes that every algorithm must move, or its matmul for the matrix products
that none can avoid, whichever takes longer, in percent of the time measured: 100 is as fast as
torch's, not a limit. Memory is the peak of forward and backward beyond the inputs."""
ON_GPU = """\
Times are the GPU's own: it was busy until all was launched, and "host µs" is what that took."""
EXAM = """\
Error: max |difference| / max |truth|, the worst of all outputs or of all gradients, over the
first steps of the last heads or channels. Allowed: twice the error of the plain definition in
the same dtype, plus rounding."""
ONE_STEP = """\
Calls of one step and one sequence, each from the state that the one before returned, after the
context: the time is mostly checks, dispatch and allocation. An addition: torch's, of as many
numbers as a step has channels, in turns with them, the caches of the processor as they are."""
STEP = """\
A step is forward, backward and Adam on the next bytes of {text}:
vocabulary 256, depth {depth}, and the batch, length, width and heads above. Linear floor: the
products with the weights of Linear layers at the measured matmul rate, which both sides pay.
Mixing: the part of a step that fastmix's operators and their gradients take. Memory is the peak
of a step beyond the weights and Adam's averages. Off by: the worst relative difference from the
original's losses in the first two steps / from any parameter's first gradient."""

TOKENS = """\
Text: depth {depth}, and the width and heads above. First token: the model over a context that
leaves a cache behind, and beside it over the same context as in training. Then tokens one at a
time, each from the cache of those before, the caches of the processor as they are. Worst: the
slowest of them, and of the online convolution's the one that begins a new epoch. Floor: the
Linear layers of the model alone, on one token. Cache: what is kept. × original: a forward of the
published model over the whole context, which is what its own wrapper does for each token, timed
for one to five tokens."""


def heading(h, s):
    flags = " ".join(h["cpu_flags"]) or "flags unknown"
    lines = [
        f"# fastmix on {h['device']}", "",
        f"CPU: {h['cpu']}, {h['cores']} cores, {h['threads']} used, {flags}",
        *([f"kernels for {h['instruction_set']}, torch's own for {h['torch_instruction_set']}"]
          if h.get("instruction_set") else []),  # reports of earlier versions do not say
        f"torch {h['torch']}, triton {h['triton']}, python {h['python']}, "
        f"compiler {h['compiler']}, fastmix {h['fastmix']}, commit {h['commit']}",
        f"measured: copy {h['copy_gb_s']:.1f} GB/s (read + write), "
        f"matmul {h['matmul_gflop_s']:.0f} GFLOP/s in {h['matmul_dtype']}",
        f"batch {s['batch']}, sequence {', '.join(map(str, s['seq']))}, width {s['dim']}, "
        f"{s['heads']} heads, {s['dtype']}"]
    return "\n".join(lines)


class Notes:
    def __init__(self):
        self.texts = []

    def mark(self, note):
        """The footnote's number; the same text is noted once."""
        if note not in self.texts:
            self.texts.append(note)
        return f"[{self.texts.index(note) + 1}]"

    def lines(self):
        return "\n".join(textwrap.fill(f"[{i}] {note}", 100, subsequent_indent="    ")
                         for i, note in enumerate(self.texts, 1))


def grid(rows, columns, notes, colour):
    lines = tabulate([[cell(row, notes) for _, cell in columns] for row in rows],
                     [title for title, _ in columns], "pipe", disable_numparse=True,
                     colalign=["left"] + ["right"] * (len(columns) - 1)).splitlines()
    if colour:
        for i, row in enumerate(rows):
            if row["status"] in BAD:
                lines[i + 2] = RED.format(lines[i + 2])
    return "\n".join(lines)


def significant(x):
    """Three digits, and no exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def number(value, scale=1):
    """One number, or one of each mode."""
    values = [value.get(mode) for mode in MODES] if isinstance(value, dict) else [value]
    return " / ".join("–" if v is None else significant(v / scale) for v in values)


def name(row, notes):
    return row.get("row") or row["model"]


def time(key):
    def cell(row, notes):
        if row["status"] in BAD:
            return verdict(row, notes)
        ms = row[key]
        return f"{significant(ms['median'])} ±{100 * spread(ms):.0f}%"
    return cell


def against(baseline):
    def cell(row, notes):
        other = row.get(baseline)
        if row["status"] in BAD:
            return "–"
        if other is None:
            return "left out"
        marks = ""
        if other.get("n", row["n"]) != row["n"]:
            marks += notes.mark(both_shorter(row))
        if other.get("reason"):
            marks += notes.mark(other["reason"])
        value = row.get(f"ratio_{baseline}")
        shown = other["status"] if value is None else number(value)
        spreads = row.get(f"ratio_{baseline}_spread")
        if spreads is not None:
            worst = max(spreads.values()) if isinstance(spreads, dict) else spreads
            shown += f" ±{100 * worst:.0f}%"
        return f"{shown} {marks}".strip()
    return cell


def host(row, notes):
    """What the host took to launch what GPUs were timed at."""
    return number({mode: row.get(f"{mode}_ms", {}).get("host") for mode in MODES}, 1e-3)


def rate(key, scale=1):
    def cell(row, notes):
        return number(row[key], scale) if key in row else "–"
    return cell


def linear_floor(row, notes):
    if "linear_floor_ms" not in row:
        return "–"
    marks = ""
    if row["linear_floor_ms"] > row["step_ms"]["median"]:
        marks = " " + notes.mark(
            "the step took less time than its matrix products alone, at the matmul rate measured "
            "before: the machine was slower then, or multiplies these shapes faster")
    return significant(row["linear_floor_ms"]) + marks


def bound(row, notes):
    if "bound" not in row:
        return "–"
    return " / ".join(dict.fromkeys(row["bound"][mode] for mode in MODES))


def memory(baseline=None):
    def cell(row, notes):
        holder = row.get(baseline, {}) if baseline else row
        if "peak_bytes" not in holder:
            return "–"
        shorter = holder.get("n", row["n"]) != row["n"]
        return significant(holder["peak_bytes"] / 1e6) + (f" at {holder['n']}" if shorter else "")
    return cell


def errors(key, baseline=None):
    def cell(row, notes):
        holder = row.get(baseline) or {} if baseline else row
        if key not in holder:
            return "–"
        return " / ".join(f"{float(x):.0e}" for x in holder[key].values())
    return cell


def steps(row, notes):
    return " / ".join(str(count) for count in row["steps"].values())


def verdict(row, notes):
    mark = notes.mark(row["reason"]) if row.get("reason") else ""
    status = row["status"].upper() if row["status"] in BAD else row["status"]
    return f"{status} {mark}".strip()


WHO = [("operator", name), ("n", lambda row, notes: str(row["n"])),
       ("runs on", lambda row, notes: row["implementation"])]
SPEED = [*WHO, ("forward ms", time("forward_ms")), ("fwd+bwd ms", time("forward_backward_ms")),
         ("× original", against("original")), ("× compiled", against("compiled"))]
RATES = [*WHO, ("Mtoken/s", rate("tokens_per_s", 1e6)), ("GB/s", rate("gb_per_s")),
          ("% of torch's", rate("percent_of_torch")), ("torch's", bound), ("peak MB", memory()),
          ("original MB", memory("original"))]
EXACTNESS = [*WHO, ("result", verdict), ("steps", steps),
             ("error fwd / bwd", errors("errors")),
             ("allowed", errors("limits")), ("original's error", errors("errors", "original"))]
TRAINING = [("model", name), *WHO[1:], ("step ms", time("step_ms")),
            ("linear floor ms", linear_floor), ("mixing %", rate("mixing_percent")),
            ("ktoken/s", rate("tokens_per_s", 1e3)), ("× original", against("original")),
            ("× compiled", against("compiled"))]
LEARNING = [("model", name), *WHO[1:], ("result", verdict), ("off by", errors("errors")),
            ("allowed", errors("limits")), ("original's", errors("errors", "original")),
            ("peak MB", memory()), ("original MB", memory("original"))]
WHOSE = [("model", lambda row, notes: row["model"]),
         ("batch", lambda row, notes: str(row["batch"])),
         ("context", lambda row, notes: str(row["n"])), WHO[2]]
WRITING = [*WHOSE, ("first token ms", time("first_ms")), ("× plain", rate("ratio_plain")),
           ("token ms", time("token_ms")), ("worst ms", rate("worst_ms")),
           ("tokens/s", rate("tokens_per_s")), ("× floor", rate("ratio_floor")),
           ("cache MB", rate("cache_bytes", 1e6)), ("× original", against("original"))]
WRITTEN = [*WHOSE, ("result", verdict), ("off by", errors("errors")), ("allowed", errors("limits"))]
STEPS = [("operator", name), ("context", lambda row, notes: str(row["context"])), WHO[2],
         ("step µs", time("step_us")), ("worst µs", rate("worst_us")),
         ("× an addition", rate("ratio_addition"))]


# What a curve needs of a row that is right.
POINT = ("row", "n", "implementation", "status", "forward_ms", "forward_backward_ms", "peak_bytes",
         "original")


def point(row):
    """The row without what only tables show of it."""
    if row["status"] in BAD:
        return row
    return {key: ({k: v for k, v in value.items() if k in (*POINT, "reason")}
                  if key == "original" else value)
            for key, value in row.items() if key in POINT}


def why_not_written(flag, path):
    """What to say after the flag's name, or None: found before measuring, not after it."""
    if path is None:
        return None
    path = Path(path)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        return f": {path} cannot be written; name a file in a folder that exists"
    if flag == "plot":
        if importlib.util.find_spec("matplotlib") is None:
            return " needs matplotlib: pip install matplotlib"
        from matplotlib.backend_bases import FigureCanvasBase
        formats = FigureCanvasBase.get_supported_filetypes()
        if path.suffix[1:].lower() not in formats:
            return f": {path} must end with one of .{' .'.join(sorted(formats))}"
    return None


def settings(options):
    """What a report says of its options: all but the files, which are of one machine."""
    files = ("json", "csv", "plot", "compare")
    return {name: value for name, value in vars(options).items() if name not in files}


def write_json(report, path):
    Path(path).write_text(lines_of_json(plain(report)))


def plain(value):
    """What JSON knows, numbers to seven digits: more is noise."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else str(value)
    return value


def lines_of_json(report):
    """A dict as JSON, each row of a list of rows on a line of its own: what changes is seen."""
    def dumped(value):
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    def items(value):
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        return "[\n" + ",\n".join(map(dumped, value)) + "]" if rows else dumped(value)
    return "{" + ",\n".join(f"{dumped(key)}:{items(v)}" for key, v in report.items()) + "}\n"


def write_csv(report, path):
    """One line for each row; nested values become columns named outer.inner."""
    def flat(value, prefix=""):
        for key, inner in value.items():
            if isinstance(inner, dict):
                yield from flat(inner, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", inner
    rows = [dict(flat(plain(row))) for row in rows_of(report)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
