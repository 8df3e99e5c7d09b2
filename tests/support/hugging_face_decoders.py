"""The models of transformers with the weights of a random decoder, in float32. Needs transformers.

Its BitLinear is compiled when it runs, which takes minutes: tests run it under ``torch.compiler.set_stance("force_eager")``.
"""

import numpy as np
import torch
from random_decoders import RandomCheckpoint
from torch import nn
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import BitLinear, pack_weights

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}


def hugging_face_model(checkpoint: RandomCheckpoint) -> nn.Module:
    config = checkpoint.config
    kinds = (BitNetConfig, BitNetForCausalLM) if config.has_sub_norms else (LlamaConfig, LlamaForCausalLM)
    settings = kinds[0](
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_epsilon,
        hidden_act=config.activation,
        tie_word_embeddings=config.is_head_tied,
        bos_token_id=config.bos_token_id,
        eos_token_id=None,  # greedy texts of a given length
        pad_token_id=config.pad_token_id,
    )
    model = kinds[1](settings).float().eval()
    outside = {"model.embed_tokens": "embedding", "model.norm": "norm"}
    outside |= {} if config.is_head_tied else {"lm_head": "head"}
    for place, name in outside.items():
        _set(model.get_submodule(place), checkpoint.float32(name))
    for layer, block in enumerate(model.model.layers):
        for name, place in _NORMS.items():
            if config.has_sub_norms or not name.endswith("sub_norm"):
                _set(block.get_submodule(place), checkpoint.float32(f"layers.{layer}.{name}"))
        for name, place in PROJECTIONS.items():
            matrix = checkpoint.ternary(f"layers.{layer}.{name}")
            N, K = matrix.code_NK.shape
            linear = BitLinear(K, N, bias=False, dtype=torch.float32)
            linear.weight.copy_(pack_weights(torch.from_numpy(matrix.code_NK.astype(np.float32))))
            linear.weight_scale.copy_(torch.tensor(1 / np.float64(matrix.scale)))
            block.set_submodule(place, linear)
    return model


def _set(module: nn.Module, weight: np.ndarray) -> None:
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight))
