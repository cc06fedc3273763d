"""Train a language model on the bytes of a text file, and let it write.

    python examples/train_text.py FILE --model gateloop --steps 1000
    python examples/train_text.py FILE --model gateloop --steps 2000 --resume
    torchrun --nproc-per-node 2 examples/train_text.py FILE

Writes checkpoint.pt and loss.png into --out, and prints a sample as it is generated. Look for a
loss that falls below 5.5, what guessing among 256 bytes costs. examples/sample_text.py writes more.
torchrun's processes train one model, each on its share of a batch; the first saves and prints.
"""

import argparse
import codecs
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import fastmix
from fastmix import nn

# Each takes token ids (b, n), n ≤ seq, and returns logits (b, n, 256).
MODELS = {
    "gateloop": lambda dim, depth, seq: nn.GateLoopTransformer(dim, num_tokens=256, depth=depth),
    "metaformer": lambda dim, depth, seq: nn.MetaformerGPT(
        num_tokens=256, dim=dim, depth=depth, heads=8, dim_head=dim // 8, max_seq_len=seq),
    "smoothing": lambda dim, depth, seq: nn.GatedExponentialSmoothingLM(
        num_tokens=256, dim=dim, depth=depth, heads=8, dim_mhesa=dim),
    "dsconv": lambda dim, depth, seq: nn.GatedDsConvLM(
        num_tokens=256, dim=dim, depth=depth, heads=8, dim_dsconv=dim, max_seq_len=seq),
    "gmlp": lambda dim, depth, seq: nn.gMLPGPT(
        num_tokens=256, dim=dim, depth=depth, seq_len=seq, window=max(1, seq // 4)),
}


def build(options):
    return MODELS[options["model"]](options["dim"], options["depth"], options["seq"])


def write(model, prompt, count, **sampling):
    """Prints `prompt` and up to `count` bytes more, each as soon as it is known."""
    longest = getattr(model, "max_seq_len", None)
    if longest is not None:
        prompt = prompt[-longest:]
        count = min(count, longest - len(prompt) + 1)
    device = next(model.parameters()).device
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # of bytes one at a time
    print(decoder.decode(prompt), end="", flush=True)
    tokens = torch.tensor([list(prompt)], device=device)
    for token in fastmix.stream(model, tokens, count, **sampling):
        print(decoder.decode(bytes([int(token)])), end="", flush=True)
    print(decoder.decode(b"", final=True))


def draw(losses, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.plot(losses)
    pyplot.xlabel("step")
    pyplot.ylabel("loss, nats a byte")
    pyplot.savefig(path)
    pyplot.close()


def save(path, **contents):
    """Whole or not at all: who is stopped while it writes keeps the one before."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(contents, unfinished)
    unfinished.replace(path)


def join():
    """This process's number, of how many: torchrun's, or 0 of 1."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    dist.init_process_group()
    return dist.get_rank(), dist.get_world_size()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default=__file__)
    parser.add_argument("--model", choices=MODELS, default="gateloop")
    parser.add_argument("--steps", type=int, default=500, help="of the whole training")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--sample", type=int, default=200, help="bytes to write at the end")
    parser.add_argument("--save-every", type=int, default=100, help="steps to a checkpoint")
    parser.add_argument("--out", type=Path, default=Path("text-model"), help="folder")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    options = parser.parse_args()

    from tqdm import tqdm

    text = torch.tensor(list(Path(options.file).read_bytes()))
    if len(text) <= options.seq + 1:
        parser.error(f"{options.file} must have more than --seq {options.seq} + 1 bytes, "
                     f"got {len(text)}")
    rank, count = join()
    if options.batch % count != 0:
        parser.error(f"--batch must be a multiple of the {count} processes, got {options.batch}")
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / "checkpoint.pt"
    local = os.environ.get("LOCAL_RANK", "0")
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    sizes = {name: getattr(options, name) for name in ("model", "dim", "depth", "seq")}
    losses, before = [], None
    if options.resume:
        before = torch.load(checkpoint, map_location="cpu")
        sizes, losses = before["sizes"], before["losses"]
    model = build(sizes).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if before is not None:
        model.load_state_dict(before["weights"])
        optimizer.load_state_dict(before["optimizer"])
        torch.set_rng_state(before["random"])
    train = DistributedDataParallel(model) if count > 1 else model

    def keep():
        if rank == 0:
            save(checkpoint, sizes=sizes, losses=losses, weights=model.state_dict(),
                 optimizer=optimizer.state_dict(), random=torch.get_rng_state())

    bar = tqdm(range(len(losses), options.steps), initial=len(losses), total=options.steps,
               disable=rank > 0)
    for _ in bar:
        if losses and len(losses) % options.save_every == 0:
            keep()
        starts = torch.randint(len(text) - sizes["seq"], (options.batch,))
        starts = starts[rank::count]  # of those that all processes draw alike
        batch = torch.stack([text[i : i + sizes["seq"] + 1] for i in starts]).to(device)
        logits = train(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if count > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / count)
        bar.set_description(f"loss {losses[-1]:.3f}")
    keep()
    if count > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    draw(losses, options.out / "loss.png")
    print(f"loss {losses[-1]:.3f} after {len(losses)} steps; {checkpoint} and loss.png written. "
          "Guessing costs 5.545: look for less")
    write(model, bytes(text[: min(16, sizes["seq"])].tolist()), options.sample, temperature=0.8)


if __name__ == "__main__":
    main()
