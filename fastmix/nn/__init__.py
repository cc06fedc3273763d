"""Drop-in twins of six published model families, one file per published module, under the names
of four published packages.

Names that more than one family uses for different things (conv1d_fft, FeedForward, PreNorm) are
in the families' own modules only.
"""

from fastmix.nn import (
    dsconv,
    g_mlp_gpt,
    gated_state_spaces_pytorch,
    gateloop_transformer,
    gss,
    metaformer_gpt,
    mhesa,
)
from fastmix.nn.dsconv import EfficientDsConv, GatedDsConv, GatedDsConvLM
from fastmix.nn.g_mlp_gpt import (
    GEGLU,
    Attention,
    AxiallyFold,
    CausalLocalSGU,
    CausalSGU,
    LocalAttention,
    Residual,
    ReversibleSequence,
    SequentialSequence,
    dropout_layers,
    gMLPBlock,
    gMLPGPT,
    pad_to_multiple,
)
from fastmix.nn.gateloop_transformer import (
    CausalFullAttention,
    GateLoopedAttention,
    PostNorm,
    RMSNorm,
    SimpleGateLoopLayer,
    Transformer,
    associative_scan,
    gate_loop_operator,
)
from fastmix.nn.gss import DSS, GSS, GatedStateSpacesLM
from fastmix.nn.metaformer_gpt import (
    MeanCenteringPool,
    MetaformerGPT,
    MultiheadExponentialTimeDecay,
    cummean,
)
from fastmix.nn.mhesa import MHESA, GatedExponentialSmoothingLM, GatedMHESA

GateLoopTransformer = Transformer

__all__ = [
    "dsconv", "g_mlp_gpt", "gated_state_spaces_pytorch", "gateloop_transformer",
    "gss", "metaformer_gpt", "mhesa",
    "EfficientDsConv", "GatedDsConv", "GatedDsConvLM",
    "AxiallyFold", "Attention", "CausalLocalSGU", "CausalSGU", "GEGLU", "LocalAttention",
    "Residual", "ReversibleSequence", "SequentialSequence", "dropout_layers", "gMLPBlock",
    "gMLPGPT", "pad_to_multiple",
    "CausalFullAttention", "GateLoopedAttention", "GateLoopTransformer", "PostNorm", "RMSNorm",
    "SimpleGateLoopLayer", "Transformer", "associative_scan", "gate_loop_operator",
    "DSS", "GSS", "GatedStateSpacesLM",
    "MeanCenteringPool", "MetaformerGPT", "MultiheadExponentialTimeDecay", "cummean",
    "MHESA", "GatedExponentialSmoothingLM", "GatedMHESA",
]
