"""A line on stderr that says how far the work is."""

import sys

from tqdm import tqdm


class Progress(tqdm):
    """Each call announces the next of `total` pieces of work: on a terminal at once, elsewhere
    every ten seconds at most."""

    monitor_interval = 0  # no thread beside what is timed

    def __init__(self, total):
        super().__init__(total=total, file=sys.stderr, leave=False,
                         mininterval=0 if sys.stderr.isatty() else 10,
                         bar_format="{bar:24} {n_fmt}/{total_fmt} {elapsed} {desc}", delay=1e-9)
        self.announced = False

    def __call__(self, what):
        self.set_description_str(what, refresh=False)
        if self.announced:
            self.update()  # the piece before this one is done
        else:
            self.announced = True
            self.refresh()
