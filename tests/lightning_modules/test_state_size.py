"""The floats that a layer keeps of a text: of our models, of what holds one, of models with a cache, and of others."""

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import trix.resnet_bk
from lightning_modules.contestants import CONTESTANTS
from lightning_modules.state_size import state_floats
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig


def test_it_is_the_mean_over_the_layers_and_that_of_attention_alone_grows() -> None:
    hybrid = LanguageModel(11, LanguageModelConfig(16, 2, 2, 24, mixer="ssd", attention_at=(1,), ffn=FFNConfig()))
    of_ssd = 16 * 16 + 3 * (16 + 2 * 16)  # one real part, and what the convolution looks back on
    assert [state_floats(hybrid, length) for length in (8, 24)] == [(of_ssd + 2 * length * 16) / 2 for length in (8, 24)]
    assert hybrid.training


def test_what_holds_a_model_keeps_what_that_keeps() -> None:
    face = trix.resnet_bk.LanguageModel(11, 32, 2, 24)
    assert state_floats(face, 20) == state_floats(face.model, 20) > 0
    assert state_floats(CONTESTANTS["trix"](256, 16), 16) == 2 * 16 * 64  # whose answer has another form


class WithCache(nn.Module):
    """A model with the interface of transformers, whose layers each keep what Layer holds."""

    def __init__(self, num_layers: int, returns_cache: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=num_layers, vocab_size=5)
        self.returns_cache = returns_cache

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        assert use_cache
        assert not self.training
        tensors = [torch.ones(2, 3), torch.tensor([1.0, 0.0])]
        layer = SimpleNamespace(states={0: tensors[0], 1: tensors[0]}, conv=[tensors[1]], length=torch.tensor([7]))
        cache = SimpleNamespace(layers=[layer], config=self.config)
        return SimpleNamespace(past_key_values=cache if self.returns_cache else None, cache_params=None)


def test_a_cache_is_counted_whatever_its_form() -> None:
    assert state_floats(WithCache(2), 4) == (6 + 1) / 2
    assert state_floats(WithCache(2, returns_cache=False), 4) is None


def test_a_model_that_does_not_say_has_no_number() -> None:
    assert state_floats(nn.Embedding(5, 5), 4) is None


class CountingLayers(nn.Module):
    """A model of the user's with a configuration much like one of transformers, but no cache."""

    class Config:
        num_hidden_layers, vocab_size = 2, 5

    config = Config()

    def forward(self, token_BT: Tensor) -> Tensor:
        return token_BT


def test_a_model_without_a_cache_has_no_number_whatever_its_configuration() -> None:
    assert state_floats(CountingLayers(), 4) is None


def test_codes_of_contexts_are_no_layer() -> None:
    torch.manual_seed(0)
    sizes = [state_floats(LanguageModel(11, config_of(route_on)), 6) for route_on in ("embedding", "context")]
    assert sizes[0] is not None
    assert sizes[1] == pytest.approx(sizes[0] + 0.5)  # one id, in two layers


def config_of(route_on: Literal["embedding", "context"]) -> LanguageModelConfig:
    return LanguageModelConfig(16, 2, 2, 8, ffn=FFNConfig(num_tiles=4, route_on=route_on))


def test_the_cache_of_a_model_of_transformers_is_its_state() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("mambapy")
    found = [state_floats(CONTESTANTS["mamba"](256, 128), length) for length in (16, 32)]
    assert found[0] == found[1]
    assert found[0] is not None
    assert 128 * 16 < found[0] <= 128 * (16 + 4)  # 128 channels of 16 each, and the convolution
