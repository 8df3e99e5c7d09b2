"""The language models that FairComparison knows by name, each of about 0.115 million parameters."""

from collections.abc import Callable

from torch import Tensor, nn

from lightning_modules.errors import UserError
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig
from trix.resnet_bk.language_model import LanguageModelOutput

MakeModel = Callable[[int, int], nn.Module]


class _WithLosses(LanguageModel):
    """A language model that also answers with its auxiliary losses."""

    def forward(self, token_BT: Tensor) -> LanguageModelOutput:  # type: ignore[override]
        logits, _, aux = super().forward(token_BT, return_routing=True)
        return LanguageModelOutput(logits, aux_loss=None if aux is None else aux["total_aux"])


def _attention(vocab_size: int, context_length: int) -> nn.Module:
    return LanguageModel(vocab_size, LanguageModelConfig(64, 2, 4, context_length, ffn=FFNConfig("dense")))


def _trix(vocab_size: int, context_length: int) -> nn.Module:
    ffn = FFNConfig("trix", num_tiles=10, d_ff=250)
    return _WithLosses(vocab_size, LanguageModelConfig(64, 2, 4, context_length, ffn=ffn))


def _resnetbk(vocab_size: int, context_length: int) -> nn.Module:
    ffn = FFNConfig("dense", d_ff=254)
    return LanguageModel(vocab_size, LanguageModelConfig(64, 2, 8, context_length, ffn=ffn, mixer="resolvent"))


def _ssd(vocab_size: int, context_length: int) -> nn.Module:
    ffn = FFNConfig("dense", d_ff=262)
    return LanguageModel(vocab_size, LanguageModelConfig(64, 2, 8, context_length, ffn=ffn, mixer="ssd"))


def _mamba(vocab_size: int, context_length: int) -> nn.Module:  # noqa: ARG001
    """transformers' Mamba. It trains by mambapy's parallel scan: the scan of its own on a CPU is a loop over the tokens."""
    try:
        import mambapy  # noqa: F401 (transformers looks for it)
        from transformers import MambaConfig, MambaForCausalLM
    except ImportError as error:
        packages = "pip install -e '.[transformers]' mambapy"
        raise UserError(f"model ('mamba') needs transformers and mambapy: {packages} ({error})") from error
    sizes = {"vocab_size": vocab_size, "hidden_size": 64, "num_hidden_layers": 3}
    return MambaForCausalLM(MambaConfig(**sizes, tie_word_embeddings=True, use_mambapy=True, use_cache=False))


# vocab_size, context_length -> a new model.
CONTESTANTS: dict[str, MakeModel] = {
    "attention": _attention,
    "trix": _trix,
    "resnetbk": _resnetbk,
    "ssd": _ssd,
    "mamba": _mamba,
}
