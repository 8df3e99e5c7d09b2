"""The ONNX graph of a ternary decoder, for onnxruntime-genai: its nodes, and the weights that they read.

    h = embedding[token]
    h += o(norm(attention(q, k, v)))  with q, k, v = qkv(norm(h)), rotated    the norm before o: only with sub-norms
    h += down(norm(f(gate) * up))     with gate, up = gate_up(norm(h))        the norm before down: only with sub-norms
    logits = head(norm(h))

f is SiLU, or the square of ReLU. A norm is x / sqrt(mean(x^2) + epsilon) * weight. The projections are those of BitLinear: x in
8 bits with a scale for each token, m = max(max |x|, 1e-5). Source: Ma et al., 2025, BitNet b1.58 2B4T (arXiv:2504.12285); the
arithmetic is that of BitLinear in transformers 5.24 to the bit, whose 127 / m is 127 times the rounded 1 / m.

Inputs: input_ids int64 [B, T]; attention_mask int64 [B, P + T], 1 for the tokens of a text, then 0 up to the longest text;
past_key_values.i.key and .value float32 [B, heads of keys, P, head size]. Outputs: logits float32 [B, T, V]; present.i.key and
.value.

Legend: B texts, T tokens, P tokens before, D model width, V vocabulary, N rows and K columns of a matrix.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from ort_ops.graph_nodes import node
from ort_ops.operators.ternary_matmul import TERNARY_MATMUL
from ort_ops.panels import to_panels
from ort_ops.schema import DOMAIN
from ort_ops.ternary_models import decoder_weights as weights
from ort_ops.ternary_models.data_file import DataFile
from ort_ops.ternary_models.names import PAST, PRESENT
from ort_ops.ternary_models.types import DecoderConfig, Head, TernaryCheckpoint, TernaryMatrix

MICROSOFT = "com.microsoft"
MIN_MAGNITUDE = 1e-5  # BitLinear's, of the largest |x| of a token
BIT_LINEAR: dict[str, Any] = {"activation_bits": 8, "group_size": 0, "min_magnitude": MIN_MAGNITUDE}  # of TernaryMatMul
MAX_ROTATIONS = 2**27  # numbers in the tables of cos and sin
# The products of a layer, and the projections whose rows each has, one below the other.
PRODUCTS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


def check_config(config: DecoderConfig, head: Head) -> None:
    """Raises ValueError for a decoder that the graph cannot express."""
    if config.num_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_heads ({config.num_heads}) must be a multiple of num_key_value_heads ({config.num_key_value_heads})"
        )
    if config.head_size % 8:  # of GroupQueryAttention with rotation
        raise ValueError(f"head_size ({config.head_size}) must be a multiple of 8")
    if config.max_position * config.head_size > MAX_ROTATIONS:
        sizes = f"max_position ({config.max_position}) * head_size ({config.head_size})"
        raise ValueError(f"{sizes} must be <= {MAX_ROTATIONS}")
    if head == "int8" and config.hidden_size % weights.BLOCK:
        rule = f"must be a multiple of {weights.BLOCK} for an int8 head"
        raise ValueError(f"hidden_size ({config.hidden_size}) {rule}; a float16 or float32 head takes any")


class DecoderGraph:
    """Makes the graph step by step, and writes the weights as it reads them from the checkpoint.

    Args:
        checkpoint: what is read. data: where tensors go. head: how the embedding and the head are kept; int8 has a scale for
            each 32 columns. native: TernaryMatMul of the native library; else MatMulNBits of onnxruntime with 2 bits, whose
            activations have a scale for each block of 128 columns, which is not what the model was trained with.

    Raises:
        ValueError: in each step, a tensor of another shape than the configuration says, or with values that are not finite.
    """

    def __init__(self, checkpoint: TernaryCheckpoint, data: DataFile, head: Head, native: bool) -> None:
        check_config(checkpoint.config, head)
        self._checkpoint, self._config, self._data = checkpoint, checkpoint.config, data
        self._head, self._native = head, native
        self._nodes: list[NodeProto] = []
        self._inputs = [_tokens("input_ids", "time"), _tokens("attention_mask", "total")]
        self._outputs = [_floats("logits", "batch", "time", checkpoint.config.vocab_size)]
        self._h = ""

    def begin(self) -> None:
        """The embedding, and what all layers read."""
        config = self._config
        self._add("ReduceSum", ["attention_mask", self._ints("axis_of_tokens", [1])], "num_tokens_B", keepdims=0)
        self._add("Sub", ["num_tokens_B", self._ints("one", 1)], "last_B")
        self._add("Cast", ["last_B"], "seqlens_k", to=TensorProto.INT32)
        self._add("Shape", ["attention_mask"], "mask_shape", start=1)
        self._add("Squeeze", ["mask_shape"], "num_total")
        self._add("Cast", ["num_total"], "total_sequence_length", to=TensorProto.INT32)
        cos_SH, sin_SH = weights.rotations(config.max_position, config.head_size, config.rope_theta)
        self._data.add("cos_cache", cos_SH)
        self._data.add("sin_cache", sin_SH)
        self._write_matrix("embedding")
        self._h = self._embed()

    def add_layer(self, layer: int) -> None:
        """Attention and feed-forward part."""
        config, scope = self._config, f"layers.{layer}"
        q_width, kv_width = config.num_heads * config.head_size, config.num_key_value_heads * config.head_size
        hidden, ffn = config.hidden_size, config.intermediate_size

        x = self._norm(self._h, f"{scope}.attention_norm", hidden)
        qkv = self._product(x, layer, "qkv", (q_width, kv_width, kv_width), hidden)
        y = self._norm_if(config.has_sub_norms, self._attention(qkv, layer), f"{scope}.attention_sub_norm", q_width)
        self._add("Add", [self._h, self._product(y, layer, "o", (hidden,), q_width)], f"{scope}.attended")

        x = self._norm(f"{scope}.attended", f"{scope}.ffn_norm", hidden)
        gate_up = self._product(x, layer, "gate_up", (ffn, ffn), hidden)
        y = self._norm_if(config.has_sub_norms, self._gated(gate_up, scope), f"{scope}.ffn_sub_norm", ffn)
        self._h = self._add("Add", [f"{scope}.attended", self._product(y, layer, "down", (hidden,), ffn)], f"{scope}.out")

    def finish(self) -> GraphProto:
        """The head; the graph with all initializers."""
        x = self._norm(self._h, "norm", self._config.hidden_size)
        if not self._config.is_head_tied:
            self._write_matrix("head")
        self._score(x, "embedding" if self._config.is_head_tied else "head")
        return helper.make_graph(self._nodes, "decoder", self._inputs, self._outputs, self._data.tensors)

    def _add(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self._nodes.append(node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def _ints(self, name: str, values: Any) -> str:
        return self._data.add(name, np.array(values, np.int64))

    def _norm(self, x: str, name: str, width: int) -> str:
        weight = self._data.add(name, self._float32(name, (width,)))
        epsilon = self._config.norm_epsilon
        return self._add("SimplifiedLayerNormalization", [x, weight], f"{name}.out", axis=-1, epsilon=epsilon, stash_type=1)

    def _norm_if(self, has_norm: bool, x: str, name: str, width: int) -> str:
        return self._norm(x, name, width) if has_norm else x

    def _product(self, x: str, layer: int, name: str, rows: tuple[int, ...], num_columns: int) -> str:
        """x [B, T, K] times the matrices of a layer's projections, one below the other: [B, T, N]."""
        scope = f"layers.{layer}.{name}"
        matrices = [
            self._ternary(f"layers.{layer}.{projection}", (num_rows, num_columns))
            for projection, num_rows in zip(PRODUCTS[name], rows, strict=True)
        ]
        code_NK, row_scale_N = weights.stack(matrices)
        if self._native:
            packed = self._data.add(f"{scope}.packed", to_panels(code_NK))
            row_scale = self._data.add(f"{scope}.row_scale", row_scale_N)
            return self._add(TERNARY_MATMUL.name, [x, packed, row_scale], f"{scope}.out", DOMAIN, **BIT_LINEAR)
        codes = self._data.add(f"{scope}.codes", weights.two_bit(code_NK))
        num_blocks = -(-num_columns // weights.BLOCK_2BIT)
        scales = self._data.add(f"{scope}.scales", np.repeat(row_scale_N[:, None], num_blocks, axis=1))
        return self._n_bits([x, codes, scales], f"{scope}.out", 2, weights.BLOCK_2BIT, num_columns, len(code_NK))

    def _n_bits(self, inputs: list[str], output: str, bits: int, block_size: int, K: int, N: int) -> str:
        # accuracy_level 4: activations in int8. Without it the weights become floats at every run.
        sizes = {"K": K, "N": N, "bits": bits, "block_size": block_size, "accuracy_level": 4}
        return self._add("MatMulNBits", inputs, output, MICROSOFT, **sizes)

    def _attention(self, qkv: str, layer: int) -> str:
        config = self._config
        shape = ("batch", config.num_key_value_heads)
        past, present = ([f"{kind}.{layer}.{part}" for part in ("key", "value")] for kind in (PAST, PRESENT))
        self._inputs += [_floats(name, *shape, "past", config.head_size) for name in past]
        self._outputs += [_floats(name, *shape, "total", config.head_size) for name in present]
        output = f"layers.{layer}.attention"
        inputs = [qkv, "", "", *past, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"]
        self._nodes.append(
            node(
                "GroupQueryAttention",
                inputs,
                [output, *present],
                name=output,
                domain=MICROSOFT,
                num_heads=config.num_heads,
                kv_num_heads=config.num_key_value_heads,
                do_rotary=1,
                rotary_interleaved=0,
            )
        )
        return output

    def _gated(self, gate_up: str, scope: str) -> str:
        gate, up = f"{scope}.gate", f"{scope}.up"
        self._nodes.append(node("Split", [gate_up], [gate, up], name=f"{scope}.split", axis=-1, num_outputs=2))
        if self._config.activation == "relu2":
            self._add("Relu", [gate], f"{scope}.relu")
            active = self._add("Mul", [f"{scope}.relu", f"{scope}.relu"], f"{scope}.active")
        else:
            self._add("Sigmoid", [gate], f"{scope}.sigmoid")
            active = self._add("Mul", [gate, f"{scope}.sigmoid"], f"{scope}.active")
        return self._add("Mul", [active, up], f"{scope}.gated")

    def _write_matrix(self, name: str) -> None:
        """The embedding or the head [V, D], in parts: in float32 it takes more memory than all the rest."""
        config = self._config
        shape = (config.vocab_size, config.hidden_size)
        matrix_VD = self._float32(name, shape)
        if self._head == "int8":
            scale_VB = weights.int8_scales(matrix_VD)
            blocks = (*scale_VB.shape, weights.BLOCK)
            self._data.add_parts(f"{name}.codes", np.dtype(np.uint8), blocks, weights.int8_codes(matrix_VD, scale_VB))
            self._data.add(f"{name}.scales", scale_VB)
            return
        dtype = np.dtype(self._head)
        largest, limit = float(max(matrix_VD.max(), -matrix_VD.min())), float(np.finfo(dtype).max)
        if largest > limit:
            raise ValueError(f"{name}: largest value ({largest}) must be <= {limit} for a {self._head} head")
        self._data.add_parts(name, dtype, shape, weights.rows_as(matrix_VD, dtype))

    def _embed(self) -> str:
        if self._head == "float32":
            return self._add("Gather", ["embedding", "input_ids"], "embedded")
        if self._head == "float16":
            self._add("Gather", ["embedding", "input_ids"], "embedded_float16")
            return self._add("Cast", ["embedded_float16"], "embedded", to=TensorProto.FLOAT)
        # The rows of the very tensor that the head multiplies, if they are tied: GatherBlockQuantized wants another shape.
        zero = self._data.add("zero_of_codes", np.array(weights.ZERO_INT8, np.float32))
        self._add("Gather", ["embedding.codes", "input_ids"], "embedded_codes")
        self._add("Gather", ["embedding.scales", "input_ids"], "embedded_scales")
        self._add("Cast", ["embedded_codes"], "embedded_floats", to=TensorProto.FLOAT)
        self._add("Sub", ["embedded_floats", zero], "embedded_levels")
        self._add("Unsqueeze", ["embedded_scales", self._ints("last_axis", [-1])], "embedded_steps")
        self._add("Mul", ["embedded_levels", "embedded_steps"], "embedded_blocks")
        shape = self._ints("embedded_shape", [0, 0, self._config.hidden_size])
        return self._add("Reshape", ["embedded_blocks", shape], "embedded")

    def _score(self, x: str, name: str) -> None:
        config = self._config
        if self._head == "int8":
            inputs = [x, f"{name}.codes", f"{name}.scales"]
            self._n_bits(inputs, "logits", 8, weights.BLOCK, config.hidden_size, config.vocab_size)
            return
        if self._head == "float16":  # float32 in memory: onnxruntime does this once, when it loads the model
            name = self._add("Cast", [name], f"{name}.float32", to=TensorProto.FLOAT)
        self._add("FusedMatMul", [x, name], "logits", MICROSOFT, transB=1)

    def _ternary(self, name: str, shape: tuple[int, int]) -> TernaryMatrix:
        matrix = self._checkpoint.ternary(name)
        if matrix.code_NK.shape != shape:
            raise ValueError(f"{name}: shape {matrix.code_NK.shape} must be {shape}")
        smallest, largest = matrix.code_NK.min(), matrix.code_NK.max()
        if smallest < -1 or largest > 1:
            raise ValueError(f"{name}: values ({smallest} to {largest}) must be in {{-1, 0, 1}}")
        scale = np.asarray(matrix.scale)
        if scale.shape not in ((), shape[:1]):
            raise ValueError(f"{name}: shape of the scale {scale.shape} must be () or {shape[:1]}")
        if not np.isfinite(scale).all():
            raise ValueError(f"{name}: scale must be finite, {int((~np.isfinite(scale)).sum())} of {scale.size} are not")
        return matrix

    def _float32(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        array = self._checkpoint.float32(name)
        if array.shape != shape:
            raise ValueError(f"{name}: shape {array.shape} must be {shape}")
        num_bad = sum(int((~np.isfinite(array[begin : begin + 4096])).sum()) for begin in range(0, len(array), 4096))
        if num_bad:
            raise ValueError(f"{name}: values must be finite, {num_bad} of {array.size} are not")
        return array


def _tokens(name: str, axis: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", axis])


def _floats(name: str, *shape: str | int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
