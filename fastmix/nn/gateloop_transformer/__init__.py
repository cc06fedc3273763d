"""Takes the place of the package gateloop-transformer (0.2.5), its submodules included.

`associative_scan` is the function here, as in the submodule gateloop_transformer. In the
published package it is the submodule which has that function; so the function has it, too.
"""

from fastmix.nn.gateloop_transformer.associative_scan import associative_scan
from fastmix.nn.gateloop_transformer.gateloop_transformer import (
    CausalFullAttention,
    FeedForward,
    GateLoopedAttention,
    PostNorm,
    PreNorm,
    RMSNorm,
    Transformer,
    gate_loop_operator,
)
from fastmix.nn.gateloop_transformer.simplified_gate_loop import SimpleGateLoopLayer

associative_scan.associative_scan = associative_scan  # type: ignore[attr-defined]

__all__ = ["RMSNorm", "PreNorm", "PostNorm", "FeedForward", "CausalFullAttention",
           "gate_loop_operator", "GateLoopedAttention", "Transformer", "associative_scan",
           "SimpleGateLoopLayer"]
