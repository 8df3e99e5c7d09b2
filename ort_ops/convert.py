"""Modules of other packages, as ones that :func:`ort_ops.export.export` writes with the native operators."""

import copy
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ort_ops.ternary_models.ternary_codes import quantise_master, scale_of_codes, unpack_rows
from ort_ops.ternary_models.types import TernaryMatrix
from trix.nn.bit_linear import BitLinear


def from_bitlinear(module: nn.Module) -> nn.Module:
    """A copy in which each BitLinear and AutoBitLinear of transformers is a :class:`trix.nn.bit_linear.BitLinear`.

    It computes the same in float32, and its exported file does so natively: activations of 8 bits, a scale for each token.
    Master weights (``online_quant``) are rounded now. An RMSNorm within a layer comes before it. All other layers stay.

    Raises:
        ValueError: no such layer, a scale that is not positive, or codes that are not ternary; with the name of the layer.

    Example:
        import torch
        from transformers import AutoModelForCausalLM
        from ort_ops.convert import from_bitlinear
        from ort_ops.export import export

        model = AutoModelForCausalLM.from_pretrained("folder", dtype=torch.float32)
        mlp = from_bitlinear(model.model.layers[0].mlp)
        export(mlp, torch.randn(1, 4, model.config.hidden_size), "mlp.onnx")
    """
    bitnet: Any = sys.modules.get("transformers.integrations.bitnet")  # without it there is no such layer
    kinds = () if bitnet is None else (bitnet.BitLinear, bitnet.AutoBitLinear)
    if isinstance(module, kinds):
        return _converted(module, "weight")
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}
    if not layers:
        raise ValueError(f"{type(module).__name__} must hold a BitLinear or AutoBitLinear of transformers, it holds none")
    memo = {id(layer): _converted(layer, f"{name}.weight") for name, layer in layers.items()}
    return copy.deepcopy(module, memo)


def _converted(layer: Any, name: str) -> nn.Module:
    matrix = _matrix(layer, name)
    bias = None if layer.bias is None else layer.bias.detach().clone()
    if bias is not None and layer.weight.dtype != torch.uint8 and not layer.online_quant:
        bias = bias * layer.weight_scale  # so does transformers
    converted = BitLinear(torch.from_numpy(matrix.code_NK), torch.tensor(matrix.scale), bias).to(layer.weight.device)
    return converted if layer.rms_norm is None else nn.Sequential(copy.deepcopy(layer.rms_norm), converted)


def _matrix(layer: Any, name: str) -> TernaryMatrix:
    if layer.weight.dtype == torch.uint8:
        return TernaryMatrix(unpack_rows(layer.weight.cpu().numpy(), name), _scale(layer.weight_scale, False, name))
    weight_NK = layer.weight.detach().float().cpu().numpy()
    if layer.online_quant:
        return quantise_master(weight_NK, name)
    if not np.isin(weight_NK, (-1, 0, 1)).all():
        raise ValueError(f"{name} must hold codes of {{-1, 0, 1}}: they were not unpacked, or are master weights")
    return TernaryMatrix(weight_NK.astype(np.int8), _scale(layer.weight_scale, True, name))


def _scale(stored: Tensor, is_factor: bool, name: str) -> np.float32:
    return scale_of_codes(np.float32(stored.float().item()), is_factor, f"{name}_scale")
