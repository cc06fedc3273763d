"""Times of functions measured side by side, and the memory one of them needs."""

import functools
import os
import statistics
import time

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: else its profiler prints on stderr

import torch

CYCLES = 2_000_000  # of a GPU's clock in a millisecond, as many as the fastest have
BUSY = 8            # ms that a GPU has to do before a call begins: few calls take longer to launch
BUSIEST = 128       # the same, at most


@functools.cache
def _cold(device):
    size = (256 if device.type == "cuda" else 64) << 20
    return torch.empty(size, dtype=torch.uint8, device=device)


def stopwatch(function, device):
    """Milliseconds of one call, with the caches full of something else."""
    _cold(device).zero_()
    return elapsed(function, device)


def elapsed(function, device):
    """The same, with the caches as they are."""
    return clock(function, device, BUSY)[0]


def clock(function, device, busy):
    """(milliseconds of one call, those in which the host launched it or None).

    A GPU that waits for launches would show the host's time. So it is busy for `busy` ms, counted
    at 2 GHz, before the call begins on it. None: it was idle before all was launched, because the
    host took longer or waits for results in between; then the first number has waiting in it. None
    on CPUs too.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        function()
        return (time.perf_counter() - began) * 1e3, None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(busy * CYCLES))
    start.record()
    began = time.perf_counter()
    function()
    host = (time.perf_counter() - began) * 1e3
    end.record()
    idle = start.query()
    end.synchronize()
    return start.elapsed_time(end), None if idle else host


def side_by_side(functions, seconds, device, least=3, most=100):
    """A B C A B C …: {name: (surroundings, function)} → {name: {median, p20, p80, runs}}, in ms;
    on GPUs with `host`, the median of what the host took to launch it, or None.

    Each call runs in a context manager that `surroundings()` makes and that is not timed. Goes
    on for `seconds`, but for `least` rounds in any case.
    """
    times, hosts = ({name: [] for name in functions} for _ in range(2))
    busy = dict.fromkeys(functions, BUSY)
    start = time.perf_counter()
    for round in range(most):
        if round >= least and time.perf_counter() - start > seconds:
            break
        for name, (surroundings, function) in functions.items():
            with surroundings():
                while True:
                    _cold(device).zero_()
                    ms, host = clock(function, device, busy[name])
                    if host is not None or device.type != "cuda" or busy[name] >= BUSIEST:
                        break
                    busy[name] *= 4
            times[name].append(ms)
            hosts[name].append(host)
    return {name: summary(ms) | (_host(hosts[name]) if device.type == "cuda" else {})
            for name, ms in times.items()}


def _host(ms):
    known = [host for host in ms if host is not None]
    return {"host": statistics.median(known) if known else None}


def summary(ms):
    ms = sorted(ms)
    return {"median": statistics.median(ms), "p20": ms[int(0.2 * (len(ms) - 1) + 0.5)],
            "p80": ms[int(0.8 * (len(ms) - 1) + 0.5)], "runs": len(ms)}


def spread(timing):
    """Half of what lies between the 20th and the 80th percentile, in parts of the median."""
    return (timing["p80"] - timing["p20"]) / 2 / timing["median"]


def peak_bytes(function, device):
    """The most that torch held at once during a call, beyond what it held before.

    On CPU this walks the profiler's record of every allocation: the same number in each
    run, where the process's resident size would count the allocator's leftovers too.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
