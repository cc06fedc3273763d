"""A line on stderr that says how far the work is."""

import sys
import time


class Progress:
    """Each call announces the next of `total` pieces of work: on a terminal in one line that
    is written over, elsewhere in a line every ten seconds at most."""

    def __init__(self):
        self.total = self.done = 0
        self.start = time.monotonic()
        self.printed = None
        self.live = sys.stderr.isatty()

    def __call__(self, what):
        now = time.monotonic()
        filled = 24 * self.done // self.total
        bar = "#" * filled + "." * (24 - filled)
        line = f"[{bar}] {self.done}/{self.total} {now - self.start:4.0f} s  {what}"
        self.done += 1
        if self.live:
            print(f"\r\x1b[K{line[:100]}", end="", file=sys.stderr, flush=True)
        elif self.printed is None or now - self.printed > 10:
            self.printed = now
            print(line, file=sys.stderr, flush=True)

    def end(self):
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
