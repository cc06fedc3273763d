"""The report as text (markdown, red where a result is wrong), as JSON and as CSV."""

import csv
import json
import math
import textwrap

RED = "\x1b[31m{}\x1b[0m"
BAD = ("wrong", "failed")
MODES = ("forward", "forward_backward")


def text(report, colour):
    notes = Notes()
    operators, models, settings = report["operators"], report["models"], report["settings"]
    timed = not settings["check"]
    parts = [heading(report["header"], settings)]
    if operators and timed:
        parts += ["## Operators: speed", grid(operators, SPEED, notes, colour),
                  "## Operators: the machine's limit, and memory",
                  grid(operators, LIMITS, notes, colour), READING]
    if operators:
        parts += ["## Operators: error against float64",
                  grid(operators, EXACTNESS, notes, colour), EXAM]
    if models and timed:
        parts += ["## Models: training steps", grid(models, TRAINING, notes, colour)]
    if models:
        parts += ["## Models: losses and gradients beside the original's",
                  grid(models, LEARNING, notes, colour),
                  STEP.format(text=settings["text"] or "the Python standard library's sources",
                              depth=models[0]["arguments"]["depth"])]
    if notes.texts:
        parts.append("\n".join(textwrap.fill(f"[{i}] {note}", 100, subsequent_indent="    ")
                               for i, note in enumerate(notes.texts, 1)))
    if report["left_out"]:
        parts.append("\n".join(textwrap.fill(f"left out: {what}", 100, subsequent_indent="    ")
                               for what in report["left_out"]))
    return "\n\n".join(parts)


READING = """\
Medians of calls taken in turns with the baselines, caches flushed before each call; ± is half
of what lies between the 20th and the 80th percentile. Of two numbers, the first is forward
without gradients, the second forward and backward. The limit counts the bytes that every
algorithm must move against the measured copy bandwidth, or the matrix products that it cannot
avoid against the measured matmul rate, whichever takes longer. Memory is the peak of forward
and backward beyond the inputs."""
EXAM = """\
Error: max |difference| / max |truth|, the worst of all outputs or of all gradients, over the
first steps of the last heads or channels. Allowed: twice the error of the plain definition in
the same dtype, plus rounding."""
STEP = """\
A step is forward, backward and Adam on the next bytes of {text}:
vocabulary 256, depth {depth}, and the batch, length, width and heads above. Linear floor: the
products with the weights of Linear layers at the measured matmul rate, which both sides pay.
Mixing: the part of a step that fastmix's operators and their gradients take. Memory is the peak
of a step beyond the weights and Adam's averages. Off by: the worst relative difference from the
original's losses in the first two steps / from any parameter's first gradient."""


def heading(h, s):
    flags = " ".join(h["cpu_flags"]) or "flags unknown"
    lines = [
        f"# fastmix on {h['device']}", "",
        f"CPU: {h['cpu']}, {h['cores']} cores, {h['threads']} used, {flags}",
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


def grid(rows, columns, notes, colour):
    cells = [[title for title, _ in columns]]
    cells += [[cell(row, notes) for _, cell in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line(texts):
        padded = [t.rjust(w) for t, w in zip(texts, widths)]
        padded[0] = texts[0].ljust(widths[0])
        return "| " + " | ".join(padded) + " |"

    lines = [line(texts) for texts in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-")
                                   for i, w in enumerate(widths)) + "|")
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
    values = [value[mode] for mode in MODES] if isinstance(value, dict) else [value]
    return " / ".join(significant(v / scale) for v in values)


def name(row, notes):
    return row.get("row") or row["model"]


def time(key):
    def cell(row, notes):
        if row["status"] in BAD:
            return verdict(row, notes)
        ms = row[key]
        return f"{significant(ms['median'])} ±{50 * (ms['p80'] - ms['p20']) / ms['median']:.0f}%"
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
            marks += notes.mark(f"both sides at n={other['n']}, because the original "
                                f"{row['original']['shortened']} at n={row['n']}")
        if other.get("reason"):
            marks += notes.mark(other["reason"])
        value = row.get(f"ratio_{baseline}")
        shown = other["status"] if value is None else number(value)
        return f"{shown} {marks}".strip()
    return cell


def rate(key, scale=1):
    def cell(row, notes):
        return number(row[key], scale) if key in row else "–"
    return cell


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
LIMITS = [*WHO, ("Mtoken/s", rate("tokens_per_s", 1e6)), ("GB/s", rate("gb_per_s")),
          ("% of limit", rate("percent_of_limit")), ("limit", bound), ("peak MB", memory()),
          ("original MB", memory("original"))]
EXACTNESS = [*WHO, ("result", verdict), ("steps", steps),
             ("error fwd / bwd", errors("errors")),
             ("allowed", errors("limits")), ("original's error", errors("errors", "original"))]
TRAINING = [("model", name), *WHO[1:], ("step ms", time("step_ms")),
            ("linear floor ms", rate("linear_floor_ms")), ("mixing %", rate("mixing_percent")),
            ("ktoken/s", rate("tokens_per_s", 1e3)), ("× original", against("original")),
            ("× compiled", against("compiled"))]
LEARNING = [("model", name), *WHO[1:], ("result", verdict), ("off by", errors("errors")),
            ("allowed", errors("limits")), ("original's", errors("errors", "original")),
            ("peak MB", memory()), ("original MB", memory("original"))]


def write_json(report, path):
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value
    with open(path, "w") as file:
        json.dump(plain(report), file, indent=1, allow_nan=False)


def write_csv(report, path):
    """One line for each row; nested values become columns named outer.inner."""
    def flat(value, prefix=""):
        for key, inner in value.items():
            if isinstance(inner, dict):
                yield from flat(inner, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", inner
    rows = [dict(flat(row)) for row in report["operators"] + report["models"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
