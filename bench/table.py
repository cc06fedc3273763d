"""The report on a terminal (markdown; in colour where it is one), as JSON and as CSV."""

import csv
import json
import math

RED = "\x1b[31m{}\x1b[0m"


class Notes:
    """Footnotes: mark(text) returns its number, the same for the same text."""

    def __init__(self):
        self.texts = []

    def mark(self, text):
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


def report(header, settings, operators, models, left_out, colour):
    notes = Notes()
    lines = [*heading(header, settings), ""]
    if operators:
        lines += ["## Operators", "", *grid(
            ["operator", "runs on", "forward ms", "fwd+bwd ms", "× original", "× compiled",
             "peak MB", "error"],
            [speed_cells(row, notes) for row in operators], operators, colour), ""]
        lines += ["## How close to the machine's limit, and to float64", "", *grid(
            ["operator", "runs on", "Mtoken/s", "GB/s", "% of limit", "original MB", "error fwd",
             "bwd", "allowed fwd", "bwd", "original's"],
            [limit_cells(row, notes) for row in operators], operators, colour), ""]
    if models:
        lines += ["## Models", "", *grid(
            ["model", "runs on", "step ms", "ktoken/s", "× original", "× compiled", "peak MB",
             "original MB", "losses off", "gradients"],
            [model_cells(row, notes) for row in models], models, colour), ""]
    lines += [f"[{i + 1}] {text}" for i, text in enumerate(notes.texts)]
    lines += [f"left out: {text}" for text in left_out]
    lines += explanations(operators, models)
    return "\n".join(lines)


def heading(h, s):
    cpu = f"{h['cores']} cores, {h['threads']} threads, {' '.join(h['cpu_flags']) or 'no flags known'}"
    name = h["device"] if h["device_type"] == "cpu" else f"{h['device']} (host {h['cpu']})"
    return [
        f"# fastmix on {h['device_type'].upper()}: {name}", "",
        f"{cpu}",
        f"torch {h['torch']} · triton {h['triton']} · compiler {h['compiler']} · "
        f"Python {h['python']} · commit {h['commit']}",
        f"measured limits: copy {h['copy_gb_s']:.1f} GB/s (read + write), "
        f"matmul {h['matmul_gflop_s']:.0f} GFLOP/s in {h['matmul_dtype']}",
        f"batch {s['batch']}, sequence {', '.join(map(str, s['seq']))}, width {s['dim']}, "
        f"{s['heads']} heads, {s['dtype']}"]


def explanations(operators, models):
    lines = []
    if operators:
        lines += [
            "", "Times are medians of calls taken in turns with the original, caches flushed before",
            "each; ± is half of what lies between the 20th and the 80th percentile. Where two numbers",
            "stand, the first is forward (no gradients), the second forward+backward; one number of",
            "GB/s, of tokens or of memory: forward for the rates, forward+backward for the memory."]
    return lines


def speed_cells(row, notes):
    cells = [name_of(row), row["implementation"]]
    if row["status"] != "ok":
        return [*cells, verdict(row, notes), "–", "–", "–", "–", worst(row)]
    return [*cells, milliseconds(row.get("forward_ms")), milliseconds(row.get("forward_backward_ms")),
            ratio(row, "original", notes), ratio(row, "compiled", notes),
            megabytes(row.get("peak_bytes")), worst(row)]
