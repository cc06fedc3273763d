"""The language models of fastmix.nn as models of Hugging Face's transformers, which must be
installed: `generate`, `save_pretrained`, `from_pretrained`, `AutoModelForCausalLM`, `Trainer`."""

import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from fastmix import nn as fastmix_nn
from fastmix.states import select_rows

MODELS = ("GateLoopTransformer", "GatedDsConvLM", "GatedExponentialSmoothingLM",
          "GatedStateSpacesLM", "MetaformerGPT", "gMLPGPT")


class FastmixConfig(PretrainedConfig):
    """Names one of the language models of fastmix.nn, and how it is built.

    model: one of MODELS; arguments: the keyword arguments of its constructor

    >>> config = FastmixConfig("MetaformerGPT", {"num_tokens": 256, "dim": 64, "depth": 2})
    >>> config.vocab_size
    256
    """

    model_type = "fastmix"

    def __init__(
        self, model: str = MODELS[0], arguments: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if model not in MODELS:
            raise ValueError(f"FastmixConfig: model must be one of {', '.join(MODELS)}, "
                             f"got {model!r}")
        arguments = arguments or {}
        try:
            json.dumps(arguments)
        except TypeError as error:
            raise TypeError("FastmixConfig: arguments must be numbers, strings, None and lists of "
                            f"them, as they are saved as JSON, got {arguments}") from error
        self.model = model
        self.arguments = arguments
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @property
    def vocab_size(self) -> int | None:
        return self.arguments.get("num_tokens")


class Cache:
    """A cache of fastmix as `generate` of transformers handles one."""

    is_compileable = False
    is_linear = (True,)  # as those of state-space models: it has no rows of its own to count

    def __init__(self, state: Any) -> None:
        self.state = state

    def get_seq_length(self) -> int:
        """The number of tokens that the first row has had, and in generate all."""
        return int(self.state.steps[0])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = select_rows(self.state, beam_idx)


@dataclass
class Output(ModelOutput):
    """The output of FastmixForCausalLM; the cache is under the names of all versions."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    past_key_values: Cache | None = None


class FastmixForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model that config names; `model` is the module of fastmix.nn.

    >>> config = FastmixConfig("MetaformerGPT", {"num_tokens": 256, "dim": 64, "depth": 2})
    >>> model = FastmixForCausalLM(config)
    >>> trained = fastmix.nn.MetaformerGPT(num_tokens=256, dim=64, depth=2)
    >>> model.model.load_state_dict(trained.state_dict())
    <All keys matched successfully>
    >>> model.save_pretrained("folder")
    >>> again = AutoModelForCausalLM.from_pretrained("folder")
    >>> again.generate(torch.tensor([[72, 105]]), max_new_tokens=3).shape
    torch.Size([1, 5])
    """

    config_class = FastmixConfig
    base_model_prefix = "model"
    _is_stateful = True  # a cache cannot go back to fewer tokens

    def __init__(self, config: FastmixConfig) -> None:
        super().__init__(config)
        arguments = {name: _tuples(value) for name, value in config.arguments.items()}
        self.model: nn.Module = getattr(fastmix_nn, config.model)(**arguments)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules of fastmix.nn initialise themselves."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        cache: Cache | None = None, past_key_values: Cache | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None,
        return_dict: bool | None = None, **kwargs: Any,
    ) -> Output | tuple:
        """input_ids (b, n) -> logits (b, n, num_tokens).

        labels (b, n) are usually input_ids again, not shifted, with -100 for tokens that do not
        count. Without a cache, attention_mask (b, n) may leave out tokens at the end of a row;
        ValueError for tokens left out elsewhere.
        """
        cache = past_key_values if cache is None else cache
        use_cache = cache is not None if use_cache is None else use_cache
        if attention_mask is not None:
            _check_mask(attention_mask, "nowhere" if use_cache else "behind")
        if use_cache:
            logits, state = self.model(
                input_ids, cache=cache and cache.state, return_cache=True)
            cache = Cache(state)
        else:
            logits = self.model(input_ids)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, logits.shape[-1], **kwargs)
        out = Output(loss, logits, cache, cache)
        return out if return_dict is not False else out.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache: Cache | None = None,
        past_key_values: Cache | None = None, attention_mask: Tensor | None = None,
        use_cache: bool = True, **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache has not had."""
        cache = past_key_values if cache is None else cache
        if cache is not None:
            input_ids = input_ids[:, cache.get_seq_length():]
        elif attention_mask is not None:
            _check_mask(attention_mask, "nowhere")
        return {"input_ids": input_ids, "cache": cache, "use_cache": use_cache}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """The first call of the model makes one."""


def _tuples(value: Any) -> Any:
    """JSON has lists alone; constructors take tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check_mask(mask: Tensor, where: str) -> None:
    padded = mask == 0
    if where == "behind":
        padded = padded[:, :-1] & ~padded[:, 1:]
    if padded.any():
        raise ValueError(
            "FastmixForCausalLM: attention_mask must leave out tokens only at the end of a row, "
            "and none with a cache: every token before is part of the state, and positions are "
            "counted from a row's first. fastmix.generate(model.model, …, prompt_lengths=…) "
            "continues rows of different lengths")


AutoConfig.register("fastmix", FastmixConfig)
AutoModelForCausalLM.register(FastmixConfig, FastmixForCausalLM)
