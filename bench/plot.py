"""The picture of a report: time and memory against sequence length, and the rate beside that of
torch's own copy and matmul; another report's times in the same panels."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

OURS = ("#0f766e", "#b45309", "#6d28d9")
ORIGINAL = "#8a8f98"
INK = "#22262b"
STYLE = {
    "font.size": 9, "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": "#c9cdd3", "axes.spines.top": False, "axes.spines.right": False,
    "xtick.color": "#5b626b", "ytick.color": "#5b626b", "axes.titlesize": 10,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.grid": True,
    "grid.color": "#eceef1", "axes.axisbelow": True}


def draw(report, path, other=None):
    timed = [row for row in report["operators"] if row["status"] == "ok"]
    points = [row for row in report["curve"] if row["status"] == "ok"] + timed
    names = list(dict.fromkeys(row["implementation"] for row in points))
    colours = dict(zip(names, OURS))
    titles = list(dict.fromkeys(row["row"] for row in timed + points))
    across = min(4, max(1, len(titles)))
    down = max(1, -(-len(titles) // across))
    heights = [2.3 * down + 0.9, 2.3 * down + 0.5, 0.34 * len(timed) + 1]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(3.2 * across + 0.4, sum(heights)), layout="constrained")
        upper, middle, lower = figure.subfigures(3, 1, height_ratios=heights)
        for part, quantity in (upper, time), (middle, memory):
            panels = list(part.subplots(down, across, squeeze=False).flat)
            for panel, title in zip(panels, titles):
                theirs = [row for row in (other["operators"] + other["curve"] if other else [])
                          if row["row"] == title and row["status"] == "ok"]
                against_length(panel, [r for r in points if r["row"] == title], theirs, colours,
                               quantity)
            for panel in panels[len(titles):]:
                panel.axis("off")
            if quantity is time:
                legend(upper, panels[0], colours, other)
        percent_of_torch(lower.subplots(), timed, colours)
        h, s = report["header"], report["settings"]
        title = [f"fastmix on {h['device']}, {h['threads']} CPU cores used",
                 f"batch {s['batch']}, width {s['dim']}, {s['heads']} heads, {s['dtype']}"]
        upper.suptitle((" · " if across > 3 else "\n").join(title), x=0.01, ha="left",
                       weight="bold", size=12)
        figure.savefig(path, dpi=160, facecolor="white", bbox_inches="tight")  # whole titles
        plt.close(figure)


def time(row):
    """(20th percentile, median, 80th) of forward + backward, ms."""
    return tuple(row["forward_backward_ms"][key] for key in ("p20", "median", "p80"))


def memory(row):
    """The peak of forward + backward beyond the inputs, MB: the same in each run."""
    return (row["peak_bytes"] / 1e6,) * 3


UNITS = {time: "fwd+bwd ms", memory: "peak MB"}


def against_length(panel, rows, theirs, colours, quantity):
    """`quantity` of every implementation, of the original, and of the other report's rows."""
    originals = {row["original"]["n"]: row["original"] for row in rows
                 if row["original"]["status"] == "ok"}
    draw_line(panel, {n: quantity(row) for n, row in originals.items()}, ORIGINAL, "--")
    for name, colour in colours.items():
        for report_rows, style in (theirs, ":"), (rows, "-"):
            draw_line(panel, {r["n"]: quantity(r) for r in report_rows
                              if r["implementation"] == name}, colour, style)
    lengths = sorted({row["n"] for row in rows})
    panel.set(xscale="log", yscale="log", title=rows[0]["row"])
    panel.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("time steps")
    panel.set_ylabel(UNITS[quantity])


def draw_line(panel, points, colour, style):
    """points: n → (lower end, middle, upper end)."""
    lengths = sorted(points)
    if lengths:
        lower, middle, upper = zip(*(points[n] for n in lengths))
        panel.plot(lengths, middle, style, color=colour, marker="o", markersize=4, linewidth=1.8)
        panel.fill_between(lengths, lower, upper, color=colour, alpha=0.15, linewidth=0)


def legend(figure, panel, colours, other):
    lines = [panel.plot([], [], "-", color=colour, marker="o", label=f"fastmix, {name}")[0]
             for name, colour in colours.items()]
    if other:
        h = other["header"]
        lines += panel.plot([], [], ":", color=INK, marker="o", label=(
            f"the other report: {h['device']}, {' '.join(h['cpu_flags'])}"))
    lines += panel.plot([], [], "--", color=ORIGINAL, marker="o", label="published original")
    figure.legend(handles=lines, loc="outside lower left", ncols=len(lines), frameon=False)


def percent_of_torch(panel, rows, colours):
    """The time of torch's copy or matmul for the same bytes or products, in percent of ours."""
    for i, row in enumerate(rows):
        colour = colours[row["implementation"]]
        for mode, offset, alpha in (("forward", -0.19, 1), ("forward_backward", 0.19, 0.45)):
            percent = row["percent_of_torch"][mode]
            panel.barh(i + offset, percent, 0.34, color=colour, alpha=alpha, linewidth=0)
            panel.annotate(f"{percent:.0f}% of torch's {row['bound'][mode]}", (percent, i + offset),
                           (4, 0), textcoords="offset points", va="center", size=7.5)
    widest = max((max(row["percent_of_torch"].values()) for row in rows), default=0)
    panel.set_yticks(range(len(rows)), [f"{row['row']}  n={row['n']}" for row in rows])
    panel.invert_yaxis()
    panel.set_xlim(0, max(100, 1.12 * widest))
    panel.axvline(100, color=INK, linewidth=1)
    panel.grid(axis="y", visible=False)
    panel.tick_params(axis="y", length=0)
    panel.set_title("Percent of the rate of torch's own copy or matmul:\n"
                    "forward (full), forward+backward (pale)")
