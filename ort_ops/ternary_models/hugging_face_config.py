"""config.json of a ternary checkpoint: the shape of the decoder, and how its projections are quantised."""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from ort_ops.ternary_models.checks import MAX_COLUMNS, MAX_HEADS, MAX_LAYERS, MAX_POSITION, MAX_VOCABULARY, check_heads
from ort_ops.ternary_models.errors import CheckpointError
from ort_ops.ternary_models.settings import Settings, read_json_object
from ort_ops.ternary_models.types import Activation, DecoderConfig

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
MAX_END_TOKENS = MAX_UNCONVERTED = 1000
LinearClass = Literal["bitlinear", "autobitlinear"]


class _Architecture(NamedTuple):
    """What the model type says, and the defaults of its class in transformers."""

    name: str
    activation: Activation
    has_sub_norms: bool
    rope_theta: float
    norm_epsilon: float


_ARCHITECTURES = {
    "bitnet": _Architecture("BitNetForCausalLM", "relu2", True, 500000.0, 1e-5),
    "llama": _Architecture("LlamaForCausalLM", "silu", False, 10000.0, 1e-6),
}
_PROJECTIONS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


class Quantization(NamedTuple):
    """is_master: weights that are quantised whenever they are used; else they are packed codes."""

    is_master: bool
    linear_class: LinearClass


def read_config(folder: Path) -> tuple[DecoderConfig, Quantization]:
    """Read config.json, and the tokens that end a text from generation_config.json where there is one, as transformers does.

    Raises:
        CheckpointError: a model type, activation, rope type, bias or norm that the decoder does not have; projections that are
            not ternary; a value of another kind or out of its range.
    """
    values = read_json_object(folder / CONFIG_FILE)
    about = Settings(values, CONFIG_FILE)
    model_type = about.text("model_type", tuple(_ARCHITECTURES))
    architecture = _ARCHITECTURES[model_type]
    if values.get("architectures") not in (None, [architecture.name]):
        raise CheckpointError(
            f"architectures of {CONFIG_FILE} ({values['architectures']!r:.80}) must be [{architecture.name!r}] for {model_type}"
        )
    for name in ("attention_bias", "mlp_bias"):
        if about.flag(name):
            raise CheckpointError(f"{name} of {CONFIG_FILE} (true) must be false: projections with a bias are not read")
    config = _decoder(about, architecture, _end_tokens(folder, values))
    return config, _quantization(values.get("quantization_config"), config.num_layers)


def _decoder(about: Settings, architecture: _Architecture, end_tokens: Settings) -> DecoderConfig:
    hidden_size = about.whole("hidden_size", 1, MAX_COLUMNS)
    num_heads = about.whole("num_attention_heads", 1, MAX_HEADS)
    if about.values.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads})")
    num_key_value_heads = about.whole("num_key_value_heads", 1, MAX_HEADS, num_heads)
    head_size = about.whole("head_dim", 2, MAX_COLUMNS, hidden_size // num_heads)
    check_heads(num_heads, num_key_value_heads, head_size)
    vocab_size = about.whole("vocab_size", 1, MAX_VOCABULARY)
    return DecoderConfig(
        hidden_size=hidden_size,
        num_layers=about.whole("num_hidden_layers", 1, MAX_LAYERS),
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_size=head_size,
        intermediate_size=about.whole("intermediate_size", 1, MAX_COLUMNS),
        vocab_size=vocab_size,
        max_position=about.whole("max_position_embeddings", 1, MAX_POSITION),
        rope_theta=_rope_theta(about, architecture.rope_theta),
        norm_epsilon=about.positive("rms_norm_eps", architecture.norm_epsilon),
        activation=cast(Activation, about.text("hidden_act", ("silu", "relu2"), architecture.activation)),
        has_sub_norms=architecture.has_sub_norms,
        is_head_tied=about.flag("tie_word_embeddings"),
        bos_token_id=about.token("bos_token_id", vocab_size),
        eos_token_ids=end_tokens.tokens("eos_token_id", vocab_size, MAX_END_TOKENS),
        pad_token_id=about.token("pad_token_id", vocab_size),
    )


def _end_tokens(folder: Path, values: dict[str, Any]) -> Settings:
    """The settings that say which tokens end a text."""
    if (folder / GENERATION_FILE).exists():
        generation = read_json_object(folder / GENERATION_FILE)
        if generation.get("eos_token_id") is not None:
            return Settings(generation, GENERATION_FILE)
    return Settings(values, CONFIG_FILE)


def _rope_theta(about: Settings, default: float) -> float:
    """From rope_parameters, as transformers 5 writes it, or rope_theta, as before. Only plain rotary embeddings are known."""
    theta = about.positive("rope_theta", default)
    for name in ("rope_parameters", "rope_scaling"):
        rope = about.values.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise CheckpointError(f"{name} of {CONFIG_FILE} ({rope!r:.80}) must be an object")
        for kind in (rope.get("rope_type"), rope.get("type")):
            if kind not in (None, "default"):
                raise CheckpointError(
                    f"rope_type of {CONFIG_FILE} ({kind!r:.40}) must be default: scaled rotations are unknown"
                )
        if rope.keys() - _ROPE_KEYS or rope.get("partial_rotary_factor", 1) != 1:
            raise CheckpointError(f"{name} of {CONFIG_FILE} ({rope!r:.120}) must hold rope_type default and rope_theta alone")
        theta = Settings(rope, f"{name} of {CONFIG_FILE}").positive("rope_theta", theta)
    return theta


def _quantization(values: Any, num_layers: int) -> Quantization:
    where = f"quantization_config of {CONFIG_FILE}"
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{CONFIG_FILE} must hold a quantization_config with quant_method bitnet: without it the projections are not "
            'ternary. Master weights of a ternary model need {"quant_method": "bitnet", "linear_class": "autobitlinear", '
            '"quantization_mode": "online"}'
        )
    about = Settings(values, where)
    about.text("quant_method", ("bitnet",))
    linear_class = cast(LinearClass, about.text("linear_class", ("bitlinear", "autobitlinear"), "bitlinear"))
    is_master = about.text("quantization_mode", ("offline", "online"), "offline") == "online"
    if about.flag("use_rms_norm"):
        raise CheckpointError(f"use_rms_norm of {where} (true) must be false: no RMSNorm inside a projection is known")
    _check_unconverted(values.get("modules_to_not_convert"), where, num_layers)
    return Quantization(is_master, linear_class)


def _check_unconverted(names: Any, where: str, num_layers: int) -> None:
    """modules_to_not_convert must name the head and no projection; null, as transformers reads it, names the head alone.

    Which modules a name means is the rule of ``should_convert_module`` in transformers, without its patterns.
    """
    if names is None:
        return
    is_list = isinstance(names, list) and len(names) <= MAX_UNCONVERTED
    if not is_list or not all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in names):
        raise CheckpointError(
            f"modules_to_not_convert of {where} ({names!r:.80}) must be plain names of modules, at most {MAX_UNCONVERTED}"
        )
    if _name_of("lm_head", names) is None:
        raise CheckpointError(f"modules_to_not_convert of {where} ({names!r:.80}) must name lm_head: no ternary head is read")
    for module in (f"model.layers.{layer}.{name}" for layer in range(num_layers) for name in _PROJECTIONS):
        if (name := _name_of(module, names)) is not None:
            raise CheckpointError(f"modules_to_not_convert of {where} names {name}: {module} must be ternary")


def _name_of(module: str, names: list[str]) -> str | None:
    """The first of the names that means this module: itself, what holds it, or how it ends."""
    return next((name for name in names if module.endswith(name) or module.startswith(f"{name.removesuffix('.')}.")), None)
