"""The report's rows of text: how fast models write, one token at a time from a cache, beside the
published models, which run their whole context again for each.

A row is right where the token after the context, alone and with the cache of the context, has
the logits that a forward over all of them gives it.
"""

import functools

import torch

import models
from exactness import relative, within
from fastmix.states import FFTConvState, in_place
from rows import forced, implementations, name_of, reason
from timing import elapsed, side_by_side, summary

BATCHES = (1, 16)
CONTEXT = 1024  # and those of --seq
MINUTES = 0.05 / 8192  # for a token of the contexts that are named
CAUSAL = "gMLPGPT causal"  # without windows: each layer has a weight of steps × steps
CAUSAL_CONTEXT = 2048      # the longest that it has a row of
TEXTS = [text for name in models.MODELS for text in (
    [name, CAUSAL] if name == "gMLPGPT" else [name])]


def sizes(options):
    """[(batch, context)], the shortest first. By default several sequences have the shortest
    context alone, because the report's minutes must hold every row; --contexts names what all of
    them have."""
    if options.check:
        return [(BATCHES[0], options.seq[0])]
    contexts = sorted(set(options.contexts or (CONTEXT, *options.seq)))
    return [(batch, context) for context in contexts for batch in BATCHES
            if options.contexts or context == contexts[0] or batch == BATCHES[0]]


def jobs(options, room):
    """[(name, batch, context)] of what fits into `room` bytes, and why others are left out."""
    fitting, reasons = [], []
    for batch, context in sizes(options) if options.generate else ():
        needed = bytes_needed(batch, context, options.dim)
        if needed > room:
            reasons.append(f"text, batch {batch} n={context}, as its prompt needs about "
                           f"{needed / 1e9:.0f} GB at once")
        else:
            fitting += [(text, batch, context) for text in TEXTS if fits(text, context)
                        and text.split()[0] in (options.models or models.MODELS)]
    return fitting, reasons


def fits(text, context):
    return text != CAUSAL or context <= CAUSAL_CONTEXT


def arguments_of(text, n, options):
    """models.model_arguments of a row of TEXTS, for n steps."""
    arguments = models.model_arguments(
        text.split()[0], n, options.dim, options.heads, options.depth)
    if text == CAUSAL:
        *first, operator, given = arguments
        return *first, "causal_sgu", {**given, "window": None}
    return arguments


def minutes(options, texts):
    """What the report has beyond its own for contexts that are named."""
    tokens = sum(batch * context for _, batch, context in texts)
    return MINUTES * tokens if options.contexts else 0


def bytes_needed(batch, context, dim):
    """What a forward holds at once, roughly: the hidden channels of a feed-forward, gated, are
    eight times the width."""
    return 24 * 4 * dim * batch * context


class Writer:
    """A model of fastmix behind a context, ready for the next token."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens

    def plain(self):
        return self.model(self.tokens)[:, -1]

    def first(self):
        _, self.cache = self.model(self.tokens[:, :-1], return_cache=True)

    def step(self, count=1):
        with in_place():  # as fastmix.generate does
            logits, self.cache = self.model(self.tokens[:, -1:].expand(-1, count),
                                            cache=self.cache, return_cache=True)
        return logits[:, -1]

    def to_epoch(self):
        """Goes on until the next step begins an epoch of the online convolution. Whether one
        will: other models have none."""
        state = next(convolutions(self.cache), None)
        if state is None:
            return False
        done = sum(block.x.shape[1] for block in state.blocks)
        left = state.tail.shape[1] - done - 1
        while left > 0:  # pieces that are so long begin one themselves
            piece = min(left, max(1, state.x.shape[1] // 8 - 1))
            self.step(piece)
            left -= piece
        return True

    def error(self, device):
        """Of the token after the context beside a forward over all, both of which are timed."""
        def timed(call):
            results = []
            self.check_ms[call.__name__] = elapsed(lambda: results.append(call()), device)
            return results[0]

        self.check_ms = {}
        truth = timed(self.plain)
        timed(self.first)
        return relative([self.step()], [truth])

    def linear(self):
        """The model's Linear layers alone, on one token."""
        for layer, x in self.inputs:
            layer(x)

    @functools.cached_property
    def inputs(self):
        layers = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        return [(layer, layer.weight.new_ones(len(self.tokens), 1, layer.in_features))
                for layer in layers]


@torch.no_grad()
def generation_rows(job, options, dtype, device, seconds, with_original=True):
    """A row for each implementation; checked only, if `seconds` is 0."""
    name, batch, context = job
    count = options.generate
    # The longest input of a model that has one: context, the token that is checked, one more before
    # those that are timed, and those until the online convolution begins an epoch, of at most a
    # quarter of what was there before.
    more = max(64, context // 4) if "DsConv" in name else 0
    file, published, kind, operator, arguments = arguments_of(
        name, context + 2 + 2 * count + more, options)
    torch.manual_seed(context)
    tokens = torch.randint(models.VOCABULARY, (batch, context + 1), device=device)
    limits = {"logits": models.TOLERANCE[dtype][1]}
    rows = {}
    for impl, missing in implementations(operator, device, options.impl):
        rows[impl] = row = {
            "model": name, "row": f"{name}, text, batch {batch}", "batch": batch, "n": context,
            "implementation": impl, "arguments": arguments, "limits": limits,
            "status": "failed", "reason": missing}
        if missing is not None:
            continue
        model = models.build(f"fastmix.nn.{file}", kind, arguments).to(device, dtype).eval()
        writer = Writer(model, tokens)
        with forced(impl if options.impl else None)():
            try:
                row["errors"] = {"logits": writer.error(device)}
            except Exception as error:  # said in the row; the others are still to be seen
                row["reason"] = reason(error)
                continue
            row["status"] = "ok" if within(row["errors"], limits) else "wrong"
            if row["status"] == "ok" and seconds:
                add_times(row, writer, count, seconds, device)
    timed = [row for row in rows.values() if "token_ms" in row]
    if timed and with_original:
        original = time_original(published, kind, arguments, tokens[:, :-1], dtype, seconds,
                                 device)
        for row in timed:
            row["original"] = original
            if original["status"] == "ok":
                models.add_ratio(row, "original", original["token_ms"], row["token_ms"])
    return list(rows.values())


def add_times(row, writer, count, seconds, device):
    """Of the prompt beside a plain forward over it, and of tokens beside the floor, in turns."""
    here = forced(None)  # already inside
    if sum(writer.check_ms.values()) / 1e3 > seconds / 2:  # no time to run it again
        prompt = {name: summary([ms]) for name, ms in writer.check_ms.items()}
    else:
        prompt = side_by_side({"plain": (here, writer.plain), "first": (here, writer.first)},
                              seconds / 2, device, least=1, most=5)
    row["plain_ms"], row["first_ms"] = prompt["plain"], prompt["first"]
    row["ratio_plain"] = row["first_ms"]["median"] / row["plain_ms"]["median"]
    row["cache_bytes"] = cache_bytes(writer.cache)
    writer.step(), writer.linear()
    steps, floors = [], []
    for _ in range(count):
        steps.append(elapsed(writer.step, device))
        floors.append(elapsed(writer.linear, device))
    row["token_ms"], row["floor_ms"] = summary(steps), summary(floors)
    if writer.to_epoch():
        steps.append(elapsed(writer.step, device))
    row["worst_ms"] = max(steps)
    row["ratio_floor"] = row["token_ms"]["median"] / row["floor_ms"]["median"]
    row["tokens_per_s"] = 1e3 * row["batch"] / row["token_ms"]["median"]


def time_original(published, kind, arguments, context, dtype, seconds, device):
    """Its part of a row. A token is its forward over the context: that is what its wrapper does,
    and a few tell."""
    baseline = {"package": published.partition(".")[0], "n": context.shape[1], "status": "ok",
                "dtype": name_of(dtype)}
    try:
        model = models.build(published, kind, arguments).to(device, dtype).eval()
        model(context[:, :2])  # what a first call does once
        baseline["token_ms"] = side_by_side(
            {"": (forced(None), functools.partial(model, context))}, seconds / 4, device,
            least=1, most=5)[""]
    except ImportError as error:
        baseline |= {"status": "not installed", "reason": str(error)}
    except Exception as error:  # whatever published code may raise
        baseline |= {"status": "fails", "reason": reason(error)}
    return baseline


def convolutions(cache):
    """The states of online convolutions in a cache."""
    if isinstance(cache, FFTConvState):
        yield cache
    elif isinstance(cache, tuple):
        for part in cache:
            yield from convolutions(part)


def cache_bytes(cache):
    if isinstance(cache, torch.Tensor):
        return cache.numel() * cache.itemsize
    return sum(map(cache_bytes, cache or ()))
