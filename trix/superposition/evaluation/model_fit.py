"""What a model loses when its stream is replaced by what a sparse autoencoder makes of it.

B texts, T tokens of a text, D width, V vocabulary, N tokens.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:  # they need pydantic, which training does without
    from trix.superposition.backends.base_model import CausalLMBackend


class Reconstructing(Protocol):
    """An autoencoder: x_hat, latents = sae(x)."""

    d_model: int

    def __call__(self, x_ND: Tensor, /) -> tuple[Tensor, Tensor]: ...


class ModelFit(NamedTuple):
    """What is left of a model's predictions.

    loss, loss_sae, loss_zero, loss_mean: mean loss of the next token in nats, of the model itself, and with the stream replaced
    by the autoencoder's reconstruction, by zeros, and by the mean activation. recovered_zero, recovered_mean: the share
    (loss_zero - loss_sae) / (loss_zero - loss), and with loss_mean; 1 where nothing is lost, 0 where the reconstruction is no
    better than zeros or the mean. kl: KL(original || reconstructed) of the next token, in nats. num_tokens: predictions.
    """

    loss: float
    loss_sae: float
    loss_zero: float
    loss_mean: float
    recovered_zero: float
    recovered_mean: float
    kl: float
    num_tokens: int


def model_fit(
    backend: "CausalLMBackend", layer: int, sae: Reconstructing, batches: Callable[[], Iterable[Mapping[str, Tensor]]]
) -> ModelFit:
    """Replace what enters block ``layer`` at every real token, and measure the model's loss and its answers.

    Attention sinks, which dumps leave out, pass as they are: the first position of a model that has sinks, and tokens whose
    norm is more than ten times the batch's median. What follows padding is not predicted.

    Args:
        sae: of the width of the stream. batches: returns a new iterator over ``input_ids`` and ``attention_mask``, as
            ``backend.tokenize`` gives them; it is asked for twice, as the mean comes first.

    Raises:
        ValueError: no such layer, an autoencoder of another width, no token with one after it, or a stream that is not finite.
    """
    return model_fits(backend, layer, {"": sae}, batches)[""]


@torch.no_grad()
def model_fits(
    backend: "CausalLMBackend",
    layer: int,
    saes: Mapping[str, Reconstructing],
    batches: Callable[[], Iterable[Mapping[str, Tensor]]],
) -> dict[str, ModelFit]:
    """:func:`model_fit` of several autoencoders at once, by name; what they share is computed once."""
    backend.block(layer)
    total_D, num_rows = torch.zeros((), dtype=torch.float64), 0
    for batch in batches():
        stream_BTD = backend.forward_hidden(batch["input_ids"], batch["attention_mask"], layer)
        for sae in saes.values():
            if stream_BTD.shape[-1] != sae.d_model:
                raise ValueError(f"d_model of the autoencoder ({sae.d_model}) must be the stream's ({stream_BTD.shape[-1]})")
        rows_ND = stream_BTD[_replaced(backend, stream_BTD, batch["attention_mask"].bool())].double().cpu()
        if not bool(rows_ND.isfinite().all()):
            raise ValueError(f"stream before block {layer} must be finite")
        total_D, num_rows = total_D + rows_ND.sum(dim=0), num_rows + len(rows_ND)
    if num_rows == 0:
        raise ValueError(f"number of tokens to replace ({num_rows}) must be >= 1")
    mean_D = (total_D / num_rows).float().to(backend.device)
    ways: list[Callable[[Tensor], Tensor]] = [_reconstruction(sae) for sae in saes.values()]
    ways += [torch.zeros_like, lambda x_ND: mean_D.expand_as(x_ND)]
    loss, num_tokens = 0.0, 0
    replaced_losses, divergences = [0.0] * len(ways), [0.0] * len(ways)
    for batch in batches():
        mask_BT = batch["attention_mask"].bool().to(backend.device)
        target_BT = batch["input_ids"].to(backend.device)[:, 1:]
        is_predicted_BT = mask_BT[:, :-1] & mask_BT[:, 1:]
        num_tokens += int(is_predicted_BT.sum())
        of_model_NV = _log_probabilities(backend, batch, mask_BT)[:, :-1][is_predicted_BT]
        target_N = target_BT[is_predicted_BT]
        loss += _sum(F.nll_loss(of_model_NV, target_N, reduction="none"))
        for place, way in enumerate(ways):
            hook = _replace(backend, layer, mask_BT, way)
            try:
                replaced_NV = _log_probabilities(backend, batch, mask_BT)[:, :-1][is_predicted_BT]
            finally:
                hook.remove()
            replaced_losses[place] += _sum(F.nll_loss(replaced_NV, target_N, reduction="none"))
            divergences[place] += _sum(F.kl_div(replaced_NV, of_model_NV, reduction="none", log_target=True))
    if num_tokens == 0:
        raise ValueError(f"number of tokens with one after them ({num_tokens}) must be >= 1")
    loss /= num_tokens
    *of_saes, of_zero, of_mean = (value / num_tokens for value in replaced_losses)
    return {
        name: ModelFit(
            loss=loss,
            loss_sae=of_sae,
            loss_zero=of_zero,
            loss_mean=of_mean,
            recovered_zero=_share(of_zero - of_sae, of_zero - loss),
            recovered_mean=_share(of_mean - of_sae, of_mean - loss),
            kl=divergence / num_tokens,
            num_tokens=num_tokens,
        )
        for name, of_sae, divergence in zip(saes, of_saes, divergences, strict=False)  # those of zero and mean come last
    }


def _reconstruction(sae: Reconstructing) -> Callable[[Tensor], Tensor]:
    return lambda x_ND: sae(x_ND.float())[0]


def _log_probabilities(backend: "CausalLMBackend", batch: Mapping[str, Tensor], mask_BT: Tensor) -> Tensor:
    """Of the next token, float32 [B, T, V]."""
    mask = None if bool(mask_BT.all()) else mask_BT
    return F.log_softmax(backend.run(batch["input_ids"].to(backend.device), mask).float(), dim=-1)


def _replace(backend: "CausalLMBackend", layer: int, mask_BT: Tensor, way: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """A hook that replaces the tokens of the stream which are no padding and no sinks."""

    from trix.superposition.backends.base_model import replace_stream

    def replaced(x_BTD: Tensor) -> Tensor:
        is_replaced_BT = _replaced(backend, x_BTD, mask_BT)
        new_BTD = x_BTD.clone()
        new_BTD[is_replaced_BT] = way(x_BTD[is_replaced_BT]).to(x_BTD.dtype)
        return new_BTD

    return replace_stream(backend.block(layer), replaced)


def _replaced(backend: "CausalLMBackend", x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """bool [B, T]: real tokens that are no sinks."""
    from trix.superposition.dump.batch_rows import has_sink_norm

    is_replaced_BT = mask_BT.to(x_BTD.device).clone()
    x_ND = x_BTD[is_replaced_BT]
    norm_N = torch.linalg.vector_norm(x_ND, dim=-1, dtype=torch.float32).cpu()
    is_sink_N = has_sink_norm(norm_N, x_ND.isfinite().all(dim=-1).cpu())
    is_replaced_BT[is_replaced_BT.clone()] = ~is_sink_N.to(x_BTD.device)
    if backend.has_sinks:
        is_replaced_BT[:, 0] = False
    return is_replaced_BT


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _share(part: float, whole: float) -> float:
    return part / whole if whole != 0 else float("nan")
