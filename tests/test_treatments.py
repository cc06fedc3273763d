"""What people do to modules, done to every class and to the published one beside it.

A treatment takes a published module or ours, which have the same weights, and changes it in
place or returns what to call instead. Both are then trained one step and must agree: outputs,
gradients by name, and the step's result.
"""

import contextlib
import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, stack_module_state
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune

import fastmix.nn as fast
from test_models import PUBLISHED
from twins import assert_near

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use_reentrant"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

N, DIM, TOKENS = 7, 8, 11


def pairs(layers):
    return nn.ModuleList([nn.ModuleList(layers)])


# Per class: its file, and how to build it from that or from the published one. Activations are
# given, because the published default is one object for all models, hooks included.
CLASSES = {
    "MeanCenteringPool": (fast.metaformer_gpt, lambda m: m.MeanCenteringPool(DIM)),
    "MultiheadExponentialTimeDecay": (
        fast.metaformer_gpt,
        lambda m: m.MultiheadExponentialTimeDecay(DIM, heads=2, dim_head=3)),
    "metaformer FeedForward": (fast.metaformer_gpt, lambda m: m.FeedForward(DIM)),
    "MetaformerGPT": (fast.metaformer_gpt, lambda m: m.MetaformerGPT(
        num_tokens=TOKENS, dim=DIM, depth=1, heads=2, dim_head=4, max_seq_len=9)),
    "MHESA": (fast.mhesa, lambda m: m.MHESA(dim=DIM, heads=2)),
    "GatedMHESA": (fast.mhesa, lambda m: m.GatedMHESA(dim=DIM, heads=2, dim_mhesa=6)),
    "GatedExponentialSmoothingLM": (fast.mhesa, lambda m: m.GatedExponentialSmoothingLM(
        num_tokens=TOKENS, dim=DIM, depth=1, heads=2, dim_mhesa=6)),
    "EfficientDsConv": (fast.dsconv, lambda m: m.EfficientDsConv(dim=DIM, heads=2)),
    "GatedDsConv": (fast.dsconv, lambda m: m.GatedDsConv(dim=DIM, heads=2, dim_dsconv=6)),
    "GatedDsConvLM": (fast.dsconv, lambda m: m.GatedDsConvLM(
        num_tokens=TOKENS, dim=DIM, depth=1, heads=2, dim_dsconv=6, max_seq_len=9)),
    "DSS": (fast.gss, lambda m: m.DSS(dim=DIM, kernel_N=5)),
    "GSS": (fast.gss, lambda m: m.GSS(
        dim=DIM, dss_kernel_N=5, dss_kernel_H=6, reverse_seq=True)),
    "GatedStateSpacesLM": (fast.gss, lambda m: m.GatedStateSpacesLM(
        num_tokens=TOKENS, dim=DIM, depth=1, dss_kernel_N=5, dss_kernel_H=6)),
    "Residual": (fast.g_mlp_gpt, lambda m: m.Residual(nn.Linear(DIM, DIM))),
    "gmlp PreNorm": (fast.g_mlp_gpt, lambda m: m.PreNorm(DIM, nn.Linear(DIM, DIM))),
    "GEGLU": (fast.g_mlp_gpt, lambda m: m.GEGLU()),
    "gmlp FeedForward": (fast.g_mlp_gpt, lambda m: m.FeedForward(DIM)),
    "Attention": (fast.g_mlp_gpt, lambda m: m.Attention(DIM, 4, 5)),
    "LocalAttention": (fast.g_mlp_gpt, lambda m: m.LocalAttention(DIM, 4, 5, window=3)),
    "CausalSGU": (fast.g_mlp_gpt, lambda m: m.CausalSGU(DIM, 9, heads=2, act=nn.Tanh())),
    "CausalLocalSGU": (
        fast.g_mlp_gpt, lambda m: m.CausalLocalSGU(DIM, 9, heads=2, window=3, act=nn.GELU())),
    "AxiallyFold": (fast.g_mlp_gpt, lambda m: m.AxiallyFold(DIM, 2, nn.Linear(DIM, DIM))),
    "gMLPBlock": (fast.g_mlp_gpt, lambda m: m.gMLPBlock(
        dim=DIM, seq_len=9, dim_ff=12, heads=3, attn_dim=4, act=nn.Identity())),
    "gMLPBlock windowed": (fast.g_mlp_gpt, lambda m: m.gMLPBlock(
        dim=DIM, seq_len=9, dim_ff=12, heads=3, attn_dim=4, window=3, act=nn.SiLU())),
    "SequentialSequence": (
        fast.g_mlp_gpt, lambda m: m.SequentialSequence(pairs([nn.Linear(DIM, DIM)]))),
    "ReversibleSequence": (fast.g_mlp_gpt, lambda m: m.ReversibleSequence(
        pairs([nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()), nn.Linear(DIM, DIM)]))),
    "gMLPGPT": (fast.g_mlp_gpt, lambda m: m.gMLPGPT(
        num_tokens=TOKENS, dim=DIM, depth=2, seq_len=9, window=(3, 9), act=nn.Identity())),
    "gMLPGPT reversible": (fast.g_mlp_gpt, lambda m: m.gMLPGPT(
        num_tokens=TOKENS, dim=DIM, depth=2, seq_len=9, window=(3, 9), reversible=True,
        act=nn.Sigmoid())),
    "RMSNorm": (fast.gateloop_transformer, lambda m: m.RMSNorm(DIM)),
    "PreNorm": (fast.gateloop_transformer, lambda m: m.PreNorm(DIM, nn.Linear(DIM, DIM))),
    "PostNorm": (fast.gateloop_transformer, lambda m: m.PostNorm(DIM, nn.Linear(DIM, DIM))),
    "FeedForward": (fast.gateloop_transformer, lambda m: m.FeedForward(DIM)),
    "CausalFullAttention": (fast.gateloop_transformer, lambda m: m.CausalFullAttention(
        DIM, dim_head=4, heads=2, add_swish_gating=True)),
    "GateLoopedAttention": (fast.gateloop_transformer, lambda m: m.GateLoopedAttention(
        DIM, heads=2, sub_ln=True, checkpoint_gate_looped_attn=False)),
    "SimpleGateLoopLayer": (fast.gateloop_transformer.simplified_gate_loop, lambda m:
                            m.SimpleGateLoopLayer(DIM, post_ln=True)),
    "Transformer": (fast.gateloop_transformer, lambda m: m.Transformer(
        DIM, num_tokens=TOKENS, depth=1, gate_loop_heads=2, sub_ln=True)),
    "Transformer with attention": (fast.gateloop_transformer, lambda m: m.Transformer(
        DIM, num_tokens=TOKENS, depth=1, use_gate_looped_attn=False, dim_head=4, heads=2,
        post_ln_norm=True)),
}


# treatments: named modules of a kind, replaced or changed


def children(model, *kinds):
    """(parent, name, child) of every submodule that is exactly one of `kinds`."""
    return [(parent, name, child) for parent in list(model.modules())
            for name, child in list(parent.named_children()) if type(child) in kinds]


class Adapter(nn.Module):
    """Low-rank adaptation: the base layer frozen, its attributes shown as PEFT does."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        rows, columns = base.weight.shape
        self.down = nn.Parameter(torch.randn(2, columns, dtype=base.weight.dtype) / 4)
        self.up = nn.Parameter(torch.randn(rows, 2, dtype=base.weight.dtype) / 4)

    weight = property(lambda self: self.base_layer.weight)

    def forward(self, x):
        if type(self.base_layer) is nn.Embedding:
            return self.base_layer(x) + F.embedding(x, self.up) @ self.down
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def adapters(model):
    for parent, name, child in children(model, nn.Linear, nn.Embedding):
        setattr(parent, name, Adapter(child))


def no_norms(model):
    for parent, name, _ in children(model, nn.LayerNorm):
        setattr(parent, name, nn.Identity())


def rms_norms(model):
    for parent, name, child in children(model, nn.LayerNorm):
        setattr(parent, name, nn.RMSNorm(child.normalized_shape, dtype=torch.float64))


class DoubledNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def subclassed_norms(model):
    for parent, name, child in children(model, nn.LayerNorm):
        setattr(parent, name, DoubledNorm(child.normalized_shape, dtype=torch.float64))


def no_activations(model):
    for parent, name, _ in children(model, nn.GELU, nn.Tanh, nn.SiLU, nn.Sigmoid):
        setattr(parent, name, nn.Identity())


def subclasses(model):
    """Of whatever has no children, with a forward of their own."""
    for module in list(model.modules()):
        if module is not model and not list(module.children()):
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind,), {
                "forward": lambda self, x, kind=kind: 1.5 * kind.forward(self, x)})


def replaced_forwards(model):
    for _, _, child in children(
            model, nn.LayerNorm, nn.Linear, nn.Embedding, nn.Tanh, nn.GELU, nn.Identity):
        child.forward = lambda x, forward=child.forward: 1.5 * forward(x)


def dropout_behind_embeddings(model):
    for parent, name, child in children(model, nn.Embedding):
        setattr(parent, name, nn.Sequential(child, nn.Dropout(0.5)))


def weighted(model):
    """Whatever has a weight of two axes or more: layers, convolutions, gating units."""
    return [m for m in model.modules() if isinstance(weight := getattr(m, "weight", None), (
        nn.Parameter)) and weight.ndim > 1]


def pruned(model):
    for child in [*weighted(model), *(c for _, _, c in children(model, nn.LayerNorm))]:
        prune.l1_unstructured(child, "weight", amount=0.3)


class Softened(nn.Module):
    def forward(self, weight):
        return weight.tanh()


def parametrized(model):
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter is not None:
                parametrize.register_parametrization(module, name, Softened())


def weight_norms(model):
    for child in weighted(model):
        parametrizations.weight_norm(child)


def old_weight_norms(model):
    for child in weighted(model):
        torch.nn.utils.weight_norm(child)


def spectral_norms(model):
    for child in weighted(model):
        torch.manual_seed(4)  # it draws its first vectors
        parametrizations.spectral_norm(child)


def old_spectral_norms(model):
    for child in weighted(model):
        torch.manual_seed(4)
        torch.nn.utils.spectral_norm(child)


class Int8Linear(nn.Module):
    """As weight-only quantisation leaves it: eight bits and a scale per row, no `weight`."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("rows", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.rows.to(x.dtype) * self.scale, self.bias)


def int8_weights(model):
    for parent, name, child in children(model, nn.Linear):
        setattr(parent, name, Int8Linear(child))


HOOKED = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.GELU, nn.Tanh, nn.Identity, nn.SiLU)


def forward_pre_hooks(model):
    for _, _, child in children(model, *HOOKED):
        if type(child) is not nn.Embedding:
            child.register_forward_pre_hook(lambda m, args: (1.5 * args[0],))


def forward_hooks(model):
    for _, _, child in children(model, *HOOKED):
        child.register_forward_hook(lambda m, args, out: 1.5 * out)


def backward_hooks(model):
    for _, _, child in children(model, *HOOKED):
        if type(child) is not nn.Embedding:
            child.register_full_backward_hook(lambda m, given, came: (2 * given[0],))
            child.register_full_backward_pre_hook(lambda m, came: (1.5 * came[0],))


def backward_hooks_everywhere(model):
    for module in everywhere(model):
        if not isinstance(module, (nn.Embedding, nn.ModuleList)):
            module.register_full_backward_hook(
                lambda m, given, came: tuple(None if g is None else 1.1 * g for g in given))


def everywhere(model):
    """Norms, convolutions, sequences, blocks, the whole; but for reversible blocks, which the
    published backward turns around without their hooks."""
    return [m for m in model.modules() if type(m).__name__ != "ReversibleBlock"]


def forward_hooks_everywhere(model):
    for module in everywhere(model):
        module.register_forward_hook(
            lambda m, args, out: 1.1 * out if isinstance(out, torch.Tensor) else None)


def forward_pre_hooks_everywhere(model):
    def change(module, args):
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor):
            return None
        return (1.1 * x if x.is_floating_point() else (x + 1) % TOKENS, *args[1:])

    for module in everywhere(model):
        module.register_forward_pre_hook(change)


def hooks_on_split_heads(model):
    for child in [
            c for p in model.modules() for n, c in p.named_children()
            if n in ("split_heads", "merge_heads")]:
        child.register_forward_hook(lambda m, args, out: 1.5 * out)


def tied(model):
    linears = [c for _, _, c in children(model, nn.Linear)]
    for _, _, embedding in children(model, nn.Embedding)[:1]:
        for linear in linears:
            if linear.weight.shape == embedding.weight.shape:
                linear.weight = embedding.weight


def empty_outside_forward(model):
    """As ZeRO-3 keeps them: parameters are whole only while their owner runs, forward or back."""
    for module in list(model.modules()):
        whole = {p: p.data for p in module.parameters(recurse=False)}
        if not whole:
            continue

        def gather(*_, whole=whole):
            for p, data in whole.items():
                p.data = data

        def release(*_, whole=whole):
            for p, data in whole.items():
                p.data = data.new_empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        module.register_full_backward_pre_hook(gather)
        release()
        # One step's gradient arrives for a whole parameter, and the test reads it there.
        model.register_forward_pre_hook(lambda *_: None)
        for p in whole:
            p.register_hook(lambda grad, gather=gather: gather())


def copied(model):
    return copy.deepcopy(model)


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def from_meta(model):
    state = model.state_dict()
    hollow = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    hollow.load_state_dict(state)
    return hollow


def replica(model):
    """As DataParallel makes them: parameters are attributes, computed from the originals."""
    def replicate(module):
        twin = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else replicate(child)
            if child is not None:
                setattr(twin, name, twin._modules[name])
        twin._parameters = {}
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter * 1)
        return twin

    def run(*args):
        return replicate(model)(*args)

    return run


def other_weights(model):
    """functional_call, with weights that are computed."""
    def run(*args):
        return functional_call(model, {k: 1.5 * p for k, p in model.named_parameters()}, args)

    return run


TREATMENTS = [
    adapters, no_norms, rms_norms, subclassed_norms, no_activations, subclasses, replaced_forwards,
    dropout_behind_embeddings, pruned, parametrized, weight_norms, old_weight_norms,
    spectral_norms, old_spectral_norms, int8_weights, forward_pre_hooks, forward_hooks,
    backward_hooks, backward_hooks_everywhere, forward_hooks_everywhere,
    forward_pre_hooks_everywhere, hooks_on_split_heads, tied, empty_outside_forward, copied,
    saved_whole, from_meta, replica, other_weights]


def twins(name):
    """Both in float64, with the same weights, and an input."""
    file, build = CLASSES[name]
    models = []
    for module in (PUBLISHED[file], file):
        torch.manual_seed(5)
        models.append(build(module).double())
        with torch.no_grad():
            for p in models[-1].parameters():
                p.add_(torch.randn_like(p), alpha=0.3)
    return models, example(models[0])


def example(model):
    torch.manual_seed(6)
    if any(isinstance(m, nn.Embedding) for m in model.modules()):
        return torch.randint(0, TOKENS, (2, N))
    return torch.randn(2, N, DIM, dtype=torch.float64)


def step(model, run, x):
    """Output, gradients by name and the output after a step of SGD."""
    parameters = dict(model.named_parameters())
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    torch.manual_seed(7)
    out = run(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    if out.requires_grad:
        (out * weight).sum().backward()
    actual = {"output": out.detach()}
    actual.update({n: p.grad for n, p in parameters.items() if p.grad is not None})
    actual = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in actual.items()}
    if x.is_floating_point():
        actual["x"] = x.grad
    if any(p.grad is not None for p in parameters.values()):
        torch.optim.SGD(parameters.values(), lr=1e-2).step()
        torch.manual_seed(8)
        actual["output after a step"] = run(x).detach()
    return actual


def assert_same_steps(theirs, ours):
    # Only nothing is left out: zeros stand for a gradient that is none.
    for key in theirs.keys() | ours.keys():
        if key not in theirs or key not in ours:
            assert not (theirs | ours)[key].any(), key
    floor = 1e-3 * max(t.abs().max().item() for t in theirs.values())
    for key in theirs.keys() & ours.keys():
        assert_near(ours[key], theirs[key], key, floor)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("treat", TREATMENTS, ids=lambda t: t.__name__)
def test_treatment(treat, name):
    if treat is other_weights and "evers" in name:
        return  # the published backward takes the weights that are there then
    models, x = twins(name)
    actual = []
    for model in models:
        torch.manual_seed(9)
        run = treat(model)
        trained = run if isinstance(run, nn.Module) else model
        actual.append(step(trained, run or model, x))
    assert_same_steps(*actual)


@pytest.mark.parametrize("name", [n for n in CLASSES if "GPT" in n or "LM" in n or "Tran" in n])
def test_soft_tokens(name):
    """A Linear in the embedding's place takes (b, n, num_tokens), floating."""
    models, tokens = twins(name)
    soft = F.one_hot(tokens, TOKENS).double().softmax(-1)
    actual = []
    for model in models:
        torch.manual_seed(9)
        linear = nn.Linear(TOKENS, DIM, dtype=torch.float64)
        setattr(model, "to_embed" if hasattr(model, "to_embed") else "token_emb", linear)
        actual.append(step(model, model, soft))
    assert_same_steps(*actual)


# what is no training step, or is not held against the published class: each check takes the
# published module and one that is to do the same, ours or an accelerated one, and an input


def offload(model):
    """As accelerate does: weights are on meta until their owner is called."""
    for module in model.modules():
        kept = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}

        def put(device, module=module, kept=kept):
            for table, tensors in kept.items():
                for name, tensor in tensors.items():
                    if tensor is not None:
                        moved = tensor.detach().to(device)
                        getattr(module, table)[name] = (
                            nn.Parameter(moved, False) if table == "_parameters" else moved)

        module.register_forward_pre_hook(lambda *_, put=put: put("cpu"))
        module.register_forward_hook(lambda *_, put=put: put("meta"))
        put("meta")


@torch.no_grad()
def check_offloaded(theirs, model, x):
    torch.manual_seed(7)
    expected = model(x)
    offload(model)
    torch.manual_seed(7)
    assert_near(model(x), expected)  # hooks on a norm take the gating units off their operator


@torch.no_grad()
def check_offloaded_by_accelerate(*models_and_x):
    *models, x = models_and_x
    hooks = pytest.importorskip("accelerate")
    outputs = []
    for model in models:
        torch.manual_seed(7)
        outputs.append(hooks.cpu_offload(model, "cpu")(x))
    assert_near(*outputs)


def check_peft(*models_and_x):
    """LoRA on every Linear and Embedding, and merged into them."""
    *models, x = models_and_x
    peft = pytest.importorskip("peft")
    linears = [n for n, m in models[0].named_modules() if type(m) in (nn.Linear, nn.Embedding)]
    if not linears:
        return
    actual, merged = [], []
    for model in models:
        torch.manual_seed(9)
        adapted = peft.get_peft_model(model, peft.LoraConfig(
            target_modules=linears, r=2, init_lora_weights=False)).double()
        actual.append(step(adapted, adapted, x))
        torch.manual_seed(7)
        merged.append(adapted.merge_and_unload()(x))
    assert_same_steps(*actual)
    assert_near(*merged)


@torch.no_grad()
def check_quantized(*models_and_x, embeddings=False):
    from torch.ao.quantization import (
        default_dynamic_qconfig,
        float_qparams_weight_only_qconfig,
        quantize_dynamic,
    )

    *models, x = models_and_x
    kinds = {nn.Linear: default_dynamic_qconfig}
    if embeddings:
        kinds[nn.Embedding] = float_qparams_weight_only_qconfig
    x = x.float() if x.is_floating_point() else x
    theirs, ours = (quantize_dynamic(m.float().eval(), kinds, dtype=torch.qint8)(x)
                    for m in models)
    # An activation on the edge of two of the 255 values may fall to either side.
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def check_quantized_embeddings(*models_and_x):
    check_quantized(*models_and_x, embeddings=True)


def check_traced(theirs, model, x, training=True):
    model.train(training)
    traced = torch.jit.trace(copy.deepcopy(model), x, check_trace=False)
    assert_same_steps(step(model, model, x), step(traced, traced, x))


def check_traced_in_eval(*models_and_x):
    check_traced(*models_and_x, training=False)


def check_ensemble(theirs, model, x):
    """Stacked weights under vmap, with plain autograd outside of it."""
    if not list(model.parameters()):
        return
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    parameters, buffers = stack_module_state([model, other])
    out = torch.vmap(lambda p, b: functional_call(model, (p, b), (x,)))(parameters, buffers)
    expected = torch.stack([model(x), other(x)])
    assert_near(out, expected)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for key, stacked in parameters.items():
        pair = [dict(m.named_parameters())[key].grad for m in (model, other)]
        if pair[0] is not None:
            assert_near(stacked.grad, torch.stack(pair), key, 1e-3)


def check_gradients_by_sample(theirs, model, x):
    parameters = dict(model.named_parameters())

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).sin().sum()

    actual = torch.vmap(torch.func.grad(loss), (None, 0), randomness="different")(parameters, x)
    for i in range(len(x)):
        expected = torch.func.grad(loss)(parameters, x[i])
        largest = max((e.abs().max().item() for e in expected.values()), default=0)
        for key, e in expected.items():
            assert_near(actual[key][i], e, key, 1e-3 * largest)


# One for all groups, which never ends: torch's can hang there. It joins its threads with the GIL
# held, for which a thread may wait that is freeing the last work.
gloo = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)
dist.Backend.register_backend("lasting_gloo", lambda *_: gloo, devices=["cpu"])


@contextlib.contextmanager
def group_of_one():
    """For wrappers that talk to other processes: there are none. test_distributed.py has two."""
    dist.init_process_group("lasting_gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_ddp(theirs, model, x):
    if list(model.parameters()):
        alone = copy.deepcopy(model)
        with group_of_one():
            wrapped = DistributedDataParallel(model, find_unused_parameters=True)
            assert_same_steps(step(alone, alone, x), step(model, wrapped, x))


def check_fsdp2(theirs, model, x):
    """Whatever has parameters of its own is sharded on its own, and so is the root."""
    alone = copy.deepcopy(model)
    with group_of_one():
        for module in reversed(list(model.modules())):  # children first
            if module is model or list(module.parameters(recurse=False)):
                fully_shard(module)
        assert_same_steps(step(alone, alone, x), step(model, model, x))


CHECKS = [
    check_offloaded, check_offloaded_by_accelerate, check_peft, check_quantized,
    check_quantized_embeddings, check_traced, check_traced_in_eval, check_ensemble,
    check_gradients_by_sample, check_ddp, check_fsdp2]
every_class = pytest.mark.parametrize("name", CLASSES)


@every_class
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_other_treatment(check, name):
    models, x = twins(name)
    check(*models, x)


@every_class
def test_scripted_where_the_published_class_is(name):
    (theirs, ours), x = twins(name)
    try:
        torch.jit.script(theirs)
    except Exception:
        return
    assert torch.equal(torch.jit.script(ours)(x), ours(x))


@pytest.mark.long
@every_class
def test_built_on_meta(name):
    file, build = CLASSES[name]
    (theirs, _), x = twins(name)
    with torch.device("meta"):
        ours = build(file).double()
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    assert_same_steps(step(theirs, theirs, x), step(ours, ours, x))


@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_modules(name, dtype):
    """As near to float64 as twice the distance of float32 weights under autocast, whatever the
    stored weights say: slow decays above all."""
    (_, model), x = twins(name)
    if hasattr(model, "alpha") or hasattr(model, "alphas"):
        x = torch.randn(2, 300, DIM, dtype=torch.float64)
    for key, p in model.named_parameters():
        if "alpha" in key or "dampen" in key:
            p.fill_(-7.0 if "alpha" in key else 9.0)
    model = model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    exact = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
    with torch.autocast("cpu", dtype):
        plain = copy.deepcopy(model).float()(x.float() if x.is_floating_point() else x)
    error, allowed = ((out.to(dtype) - exact).norm() for out in (model(x), plain))
    assert error <= 2 * allowed


def test_half_precision_position_gates():
    """They are complex gates over channels, and half precision has no complex numbers."""
    model = fast.CausalFullAttention(DIM, dim_head=4, heads=2, data_dependent_rel_pos=True)
    x = torch.randn(2, N, DIM, dtype=torch.bfloat16)
    exact = copy.deepcopy(model.bfloat16()).double()(x.double())
    assert (model(x) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_tells_late_rotary_positions_apart(dtype, autocast):
    """And its gradients. 16 bits of bfloat16 have no odd numbers above 256."""
    pytest.importorskip("rotary_embedding_torch")
    model = fast.CausalFullAttention(DIM, dim_head=8, heads=2, rotary_emb=True)
    model = model.to(torch.float32 if autocast else dtype)
    x = 2 * torch.randn(1, 300, DIM).to(dtype)
    weight = torch.zeros(1, 300, DIM)
    weight[:, 257:] = 1
    results = []
    for module in (model, copy.deepcopy(model).double()):
        leaf = x.to(module.to_out[1].weight.dtype).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast and module is model):
            out = module(leaf)
        results.append([out[:, 257:], *torch.autograd.grad((out.double() * weight).sum(), leaf)])
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("treat", ["forward", "rotate_queries_or_keys", "subclass", "factor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rotary_positions_that_were_replaced(treat, dtype):
    """In 16 bits, too, where a module as it was built is not called."""
    rotary_embedding_torch = pytest.importorskip("rotary_embedding_torch")
    pair = []
    for module in (fast.CausalFullAttention, PUBLISHED[fast.gateloop_transformer]
                   .CausalFullAttention):
        torch.manual_seed(5)
        model = module(DIM, dim_head=8, heads=2, rotary_emb=True)
        rotary = model.rotary_emb
        if treat == "subclass":
            class Other(rotary_embedding_torch.RotaryEmbedding):
                def forward(self, *args, **kwargs):
                    return 1.5 * super().forward(*args, **kwargs)
            model.rotary_emb = Other(8)
        elif treat == "factor":
            model.rotary_emb = rotary_embedding_torch.RotaryEmbedding(8, interpolate_factor=3.0)
        elif treat == "forward":
            rotary.forward = lambda *a, f=rotary.forward, **k: 1.5 * f(*a, **k)
        else:  # as it is called there, without an offset
            rotary.rotate_queries_or_keys = (
                lambda t, f=rotary.rotate_queries_or_keys: f(t) + 0.5 * t)
        pair.append(model.to(dtype))
    x = torch.randn(2, N, DIM).to(dtype)
    ours, theirs = (model(x) for model in pair)
    assert (ours - theirs).norm() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinite_logits_of_position_gates_have_finite_gradients(dtype):
    model = fast.CausalFullAttention(DIM, dim_head=4, heads=2, data_dependent_rel_pos=True)
    model = model.to(dtype)
    given = torch.zeros(1, N, 2, 2, 2, dtype=dtype)
    given[..., 0] = 1
    given[0, 2, 0, 0, 0], given[0, 3, 1, 1, 0] = torch.inf, 1e4
    leaf = given.requires_grad_()
    model.to_a = torch.nn.Module()
    model.to_a.forward = lambda x: leaf
    out = model(torch.randn(1, N, DIM, dtype=dtype))
    grad, = torch.autograd.grad(out.float().sum(), leaf)
    assert out.isfinite().all() and grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, 1.0])
def test_infinite_gate_logits_pass_the_blend(fraction):
    logits = torch.tensor([[torch.inf, 1.0], [-torch.inf, torch.inf], [2.0, 3.0]],
                          requires_grad=True)
    blended = fast.gateloop_transformer.gateloop_transformer._gate_logits(
        logits, fraction, False)
    assert torch.equal(blended, logits)
    blended.sum().backward()
    assert logits.grad.isfinite().all()
    assert torch.allclose(logits.grad[2], torch.tensor(fraction))


@torch.no_grad()
def test_gate_logits_beyond_float16():
    """An infinite logit has a gate, and a layer in float16 no NaN."""
    model = fast.GateLoopedAttention(16).half()
    model.to_a[0].weight.mul_(10_000)
    model.to_qkv.weight.mul_(0.1)
    x = 5 * torch.randn(1, 40, 16).half()
    logits = model.to_a(x)
    assert logits.isinf().any()
    wide = copy.deepcopy(model).double()
    wide.to_a.register_forward_hook(lambda *_: logits.double())
    exact = wide(x.double())
    assert (model(x) - exact).norm() < 0.01 * exact.norm()
