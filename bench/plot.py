"""The picture of a report: time against sequence length, and how close to the limit."""

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


def draw(report, path):
    timed = [row for row in report["operators"] if row["status"] == "ok"]
    points = [row for row in report["curve"] if row["status"] == "ok"] + timed
    names = list(dict.fromkeys(row["implementation"] for row in points))
    colours = dict(zip(names, OURS))
    titles = list(dict.fromkeys(row["row"] for row in points))
    across = min(4, max(1, len(titles)))
    down = max(1, -(-len(titles) // across))
    heights = [2.3 * down + 0.9, 0.34 * len(timed) + 1]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(3.2 * across + 0.4, sum(heights)), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=heights)
        panels = list(upper.subplots(down, across, squeeze=False).flat)
        for panel, row_title in zip(panels, titles):
            time_against_length(panel, [r for r in points if r["row"] == row_title], colours)
        for panel in panels[len(titles):]:
            panel.axis("off")
        legend(upper, panels[0], colours)
        share_of_limit(lower.subplots(), timed, colours)
        h, s = report["header"], report["settings"]
        upper.suptitle(f"fastmix on {h['device']}, {h['threads']} CPU cores used · "
                       f"batch {s['batch']}, width {s['dim']}, {s['heads']} heads, {s['dtype']}",
                       x=0.01, ha="left", weight="bold", size=12)
        figure.savefig(path, dpi=160, facecolor="white")
        plt.close(figure)


def time_against_length(panel, rows, colours):
    """Forward + backward of every implementation and of the original, milliseconds."""
    key = "forward_backward_ms"
    originals = {row["original"]["n"]: row["original"] for row in rows
                 if row["original"]["status"] == "ok"}
    if originals:
        draw_line(panel, {n: row[key] for n, row in originals.items()}, ORIGINAL, "--")
    for name, colour in colours.items():
        draw_line(panel, {r["n"]: r[key] for r in rows if r["implementation"] == name}, colour, "-")
    lengths = sorted({row["n"] for row in rows})
    panel.set(xscale="log", yscale="log", title=rows[0]["row"])
    panel.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("time steps")
    panel.set_ylabel("fwd+bwd ms")


def draw_line(panel, timings, colour, style):
    lengths = sorted(timings)
    middle = [timings[n]["median"] for n in lengths]
    panel.plot(lengths, middle, style, color=colour, marker="o", markersize=4, linewidth=1.8)
    panel.fill_between(lengths, [timings[n]["p20"] for n in lengths],
                       [timings[n]["p80"] for n in lengths], color=colour, alpha=0.15, linewidth=0)


def legend(figure, panel, colours):
    lines = [panel.plot([], [], "-", color=colour, marker="o", label=f"fastmix, {name}")[0]
             for name, colour in colours.items()]
    lines += panel.plot([], [], "--", color=ORIGINAL, marker="o", label="published original")
    figure.legend(handles=lines, loc="outside upper right", ncols=len(lines), frameon=False)


def share_of_limit(panel, rows, colours):
    """Percent of what the machine's copy bandwidth or matmul rate would allow."""
    for i, row in enumerate(rows):
        colour = colours[row["implementation"]]
        for mode, offset, alpha in (("forward", -0.19, 1), ("forward_backward", 0.19, 0.45)):
            percent = row["percent_of_limit"][mode]
            panel.barh(i + offset, percent, 0.34, color=colour, alpha=alpha, linewidth=0)
            panel.annotate(f"{percent:.0f}% of {row['bound'][mode]}", (percent, i + offset),
                           (4, 0), textcoords="offset points", va="center", size=7.5)
    widest = max((max(row["percent_of_limit"].values()) for row in rows), default=0)
    panel.set_yticks(range(len(rows)), [f"{row['row']}  n={row['n']}" for row in rows])
    panel.invert_yaxis()
    panel.set_xlim(0, max(100, 1.12 * widest))
    panel.axvline(100, color=INK, linewidth=1)
    panel.grid(axis="y", visible=False)
    panel.tick_params(axis="y", length=0)
    panel.set_title("Percent of the measured limit: forward (full), forward+backward (pale)")
