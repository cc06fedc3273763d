"""Text token by token: fastmix.generate and stream, and the published AutoregressiveWrappers."""

import inspect

import g_mlp_gpt.autoregressive_wrapper
import g_mlp_gpt.g_mlp_gpt
import gated_state_spaces_pytorch.autoregressive_wrapper
import gated_state_spaces_pytorch.dsconv
import gated_state_spaces_pytorch.gss
import gated_state_spaces_pytorch.mhesa
import metaformer_gpt.autoregressive_wrapper
import metaformer_gpt.metaformer_gpt
import pytest
import torch

import fastmix
from fastmix import nn
from fastmix.generation import _pick, _RowsOfModel
from test_caches import FAMILIES, build

PROMPT = torch.tensor([[1, 4, 2, 0, 3, 3], [2, 2, 0, 1, 4, 0]])


def greedily(model, prompt, count):
    """The definition: the whole context for every token."""
    for _ in range(count):
        prompt = torch.cat((prompt, model(prompt)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return prompt


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_the_likeliest_token_each_time(name):
    model, seen = build(name), []
    out = fastmix.generate(model, PROMPT, 9, temperature=0, stream=seen.append)
    assert torch.equal(out, greedily(model, PROMPT, 9))
    assert torch.equal(torch.stack(seen, dim=1), out[:, 6:])
    steps = fastmix.stream(model, PROMPT, 9, temperature=0)
    assert torch.equal(torch.stack(list(steps), dim=1), out[:, 6:])


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_other_lengths_are_as_if_alone(name):
    """What a left-padded batch, masked or not, gets wrong: lags, windows and counts begin at each
    row's own first token."""
    model, lengths = build(name), [4, 1, 6, 2, 4]
    prompt = torch.randint(0, 5, (5, 6))
    out = fastmix.generate(model, prompt, 9, temperature=0, prompt_lengths=lengths)
    assert torch.equal(out[:, :6], prompt)
    for row, length in enumerate(lengths):
        alone = greedily(model, prompt[row:row + 1, :length], 9)
        assert torch.equal(out[row, 6:], alone[0, length:]), row


@pytest.mark.parametrize("name", FAMILIES)
def test_a_left_padded_batch_is_rolled(name):
    """What its mask leaves out goes behind each row: then all rows have the logits that they
    have alone, after the prompt and after each token."""
    model, lengths = build(name), torch.tensor([3, 6, 5, 1])
    padded = torch.randint(0, 5, (4, 6))
    at = torch.arange(6)
    mask = at >= 6 - lengths[:, None]
    prompt = padded.gather(1, (at - lengths[:, None]) % 6)
    new = torch.randint(0, 5, (4, 5))
    rows = _RowsOfModel(model, mask.sum(dim=1).tolist())
    with torch.no_grad():
        logits = [rows.begin(prompt), *(rows.go_on(new[:, t]) for t in range(5))]
        for row in range(4):
            alone = torch.cat((padded[row, mask[row]], new[row]))[None]
            expected = model(alone)[0, lengths[row] - 1:]
            ours = torch.stack([step[row] for step in logits])
            assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_rows_end_at_their_eos():
    model = build("gateloop")
    free = fastmix.generate(model, PROMPT, 12, temperature=0)[:, 6:]
    eos = int(free[0, 2])
    out = fastmix.generate(model, PROMPT, 12, temperature=0, eos_token=eos)[:, 6:]
    for row, without in zip(out, free):
        after = (without == eos).cumsum(0) - (without == eos).int() > 0
        assert torch.equal(row, without.masked_fill(after, eos))
    alone = list(fastmix.stream(model, PROMPT[:1], 12, temperature=0, eos_token=eos))
    assert [int(t) for t in alone] == out[0, :len(alone)].tolist()
    assert len(alone) == free[0].tolist().index(eos) + 1


def test_draws_come_from_the_generator():
    model = build("smoothing")

    def drawn(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return fastmix.generate(model, PROMPT, 12, generator=generator, **options)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    greedy = fastmix.generate(model, PROMPT, 12, temperature=0)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert torch.equal(drawn(1, **options), greedy), options


def test_what_is_drawn_from():
    logits = torch.tensor([0.1, 0.5, 0.05, 0.35]).log().expand(4000, 4)

    def shares(temperature=1.0, top_k=None, top_p=None, min_p=None):
        generator = torch.Generator().manual_seed(0)
        tokens = _pick(logits, temperature, top_k, top_p, min_p, generator)
        return tokens.bincount(minlength=4) / 4000

    for options, expected in (
            ({}, [0.1, 0.5, 0.05, 0.35]),
            ({"top_k": 2}, [0, 0.5 / 0.85, 0, 0.35 / 0.85]),
            ({"top_p": 0.5}, [0, 1, 0, 0]), ({"top_p": 0.51}, [0, 0.5 / 0.85, 0, 0.35 / 0.85]),
            ({"min_p": 0.15}, [0.1 / 0.95, 0.5 / 0.95, 0, 0.35 / 0.95]),
            ({"temperature": 0.5, "top_k": 3}, [0.01 / 0.3825, 0.25 / 0.3825, 0, 0.1225 / 0.3825])):
        assert (shares(**options) - torch.tensor(expected)).abs().max() < 0.03, options


def test_modules_keep_their_mode_and_gradients_are_not_recorded():
    model = build("gmlp reversible").train()  # it drops layers in training
    model.to_logits.eval()
    modes = [module.training for module in model.modules()]
    out = fastmix.generate(model, PROMPT, 3, temperature=0)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(out, fastmix.generate(model.eval(), PROMPT, 3, temperature=0))


def test_eval_mode_is_entered_once_and_left_for_whoever_iterates():
    model, entered = build("gateloop").train(), []

    def eval_and_count():
        entered.append(1)
        return torch.nn.Module.eval(model)

    model.eval = eval_and_count
    fastmix.generate(model, PROMPT, 4, temperature=0)
    assert model.training and len(entered) == 1
    for _ in fastmix.stream(model, PROMPT, 4, temperature=0):
        assert all(module.training for module in model.modules())
    assert len(entered) == 5
    with pytest.raises(ZeroDivisionError):
        fastmix.generate(model, PROMPT, 4, stream=lambda _: 1 / 0)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("options, error, message", [
    ({"prompt": PROMPT[:, :0]}, ValueError, "prompt must have at least one time step, got n=0"),
    ({"prompt": PROMPT[:0]}, ValueError, "prompt must have at least one row, got shape"),
    ({"prompt": PROMPT[0]}, ValueError, r"prompt must have shape \(b, n\), got \(6,\)"),
    ({"prompt": PROMPT.float()}, TypeError, "prompt must be int64 or int32, got float32"),
    ({"prompt": [[1]]}, TypeError, "prompt must be a tensor, got list"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
    ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an integer, got 2.0"),
    ({"temperature": -1}, ValueError, "temperature must be at least 0, got -1"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_k": 6}, ValueError, "top_k must be at most 5, as the model has 5 tokens, got 6"),
    ({"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, got 0"),
    ({"min_p": 1.5}, ValueError, "min_p must be above 0 and at most 1, got 1.5"),
    ({"eos_token": 5}, ValueError, "eos_token must be at most 4, as the model has 5 tokens, got 5"),
    ({"eos_token": -1}, ValueError, "eos_token must be at least 0, got -1"),
    ({"prompt_lengths": [6, 0]}, ValueError, r"prompt_lengths must be from 1 to n=6, got \[6, 0\]"),
    ({"prompt_lengths": [6]}, ValueError, r"prompt_lengths must have shape \(b\) = \(2\), got"),
    ({"prompt_lengths": [6.0, 6.0]}, TypeError, "prompt_lengths must be int64 or int32, got float"),
    ({"max_new_tokens": 15}, ValueError, "prompt and max_new_tokens, less the last one, must be at "
     "most the model's max_seq_len = 19 together, got 6 and 15"),
])
def test_refused(options, error, message):
    """Before the model has run: `stream` before its first step is asked for."""
    arguments = {"prompt": PROMPT, "max_new_tokens": 14, **options}
    before = PROMPT.clone()
    for function in (fastmix.generate, fastmix.stream):
        with pytest.raises(error, match=f"^{function.__name__}: {message}"):
            function(build("metaformer"), **arguments)
    assert torch.equal(before, PROMPT)


def test_an_embedding_of_positions_that_is_put_there_sets_the_limit():
    model = build("metaformer")
    dim = model.pos_emb.embedding_dim
    model.pos_emb = torch.nn.Embedding(21, dim)
    assert fastmix.generate(model, PROMPT, 16).shape == (2, 22)
    with pytest.raises(ValueError, match="^generate: .* max_seq_len = 21 together, got 6 and 17"):
        fastmix.generate(model, PROMPT, 17)
    model.pos_emb = torch.nn.Sequential(torch.nn.Embedding(21, dim))  # which tells no number
    assert fastmix.generate(model, PROMPT, 16).shape == (2, 22)
    with pytest.raises(IndexError, match="^MetaformerGPT: x must have no more time steps"):
        fastmix.generate(model, PROMPT, 17)


@pytest.mark.parametrize("option", ["top_k", "eos_token"])
def test_models_that_do_not_tell_their_vocabulary_are_asked(option):
    model = build("metaformer")
    model.to_logits = torch.nn.Sequential(model.to_logits, torch.nn.Identity())
    with pytest.raises(ValueError, match=f"generate: {option} must be at most .* got 6"):
        fastmix.generate(model, PROMPT, 5, **{option: 6})
    assert fastmix.generate(model, PROMPT, 5, **{option: 4}).shape == (2, 11)


# the published wrappers

WRAPPED = {
    "metaformer": (
        metaformer_gpt, nn.metaformer_gpt,
        lambda ours: (nn if ours else metaformer_gpt.metaformer_gpt).MetaformerGPT(
            num_tokens=30, dim=8, depth=1, heads=2, dim_head=4, max_seq_len=24)),
    "smoothing": (
        gated_state_spaces_pytorch, nn.gated_state_spaces_pytorch,
        lambda ours: (nn if ours else gated_state_spaces_pytorch.mhesa
                      ).GatedExponentialSmoothingLM(
            num_tokens=30, dim=8, depth=1, heads=2, dim_mhesa=8)),
    "spaces": (
        gated_state_spaces_pytorch, nn.gated_state_spaces_pytorch,
        lambda ours: (nn if ours else gated_state_spaces_pytorch.gss).GatedStateSpacesLM(
            num_tokens=30, dim=8, depth=1, dss_kernel_N=4, dss_kernel_H=6)),
    "dsconv": (
        gated_state_spaces_pytorch, nn.gated_state_spaces_pytorch,
        lambda ours: (nn if ours else gated_state_spaces_pytorch.dsconv).GatedDsConvLM(
            num_tokens=30, dim=8, depth=1, heads=2, dim_dsconv=8, max_seq_len=16)),
    "gmlp": (
        g_mlp_gpt, nn.g_mlp_gpt,
        lambda ours: (nn if ours else g_mlp_gpt.g_mlp_gpt).gMLPGPT(
            num_tokens=30, dim=8, depth=1, seq_len=12, window=4, attn_dim=3)),
}
LIMITS = {"smoothing": {"max_seq_len": 10}, "dsconv": {"max_seq_len": 12, "pad_value": 7}}


def wrapped(name):
    published, ours, make = WRAPPED[name]
    pair = []
    for package, is_ours in ((ours, True), (published, False)):
        torch.manual_seed(0)
        net = make(is_ours)
        wrapper = package.autoregressive_wrapper.AutoregressiveWrapper
        pair.append(wrapper(net, **LIMITS.get(name, {})))
    assert pair[0].state_dict().keys() == pair[1].state_dict().keys()
    return pair


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_draw_the_same_tokens(name):
    """Beyond the window, too, where the original has one."""
    ours, theirs = wrapped(name)
    constructors = [[(p.name, p.default) for p in inspect.signature(type(w)).parameters.values()]
                    for w in (ours, theirs)]
    assert constructors[0] == constructors[1]
    start = torch.randint(0, 30, (2, 5))
    for options in ({}, {"temperature": 0.7, "filter_thres": 0.5}):
        tokens = []
        for wrapper in (ours.train(), theirs.train()):
            torch.manual_seed(3)
            tokens.append(wrapper.generate(start, 17, **options))
            assert wrapper.training
        assert torch.equal(*tokens) and tokens[0].shape == (2, 17)
    losses = [wrapper(start) for wrapper in (ours, theirs)]
    torch.testing.assert_close(*losses)


def test_wrappers_end_at_eos():
    ours, theirs = wrapped("gmlp")
    start = torch.randint(0, 30, (5,))  # one row, without a batch
    torch.manual_seed(3)
    eos = int(theirs.generate(start, 9)[6])
    tokens = []
    for wrapper in (ours, theirs):
        torch.manual_seed(3)
        tokens.append(wrapper.generate(start, 9, eos_token=eos))
    assert torch.equal(*tokens) and tokens[0].ndim == 1 and len(tokens[0]) <= 7
    # The other originals do not get that far: they pad with a name that is not defined.
    ours, _ = wrapped("dsconv")
    start = torch.randint(0, 30, (2, 5))
    torch.manual_seed(3)
    free = ours.generate(start, 40)
    eos = int(start[1, 1])
    start[0, 3] = eos
    torch.manual_seed(3)
    assert torch.equal(ours.generate(start, 40, eos_token=eos), torch.full((2, 1), 7))
    assert free.shape == (2, 40)


def test_wrappers_refuse_in_words():
    ours, _ = wrapped("smoothing")
    start = torch.randint(0, 30, (2, 5))
    for arguments, message in (
            ((start, 3, None, 0.0), "temperature must be above 0, got 0.0"),
            ((start, 3, None, 1.0, 0.99), "filter_thres must leave 1 to all 30 tokens, got 0.99"),
            ((start[:, :0], 3), "start_tokens must have at least one time step, got n=0"),
            ((start[0], 3), r"start_tokens must have shape \(b, n\), got \(5,\)")):
        with pytest.raises(ValueError, match=f"^AutoregressiveWrapper: {message}"):
            ours.generate(*arguments)
    with pytest.raises(ValueError, match="x must hold at least 1 sequence of 2 tokens, got shape"):
        ours(start[:, :1])
    ours, _ = wrapped("metaformer")
    with pytest.raises(ValueError, match="x must have at most 24 time steps together with those"):
        ours.generate(start, 30)
    with pytest.raises(IndexError, match="^AutoregressiveWrapper: x must hold token ids from 0 to"):
        ours(torch.tensor([[1, 30]]))  # whose last token is a label alone


def test_a_wrapper_takes_nets_that_keep_no_cache():
    ours, theirs = wrapped("smoothing")
    torch.manual_seed(3)
    expected = theirs.generate(PROMPT, 4)
    ours.net = theirs.net
    torch.manual_seed(3)
    assert torch.equal(ours.generate(PROMPT, 4), expected)
