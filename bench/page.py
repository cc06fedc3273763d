"""Writes the reports under bench/results/ into docs/benchmarks.md, between their marks there.

    python bench/page.py
"""

import json
import re
from pathlib import Path

import table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
# A report stands between two comments; the first names its file, and what its headings begin with.
SECTION = re.compile(r"(<!-- report ([\w-]+\.json) as ([^\n]+) -->\n).*?(<!-- end -->\n)",
                     re.DOTALL)


def written(page):
    """The page with its reports as they are now."""
    return SECTION.sub(lambda s: f"{s[1]}\n{section(s[2], s[3])}\n\n{s[4]}", page)


def section(file, name):
    report = json.loads((ROOT / "bench" / "results" / file).read_text("utf-8"))
    _, machine, *parts = table.text(report, colour=False).split("\n\n")
    # Two spaces end a line in markdown. What was left out for time is in the file.
    parts = [re.sub(r"^## (\w)", lambda s: f"### {name}, {s[1].lower()}", part)
             for part in parts if not part.startswith("left out: ")]
    return "\n\n".join([machine.replace("\n", "  \n"), *parts])


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
