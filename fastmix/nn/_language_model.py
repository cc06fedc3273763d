"""What the language models that are an embedding, layers and a projection do with a call."""

from typing import Any

from torch import Tensor

from fastmix.nn._cache import Cache, ModelCache, call, split_model_cache, use_up
from fastmix.nn._checks import embed_tokens
from fastmix.nn._loss import token_loss


def run(
    where: str, model: Any, x: Tensor, labels: Tensor | None, cache: Cache,
    return_cache: bool, max_length: int | None = None
) -> Tensor | tuple[Tensor, Cache]:
    """Tokens x (b, n) through the model's token_emb, layers and to_logits: logits, or the loss if
    there are labels, with return_cache beside a cache."""
    x = embed_tokens(where, model.token_emb, x, max_length)
    seen, caches = split_model_cache(where, x, cache, len(model.layers), max_length)
    steps, kept = use_up(seen, x.shape[1]), []
    for layer, of_layer in zip(model.layers, caches):
        x, new = call(layer, x, of_layer, return_cache)
        kept.append(new)
    out = model.to_logits(x)
    if labels is not None:
        out = token_loss(where, out, labels)
    return (out, ModelCache(steps, tuple(kept))) if return_cache else out
