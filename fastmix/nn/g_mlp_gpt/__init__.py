"""Takes the place of the package g-mlp-gpt (0.0.15), its submodules included."""

from fastmix.nn.g_mlp_gpt.autoregressive_wrapper import (
    AutoregressiveWrapper as AutoregressiveWrapper,
)
from fastmix.nn.g_mlp_gpt.g_mlp_gpt import (
    GEGLU,
    Attention,
    AxiallyFold,
    CausalLocalSGU,
    CausalSGU,
    FeedForward,
    LocalAttention,
    PreNorm,
    Residual,
    ReversibleSequence,
    SequentialSequence,
    dropout_layers,
    gMLPBlock,
    gMLPGPT,
    pad_to_multiple,
)

__all__ = [
    "Residual", "PreNorm", "GEGLU", "FeedForward", "Attention", "LocalAttention", "CausalSGU",
    "CausalLocalSGU", "AxiallyFold", "gMLPBlock", "gMLPGPT", "ReversibleSequence",
    "SequentialSequence", "pad_to_multiple", "dropout_layers"]
