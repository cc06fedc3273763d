"""Random and hostile calls of everything, for as long as you like:

    python tests/campaign.py --minutes 5 --seed 1
    python tests/campaign.py --calls 10000      so many of each, however long they take
    python tests/campaign.py --repeat 1:42      one call again, in this process
    python tests/campaign.py --sanitize --minutes 9 --operators gate_loop    and other sanitizers:
    python tests/campaign.py --sanitize thread --minutes 9 --operators gate_loop
    python tests/campaign.py --same 100000        what as many equal calls leave in memory

Calls run in processes that may die: each says what it is about to do, and is replaced, and the
call reported, if it crashes or hangs. A call comes from the seed and its index alone.
"""

import argparse
import collections
import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPERATORS = ("linear_scan", "gate_loop", "decay_conv", "fft_conv", "windowed_sgu", "causal_sgu",
             "cumulative_mean")
SUBJECTS = (*OPERATORS, "module", "model")
IMPLEMENTATIONS = ("fallback", "portable", "avx2", "avx512", "amx", "neon", "triton")
KINDS = ("ok", "refused", "crash", "hang", "wrong", "modified", "unclear")

BATCH = 20  # calls between two changes of the implementation
HANG = 60   # seconds
START = 900  # seconds: kernels may have to be compiled
ALIKE = 2   # findings that are shown of those that read alike


# ---- in a process that may die


def here(implementation):
    """Whether it can run in this process."""
    import fastmix
    from fastmix.native import library

    if implementation == "fallback":
        return True
    if implementation == "triton":
        return fastmix.implementations("gate_loop")["triton"] is None
    with contextlib.suppress(RuntimeError):
        library.choose_instruction_set(implementation)
        return True
    return False


@contextlib.contextmanager
def running_on(implementation):
    import fastmix
    from fastmix.native import library

    if implementation in library.INSTRUCTION_SETS:
        library.choose_instruction_set(implementation)
        yield
        return
    with fastmix.force(implementation):
        yield


def classify(call, outcome, definition):
    """(kind, what to say about it)"""
    if isinstance(outcome, AssertionError):
        return "modified" if "was modified" in str(outcome) else "wrong", str(outcome)
    if isinstance(outcome, Exception):
        if not call.wrong and call.excused():
            return "refused", ""
        said = f"{type(outcome).__name__}: {str(outcome)[:300]!r}"
        if not call.clear(outcome):
            return "unclear", said
        return ("refused", said) if call.wrong else ("wrong", f"a valid call was refused, {said}")
    if isinstance(definition, Exception):
        if not call.wrong:
            return "wrong", f"it was taken, the definition says {definition!r}"[:300]
        return "unclear", f"it was taken, the definition says {definition!r}"[:300]
    wrong = call.judge(outcome, definition)
    return ("wrong", wrong) if wrong else ("ok", "")


def draw(seed, index, implementations):
    subject = SUBJECTS[index % len(SUBJECTS)]
    if subject in OPERATORS:
        from campaign_judge import draw
    else:
        from campaign_modules import draw

    # Most calls have fewer steps than this; an interpreter is slow.
    return draw(subject, seed, index, 12 if "triton" in implementations else 24)


def attempt(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return error


def perform_batch(indices, seed, implementations, say, sanitize=None):
    """Calls and judges. Sanitizers judge what runs, not what it computes."""
    calls = {i: draw(seed, i, implementations) for i in indices}
    for call in calls.values() if sanitize == "thread" else ():
        call.mode = "plain" if call.wrong else "threads"
    outcomes = {}
    for implementation in implementations:
        with running_on(implementation):
            for i, call in calls.items():
                say(">", i, implementation)
                outcomes[i, implementation] = attempt(call.perform)
    for i, call in calls.items():
        definition, judged, about = None, [], {}
        for implementation in implementations:
            outcome = outcomes[i, implementation]
            if sanitize and not isinstance(outcome, Exception):
                judged += [implementation, "ok"]
                continue
            if definition is None and not isinstance(outcome, Exception):
                say(">", i, "definition")
                definition = attempt(call.define)
            kind, what = classify(call, outcome, definition)
            judged += [implementation, kind]
            if kind not in ("ok", "refused"):
                about.setdefault(what, []).append(f"{kind} on {implementation}")
        said = "; ".join(f"{', '.join(on)}: {what}" for what, on in about.items())
        say("=", i, ",".join(judged), f"{said} | {call}" if said else "")


def work(options):
    """Batches from options.work on, every options.workers-th, until it is killed."""
    import torch

    from campaign_memory import resident

    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(*words):
        pipe.write("\t".join(str(w).replace("\n", " ").replace("\t", " ") for w in words) + "\n")

    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # fresh memory is filled with NaN
    import warnings

    warnings.simplefilter("ignore")
    if options.triton:
        prepare_triton()
    implementations = [i for i in options.implementations if here(i)]
    say("!", *implementations)
    first = options.work
    while first < options.last:
        indices = [i for i in range(first, min(first + BATCH, options.last))
                   if SUBJECTS[i % len(SUBJECTS)] in options.subjects
                   and i not in options.skip]
        # Torch's own threads meet where ThreadSanitizer does not see it.
        torch.set_num_threads(
            2 if first // BATCH % 5 == 0 and options.sanitize != "thread" else 1)
        perform_batch(indices, options.seed, implementations, say, options.sanitize)
        say("m", resident() >> 20)
        first += BATCH * options.workers


def prepare_triton():
    """The interpreter's numbers as those of GPUs."""
    sys.path.insert(0, str(ROOT / "tests" / "triton"))
    import triton.runtime.interpreter

    from conftest import convert
    from fastmix.ops._carries import HEADS_CARRY_EVERY

    triton.runtime.interpreter._convert_float = convert
    HEADS_CARRY_EVERY.pop("cpu", None)


# ---- the campaign


class Worker:
    """One process and its successors."""

    def __init__(self, options, first, triton, tell):
        self.options, self.first, self.triton, self.tell = options, first, triton, tell
        self.stride = 1 if triton else options.processes  # nobody shares Triton's calls
        self.skip, self.deaths, self.memory = [], 0, []
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while time.time() < self.options.end:
            if self.live():
                return
            self.deaths += 1
            if self.deaths > 200:
                self.tell(None, [("", "crash")], f"a worker died {self.deaths} times: no more")
                return

    def live(self):
        """One process's life. True if it did all it was to do, or its time was over."""
        command = [sys.executable, __file__, "--work", str(self.first), "--workers",
                   str(self.stride), "--seed", str(self.options.seed),
                   "--last", str(self.options.last),
                   "--operators", *self.options.subjects, "--skip", *map(str, self.skip),
                   "--implementations", *(["triton"] if self.triton else [
                       i for i in self.options.implementations if i != "triton"])]
        with tempfile.TemporaryFile("w+") as errors:
            command += ["--triton"] * self.triton
            if self.options.sanitize:
                command += ["--sanitize", self.options.sanitize]
            environment = self.options.environment | (
                {"TRITON_INTERPRET": "1"} if self.triton else {})
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True,
                                       env=environment)
            self.silent, self.current, hung = 0.0, None, []

            def watch():
                while process.poll() is None:
                    time.sleep(0.5)
                    self.silent += 0.5  # not by a clock: the whole machine may have been asleep
                    over = time.time() > self.options.end
                    if over or self.silent > (HANG if self.current else START):
                        hung.append("over" if over else "hang")
                        process.kill()

            threading.Thread(target=watch, daemon=True).start()
            for line in process.stdout:
                self.silent = 0.0
                mark, *words = line.rstrip("\n").split("\t")
                if mark == ">":
                    self.current = words
                elif mark == "=":
                    judged = words[1].split(",")
                    self.tell(int(words[0]), zip(judged[::2], judged[1::2], strict=True), words[2])
                elif mark == "!" and not self.options.begun:  # kernels may have been compiled first
                    self.options.begun = True
                    self.options.end = time.time() + 60 * self.options.minutes
                elif mark == "m":
                    self.memory.append(int(words[0]))
                    self.first += BATCH * self.stride
            status = process.wait()
            if status == 0 or "over" in hung:
                return True
            errors.seek(0)
            said = " / ".join(errors.read()[-1500:].strip().splitlines()[-4:])
            if self.current is None:
                self.tell(None, [("", "crash")], f"a worker could not begin: {said}")
                self.deaths = 1000
                return True
            self.skip.append(int(self.current[0]))
            kind = "hang" if "hang" in hung else "crash"
            self.tell(int(self.current[0]), [(self.current[1], kind)],
                      f"{kind} on {self.current[1]}: exit status {status}: {said}")
            return False


def campaign(options):
    counts = collections.defaultdict(collections.Counter)
    seen = collections.Counter()

    def tell(index, judged, about):
        subject = SUBJECTS[index % len(SUBJECTS)] if index is not None else "campaign"
        for implementation, kind in judged:
            counts[subject, implementation][kind] += 1
        if about:  # a line a finding, and how to see it again
            alike = subject, re.sub(r"[\d.]+", "", about.partition(" | ")[0])[:60]
            seen[alike] += 1
            if seen[alike] <= ALIKE:
                print(f"{subject}: {about}\n    python tests/campaign.py --repeat "
                      f"{options.seed}:{index}", flush=True)

    print(f"campaign with seed {options.seed}", flush=True)
    plain = [i for i in options.implementations if i != "triton"]
    workers = [Worker(options, k * BATCH, False, tell) for k in range(options.processes)
               if plain]
    if "triton" in options.implementations:
        workers.append(Worker(options, 0, True, tell))
    for worker in workers:
        worker.thread.join()
    print(f"\n{'':32}" + "".join(f"{kind:>10}" for kind in KINDS))
    for subject, implementation in sorted(counts):
        row = counts[subject, implementation]
        print(f"{subject + ' ' + implementation:32}"
              + "".join(f"{row[kind]:10}" for kind in KINDS))
    for worker in workers:
        if worker.memory:
            print(f"memory of a worker, in MB: {worker.memory[len(worker.memory) // 5]} after a "
                  f"fifth, {worker.memory[-1]} at the end, at most {max(worker.memory)}")
    for (subject, about), count in seen.items():
        if count > ALIKE:
            print(f"{count - ALIKE} more of {subject}: {about}")
    print(f"seed {options.seed}: {sum(c.total() for c in counts.values())} calls, "
          f"{seen.total()} findings")
    return int(any(row[kind] for row in counts.values() for kind in options.fatal))


# By what --sanitize names: the compiler's flags, the libraries to preload, their options.
SANITIZERS = {
    "address": (["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
                ("libasan.so", "libubsan.so"),
                {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}),
    "thread": (["-fsanitize=thread"], ("libtsan.so",),
               {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66"})}


@contextlib.contextmanager
def sanitized(kind):
    """What the environment must be for kernels that watch what they touch."""
    import torch

    from fastmix.native import build

    flags, libraries, settings = SANITIZERS[kind]
    preloaded = [subprocess.run([*build.compiler(), f"-print-file-name={name}"], text=True,
                                capture_output=True, check=True).stdout.strip()
                 for name in libraries]
    if not all(map(os.path.isabs, preloaded)):
        raise SystemExit(f"the compiler has no {' and no '.join(libraries)} to preload")
    with tempfile.TemporaryDirectory() as cache:
        began, sets = time.time(), build.own_instruction_sets()
        build.build(Path(cache) / build.compiled_name(sets=sets), Path(torch.__file__).parent,
                    more_flags=["-O1", "-g1", *flags], sets=sets)
        print(f"compiled with sanitizers in {time.time() - began:.0f} s", flush=True)
        yield {"FASTMIX_CACHE": cache, "LD_PRELOAD": ":".join(preloaded), **settings}


def repeat(options):
    import torch
    seed, index = options.repeat.split(":")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    implementations = [i for i in options.implementations if here(i)]
    print(draw(seed, int(index), implementations))
    perform_batch([int(index)], seed, implementations,
                  lambda mark, *words: print(*words) if mark == "=" else None)


def same(options):
    from campaign_memory import constant

    return int(constant([s for s in options.subjects if s in OPERATORS],
                        [i for i in options.implementations if here(i)], running_on,
                        options.same) > 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float,
                        help="1, or, with --calls, as many as they take")
    parser.add_argument("--seed", default=str(random.randrange(2**32)))
    parser.add_argument("--operators", dest="subjects", nargs="*", choices=SUBJECTS,
                        default=SUBJECTS)
    parser.add_argument("--implementations", nargs="*", choices=IMPLEMENTATIONS,
                        default=IMPLEMENTATIONS[:-1])
    parser.add_argument("--calls", type=int, help="of every operator and implementation at most")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--sanitize", nargs="?", const="address", choices=SANITIZERS,
                        help="with AddressSanitizer and UBSan, or, by --sanitize thread, "
                        "ThreadSanitizer: then all calls come from three threads at once. Values "
                        "are not judged, which takes most of a call's time")
    parser.add_argument("--fatal", nargs="*", choices=KINDS[2:], default=KINDS[2:],
                        help="findings for which the exit status is 1")
    parser.add_argument("--repeat", metavar="SEED:INDEX")
    parser.add_argument("--same", type=int, metavar="CALLS",
                        help="make one call of every operator so often, with its gradients: the "
                        "exit status is 1 if any leaves memory behind")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, nargs="*", default=(), help=argparse.SUPPRESS)
    parser.add_argument("--triton", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeat or options.same:
        os.environ.setdefault("FASTMIX_INSTRUCTION_SETS", "all")
        return same(options) if options.same else repeat(options)
    if options.work is not None:
        return work(options)
    if options.minutes is None:
        options.minutes = float("inf") if options.calls else 1
    options.last = (options.calls or 10**9) * len(SUBJECTS)
    if not options.sanitize:  # the kernels of every instruction set, not of the best one alone
        os.environ.setdefault("FASTMIX_INSTRUCTION_SETS", "all")
    options.environment = dict(os.environ, OMP_WAIT_POLICY="passive")
    with sanitized(options.sanitize) if options.sanitize else contextlib.nullcontext({}) as more:
        options.environment |= more
        options.begun, options.end = False, time.time() + START + 60 * options.minutes
        return campaign(options)


if __name__ == "__main__":
    sys.exit(main())
