"""Layers of transformers as mixers, so that embedding, norms and feed-forward layer are those of every contestant.

They take the paths that transformers has for the CPU: matrix products over chunks of 64 tokens, and no loop over tokens. (Only
reading on from a state has one, in the mLSTM: over what is left of a text after whole chunks.) Queries and keys of a head are
16 wide, as in the project's own mixers; the widths of values are as published. Projections start as torch's layers do, all
else as in transformers. That is imported when a mixer is made, so the benchmarks run without it.

Legend: B batch, T tokens, D width.
"""

from abc import abstractmethod
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.nn import Mixer
from trix.outputs import State, StateSpec, TokenContext

IS_INSTALLED = find_spec("transformers") is not None
KEY_WIDTH, CHUNK_SIZE, CONV_WIDTH = 16, 64, 4
INPUT_GATE_START, FORGET_GATE_START = -10.0, (3.0, 6.0)  # biases of the mLSTM's gates in transformers; their weights are 0


class LibraryMixer(Mixer):
    """A layer of transformers. It takes no mask: the texts of a benchmark are equally long."""

    is_causal_only: ClassVar[bool] = True

    def __init__(self, d_model: int, n_heads: int, **settings: Any) -> None:
        super().__init__()
        del settings  # context_length, ternary, dropout: not used
        self.layer_config, self.layer, self.specs = self.make(d_model, n_heads)

    @abstractmethod
    def make(self, d_model: int, n_heads: int) -> tuple[Any, nn.Module, tuple[StateSpec, ...]]:
        """The configuration, the layer, and what the layer keeps of a text."""

    def state_specs(self) -> tuple[StateSpec, ...]:
        return self.specs

    def forward(
        self, x_BTD: Tensor, context: TokenContext = TokenContext(), state: State | None = None
    ) -> tuple[Tensor, State, None]:
        if context.mask_BT is not None:
            raise ValueError("mask_BT must be None")
        return (self.read(x_BTD), (), None) if state is None else (*self.read_on(x_BTD, state), None)

    def read(self, x_BTD: Tensor) -> Tensor:
        return self.layer(x_BTD)

    def read_on(self, x_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        """The cache of transformers holds a token more than the convolution's next step needs, which is left out."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.layer_config)
        held = cache.layers[0]
        held.update_conv_state(F.pad(state[0], (1, 0)))
        held.update_recurrent_state(state[1])
        update_BTD = self.layer(x_BTD, cache=cache)
        return update_BTD, (held.conv_states[0][..., 1:], held.recurrent_states[0])


class Mamba2(LibraryMixer):
    """Mamba2Mixer: 2 D channels in 2 n_heads heads."""

    def make(self, d_model: int, n_heads: int) -> tuple[Any, nn.Module, tuple[StateSpec, ...]]:
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

        width, num_heads = d_model // n_heads, 2 * n_heads
        config = Mamba2Config(
            hidden_size=d_model,
            num_hidden_layers=1,
            num_heads=num_heads,
            head_dim=width,
            state_size=KEY_WIDTH,
            n_groups=1,
            conv_kernel=CONV_WIDTH,
            chunk_size=CHUNK_SIZE,
        )
        conv = StateSpec("conv", ("batch", 2 * d_model + 2 * KEY_WIDTH, CONV_WIDTH - 1))
        carry = StateSpec("carry", ("batch", num_heads, width, KEY_WIDTH))
        return config, Mamba2Mixer(config, layer_idx=0), (conv, carry)


class GatedDeltaNet(LibraryMixer):
    """Qwen3NextGatedDeltaNet: n_heads heads of queries and keys, two heads of values for each."""

    def make(self, d_model: int, n_heads: int) -> tuple[Any, nn.Module, tuple[StateSpec, ...]]:
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

        width, num_heads = d_model // n_heads, 2 * n_heads
        config = Qwen3NextConfig(
            hidden_size=d_model,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
            linear_num_key_heads=n_heads,
            linear_key_head_dim=KEY_WIDTH,
            linear_num_value_heads=num_heads,
            linear_value_head_dim=width,
            linear_conv_kernel_dim=CONV_WIDTH,
        )
        conv = StateSpec("conv", ("batch", 2 * n_heads * KEY_WIDTH + 2 * d_model, CONV_WIDTH - 1))
        carry = StateSpec("carry", ("batch", num_heads, KEY_WIDTH, width))
        return config, Qwen3NextGatedDeltaNet(config, layer_idx=0), (conv, carry)


class XLSTM(LibraryMixer):
    """xLSTMLayer: the mLSTM of xLSTM-7B, which has no convolution."""

    def make(self, d_model: int, n_heads: int) -> tuple[Any, nn.Module, tuple[StateSpec, ...]]:
        from transformers.models.xlstm.modeling_xlstm import xLSTMConfig, xLSTMLayer

        config = xLSTMConfig(
            hidden_size=d_model,
            num_hidden_layers=1,
            num_heads=n_heads,
            qk_dim_factor=KEY_WIDTH * n_heads / d_model,
            mode="train",
            chunk_size=CHUNK_SIZE,
        )
        layer = xLSTMLayer(config)
        with torch.no_grad():
            layer.igate_preact.weight.zero_()
            layer.igate_preact.bias.fill_(INPUT_GATE_START)
            layer.fgate_preact.weight.zero_()
            layer.fgate_preact.bias.copy_(torch.linspace(*FORGET_GATE_START, n_heads))
        shapes = {"carry": (KEY_WIDTH, d_model // n_heads), "norm": (KEY_WIDTH,), "scale": (1,)}
        return config, layer, tuple(StateSpec(name, ("batch", n_heads, *shape)) for name, shape in shapes.items())

    def read(self, x_BTD: Tensor) -> Tensor:
        num_tokens = x_BTD.shape[1]
        return self.layer(F.pad(x_BTD, (0, 0, 0, -num_tokens % CHUNK_SIZE)))[0][:, :num_tokens]  # it takes whole chunks

    def read_on(self, x_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        mode, self.layer_config.mode = self.layer_config.mode, "inference"  # the layer looks it up at every call
        try:
            return self.layer(x_BTD, state)
        finally:
            self.layer_config.mode = mode
