"""Compiles Triton kernels before they are needed, on all cores and without a GPU.

    python bench/ahead.py --headline                  # for the GPU that is here
    python bench/ahead.py --long --target sm90        # for one that is not

The cases are those of bench/self_check.py. What Triton keeps in its cache (TRITON_CACHE_DIR) is
found again by the same Triton under the same sources, on whatever machine.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import sys
import time

import torch
import triton

import self_check
import triton_static
from fastmix import _triton


@contextlib.contextmanager
def launchers_on_meta():
    """Operators on meta tensors go to their Triton launchers."""
    library = torch.library.Library("fastmix", "IMPL")
    for operator in _triton.KERNELS:
        for suffix, launcher in zip(("", "_backward"), _triton.forced(operator, "meta")):
            library.impl(f"{operator}{suffix}", launcher, "Meta", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@functools.lru_cache(maxsize=4)  # a process is given kernels of one case after another
def launches_of(target, long, headline, index):
    """{key: Launch} of one of the cases that self_check.chosen(long, headline) gives."""
    make, shape, how, dtype = self_check.chosen(long, headline)[index]
    with triton_static.recording(target) as launches, launchers_on_meta():
        self_check.run(make.__name__, *self_check.arguments(
            make, shape, how, getattr(torch, dtype), torch.device("meta")))
    return launches


def compile_one(target, long, headline, index, key):
    """Why it cannot be compiled, or None."""
    launch = launches_of(target, long, headline, index)[key]
    try:
        triton.compile(launch.source, target=triton_static.TARGETS[target],
                       options=vars(launch.options))
    except Exception as error:  # whatever the compiler raises: the others are to be compiled
        return f"{type(error).__name__}: {error}"
    return None


def target_here():
    """A name in triton_static.TARGETS; exits where this machine has none of them."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        name = f"sm{major}{minor}" if torch.version.hip is None else "gfx942"
        if name in triton_static.TARGETS:
            return name
    sys.exit(f"--target: this machine has none of {', '.join(triton_static.TARGETS)}; name one")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=triton_static.TARGETS, help="by default what is here")
    for flag in ("--long", "--headline"):
        parser.add_argument(flag, action="store_true", help="as for bench/self_check.py")
    parser.add_argument("--only", default="", metavar="WORDS", help="likewise")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    target, flags = options.target or target_here(), (options.long, options.headline)
    began = time.monotonic()
    wanted = set(map(self_check.label, self_check.chosen(*flags, options.only)))
    kernels, failed = {}, []  # key → index of the first case that needs it
    for index, case in enumerate(self_check.chosen(*flags)):
        if self_check.label(case) in wanted:
            for key in launches_of(target, *flags, index):
                kernels.setdefault(key, index)
    print(f"{len(kernels)} kernels of {len(wanted)} cases for {target}", flush=True)
    with concurrent.futures.ProcessPoolExecutor(
            options.jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(compile_one, target, *flags, index, key): key
                   for key, index in kernels.items()}
        for future in concurrent.futures.as_completed(running):
            if future.result():
                module, name, _ = running[future]
                failed.append(f"{module.rpartition('.')[2]}.{name}: {future.result()[:300]}")
                print(f"FAILED {failed[-1]}", flush=True)
    print(f"{len(kernels) - len(failed)} are in the cache, after {time.monotonic() - began:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
