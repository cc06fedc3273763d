"""The models as those of Hugging Face's transformers."""

import doctest
import subprocess
import sys

import pytest
import torch

import fastmix

pytestmark = pytest.mark.long  # importing transformers takes seconds

SIZES = {"num_tokens": 23, "dim": 16, "depth": 2}
ARGUMENTS = {
    "GateLoopTransformer": {},
    "GatedDsConvLM": {"heads": 2, "dim_dsconv": 16, "max_seq_len": 32},
    "GatedExponentialSmoothingLM": {"heads": 2, "dim_mhesa": 16},
    "GatedStateSpacesLM": {"dss_kernel_N": 4, "dss_kernel_H": 8},
    "MetaformerGPT": {"heads": 2, "dim_head": 8, "max_seq_len": 32},
    "gMLPGPT": {"heads": 2, "seq_len": 32, "window": [4, [8, 2]]},  # as JSON has them
}


@pytest.fixture(scope="module")
def hf():
    import fastmix.hf
    return fastmix.hf


def test_examples_run(hf, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran = doctest.testmod(hf, extraglobs={"torch": torch, "fastmix": fastmix})
    assert ran.attempted > 5 and ran.failed == 0


def build(hf, name):
    torch.manual_seed(0)
    model = hf.FastmixForCausalLM(hf.FastmixConfig(name, SIZES | ARGUMENTS[name])).eval()
    with torch.no_grad():
        for p in model.parameters():  # gating weights begin at 0
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("name", ARGUMENTS)
def test_saved_loaded_and_continued(hf, name, tmp_path):
    from transformers import AutoModelForCausalLM
    model = build(hf, name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded.model) is getattr(fastmix.nn, name)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    prompt = torch.randint(23, (3, 5))
    expected = fastmix.generate(model.model, prompt, 9, temperature=0)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=9, do_sample=False), expected)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=9, do_sample=False, use_cache=False),
                       expected)


def test_each_token_runs_alone(hf):
    model, lengths = build(hf, "GateLoopTransformer"), []
    model.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(torch.randint(23, (2, 5)), max_new_tokens=4, do_sample=False)
    assert lengths == [5, 1, 1, 1]


def test_beams_take_their_caches_along(hf):
    model, prompt = build(hf, "MetaformerGPT"), torch.randint(23, (2, 5))
    options = dict(max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(model.generate(prompt, **options),
                       model.generate(prompt, use_cache=False, **options))


def test_a_cache_of_the_caller_goes_on(hf):
    model, prompt = build(hf, "GatedDsConvLM"), torch.randint(23, (2, 7))
    whole = model(prompt).logits
    first = model(prompt[:, :4], use_cache=True)
    for name in "cache", "past_key_values":
        rest = model(prompt[:, 4:], **{name: first[name]})
        torch.testing.assert_close(rest.logits, whole[:, 4:], rtol=0, atol=1e-4)
    assert torch.equal(
        model.generate(prompt, cache=first.cache, max_new_tokens=3, do_sample=False),
        model.generate(prompt, max_new_tokens=3, do_sample=False))


def test_loss_and_padding(hf):
    model, tokens = build(hf, "GatedExponentialSmoothingLM"), torch.randint(23, (2, 7))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    loss = model(tokens, attention_mask=mask, labels=labels).loss
    kept = torch.cat([model(tokens[:1]).logits[0, :-1], model(tokens[1:, :5]).logits[0, :-1]])
    expected = torch.nn.functional.cross_entropy(
        kept, torch.cat([tokens[0, 1:], tokens[1, 1:5]]))
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="only at the end of a row"):
        model(tokens, attention_mask=mask.flip(1))
    for padded in mask, mask.flip(1):
        with pytest.raises(ValueError, match="prompt_lengths"):
            model.generate(tokens, attention_mask=padded, max_new_tokens=2)


def test_what_config_refuses(hf):
    with pytest.raises(ValueError, match="model must be one of GateLoopTransformer, "):
        hf.FastmixConfig("GPT")
    with pytest.raises(TypeError, match="saved as JSON"):
        hf.FastmixConfig("gMLPGPT", {"act": torch.nn.Tanh()})


def test_fastmix_does_not_import_it():
    code = ("import sys, fastmix, fastmix.nn; fastmix.accelerate; "
            "assert 'transformers' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
