"""What all sparse autoencoders share: weights, start values, the scale of what they read, and which latents are dead.

Shapes: N tokens, D width of what is read, O width of what is written (D, but in a transcoder), K latents.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from trix.registry import Registry
from trix.superposition.sae.sparse_code import SparseCode, sparse_decode, sparse_encode, top_entries

MAX_MEDIAN_STEPS = 100
AUX_WEIGHT = 1 / 32  # of the loss in which dead latents take part, as in arXiv:2406.04093
FROZEN_DECODER, SOFT_FROZEN_DECODER, FROZEN_ENCODER = "frozen_decoder", "soft_frozen_decoder", "frozen_encoder"
RESTRAINTS = (FROZEN_DECODER, SOFT_FROZEN_DECODER, FROZEN_ENCODER)
MIN_COSINE = 0.8  # of a soft-frozen decoder row with what it was at the start


class SAEStep(NamedTuple):
    """What a step of training says of a batch, all but the counts in the scale that the autoencoder works in.

    loss: what is to be minimised, the sum of the next three. reconstruction: mean over tokens and dimensions of (x_hat - x)^2;
    about 1 where nothing is explained. sparsity: the penalty on the latents, 0 where their number is fixed. aux: weighted loss
    of the dead latents. fired_K: int64, number of tokens in which each latent is active. lowest: the smallest active value of
    the batch, inf without one.
    """

    loss: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    aux: Tensor
    fired_K: Tensor
    lowest: Tensor


class _LinearView(NamedTuple):
    """A weight of an autoencoder as nn.Linear has it, [outputs, inputs]: a view, not a copy."""

    weight: Tensor
    bias: Tensor | None


class SAE(nn.Module, ABC):
    """A sparse autoencoder: x_hat = z W_dec + b_dec, with z = f((x - b_dec) W_enc + b_enc) >= 0, and few entries above 0.

    x and x_hat are as they come; inside both are multiplied by ``input_scale`` and ``output_scale`` (1 until
    :meth:`start_from` has seen data), so that learning rates and penalties mean the same for every model. :meth:`fold_` takes
    the scales into the weights.

    Args:
        d_model: width of what is read. k: number of latents, the size of the dictionary. d_out: width of what is written, by
            default d_model. dead_window: tokens after which a latent that has not fired counts as dead.

    Attributes:
        W_enc [D, K], b_enc [K], W_dec [K, O], b_dec [O]; at the start the rows of W_dec are random with norm 1, and W_enc is
        its transpose where D = O. tokens_since_fired_K: int64 buffer. start_KO: with a soft-frozen decoder the rows of W_dec
        that it started from, else None.

    Shape:
        x_ND: float [..., D] -> (x_hat [..., O], z [..., K]).

    Raises:
        ValueError: d_model, k, d_out or dead_window that is no int or < 1, or x of another width.
    """

    architecture: ClassVar[str]
    has_unit_decoder: ClassVar[bool] = True  # the rows of W_dec keep norm 1 in training
    centres_input: ClassVar[bool] = True  # b_dec is subtracted from what is read
    fixes_active: ClassVar[bool] = False  # the number of active latents is a setting, ``active``

    input_scale: Tensor
    output_scale: Tensor
    tokens_since_fired_K: Tensor
    start_KO: Tensor | None

    def __init__(self, d_model: int, k: int, *, d_out: int | None = None, dead_window: int = 200_000) -> None:
        super().__init__()
        d_out = d_model if d_out is None else d_out
        for name, value in {"d_model": d_model, "k": k, "d_out": d_out, "dead_window": dead_window}.items():
            check_int(name, value)
            if value < 1:
                raise ValueError(f"{name} ({value}) must be >= 1")
        self.d_model, self.k, self.d_out, self.dead_window = d_model, k, d_out, dead_window
        weight_KO = nn.functional.normalize(torch.randn(k, d_out), dim=-1)
        self.W_dec = nn.Parameter(weight_KO)
        first_DK = weight_KO.t() if d_out == d_model else nn.functional.normalize(torch.randn(d_model, k), dim=0)
        self.W_enc = nn.Parameter(first_DK.clone(memory_format=torch.contiguous_format))
        self.b_enc = nn.Parameter(torch.zeros(k))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.is_started = False  # whether its weights come from training or from a file
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("output_scale", torch.ones(()))
        self.register_buffer("tokens_since_fired_K", torch.zeros(k, dtype=torch.int64))
        self.register_buffer("start_KO", None)

    @property
    def enc(self) -> _LinearView:
        """The encoder as a Linear: weight [K, D], bias [K]."""
        return _LinearView(self.W_enc.t(), self.b_enc)

    @property
    def dec(self) -> _LinearView:
        """The decoder as a Linear without bias: weight [O, K]."""
        return _LinearView(self.W_dec.t(), None)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments besides d_model and k that make this autoencoder again, as plain values."""

    @abstractmethod
    def code(self, x_ND: Tensor) -> SparseCode:
        """The active latents of each token in use, float [N, D]; a latent that is not among them is 0."""

    @abstractmethod
    def training_step(self, x_ND: Tensor, target_NO: Tensor) -> SAEStep:
        """The loss of one batch, float [N, D] and [N, O]; target is x itself, except in a transcoder. It changes nothing."""

    @torch.no_grad()
    def restrain(self, restraint: str) -> Self:
        """Make a control: hold weights at the random values that they have now, and let the others learn.

        frozen_decoder: W_dec stays. soft_frozen_decoder: each row of W_dec keeps a cosine of at least 0.8 with what it is now.
        frozen_encoder: W_enc stays. What such an autoencoder does as well as a trained one, the training has not learned.

        Source: arXiv:2602.14111.

        Raises:
            ValueError: another restraint, or weights that are not random any more.
        """
        if restraint not in RESTRAINTS:
            raise ValueError(f"restraint ({restraint!r:.40}) must be one of {', '.join(RESTRAINTS)}")
        if self.is_started:
            raise ValueError(f"restraint ({restraint}) needs a new autoencoder: this one was trained or read from a file")
        if restraint == SOFT_FROZEN_DECODER:
            self.start_KO = self.W_dec.detach().clone()
        else:
            (self.W_dec if restraint == FROZEN_DECODER else self.W_enc).requires_grad_(False)
        return self

    def encode(self, x_ND: Tensor) -> Tensor:
        """z, float [..., K], exactly 0 where a latent is not active."""
        return self.code(x_ND.reshape(-1, x_ND.shape[-1])).dense(self.k).reshape(*x_ND.shape[:-1], self.k)

    def decode(self, z_NK: Tensor) -> Tensor:
        """(z W_dec + b_dec) / output_scale, float [..., O]."""
        return (z_NK @ self.W_dec + self.b_dec) / self.output_scale

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        z_NK = self.encode(x_ND)
        return self.decode(z_NK), z_NK

    def scaled(self, x_ND: Tensor) -> Tensor:
        """x * input_scale, of the right width and in the type of the weights."""
        if x_ND.shape[-1] != self.d_model:
            raise ValueError(f"width of the activations ({x_ND.shape[-1]}) must be d_model ({self.d_model})")
        return x_ND.to(self.W_enc.dtype) * self.input_scale

    @property
    def centre(self) -> Tensor:
        """What is subtracted from what is read: b_dec, or zeros."""
        return self.b_dec if self.centres_input else self.W_enc.new_zeros(self.d_model)

    def pre_activations(self, x_ND: Tensor) -> Tensor:
        """(x - centre) W_enc + b_enc of scaled activations, float [N, K]."""
        return torch.addmm(self.b_enc, x_ND - self.centre, self.W_enc)

    @torch.no_grad()
    def set_weights(self, weight_DK: Tensor, bias_K: Tensor, weight_KO: Tensor, bias_O: Tensor) -> None:
        """Take W_enc, b_enc, W_dec and b_dec as they are, with scales of 1.

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        given = {"W_enc": weight_DK, "b_enc": bias_K, "W_dec": weight_KO, "b_dec": bias_O}
        for name, value in given.items():
            own = cast(Tensor, getattr(self, name))
            if value.shape != own.shape or not value.is_floating_point() or not bool(value.isfinite().all()):
                shape, wanted = list(value.shape), list(own.shape)
                raise ValueError(f"{name} ({value.dtype} {shape}) must be of shape {wanted}, all of it finite numbers")
        for name, value in given.items():
            cast(Tensor, getattr(self, name)).copy_(value)
        self.is_started = True
        self.input_scale.fill_(1.0)
        self.output_scale.fill_(1.0)

    @torch.no_grad()
    def start_from(self, x_ND: Tensor, target_NO: Tensor | None = None) -> None:
        """Take the scales from activations, so that the mean square of a scaled value is 1, and b_dec from their median.

        target_NO: what a transcoder is to write; of any other it is x itself.

        The geometric median: the point with the least summed distance to the targets, found by Weiszfeld's iteration.

        Raises:
            ValueError: no token, or one that is not finite; an autoencoder that was trained or read from a file, whose weights
                fit the scales that it had.
        """
        if self.is_started:
            raise ValueError("training must start from a new autoencoder: this one was trained before, or read from a file")
        target_NO = x_ND if target_NO is None else target_NO
        for rows in (x_ND, target_NO):
            if len(rows) == 0 or not bool(rows.isfinite().all()):
                raise ValueError(f"activations to start from ({len(rows)} tokens) must be finite, and at least one")
        self.is_started = True
        self.input_scale.copy_(_scale(x_ND))
        self.output_scale.copy_(_scale(target_NO))
        self.b_dec.copy_(geometric_median(target_NO.to(self.b_dec.dtype) * self.output_scale))

    @property
    def is_dead(self) -> Tensor:
        """bool: latents that have not fired in the last dead_window tokens."""
        return self.tokens_since_fired_K >= self.dead_window

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Remove the part of W_dec's gradient along its rows, which would only change their norms."""
        if self.has_unit_decoder and self.W_dec.grad is not None:
            along_K1 = (self.W_dec.grad * self.W_dec).sum(dim=-1, keepdim=True)
            self.W_dec.grad.addcmul_(self.W_dec, along_K1, value=-1)

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Give the rows of W_dec norm 1 again, and turn soft-frozen ones back to where they may be."""
        if self.start_KO is not None:
            self.W_dec.copy_(_turned_back(self.W_dec, self.start_KO))
        if self.has_unit_decoder:
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min_(torch.finfo(self.W_dec.dtype).tiny))

    @torch.no_grad()
    def note(self, step: SAEStep, num_tokens: int) -> None:
        """Note what has fired in a batch of training: the dead latents, and what else is counted, follow from it."""
        self.tokens_since_fired_K.add_(num_tokens).mul_(step.fired_K == 0)

    @torch.no_grad()
    def folded_weights(self) -> dict[str, Tensor]:
        """W_enc, b_enc, W_dec and b_dec with the scales in them."""
        return {
            "W_enc": self.W_enc * self.input_scale,
            "b_enc": self.b_enc.detach(),
            "W_dec": self.W_dec / self.output_scale,
            "b_dec": self.b_dec / self.output_scale,
        }

    @torch.no_grad()
    def fold_(self) -> Self:
        """Take the scales into the weights: x_hat and z stay as they are, and both scales are 1."""
        for name, value in self.folded_weights().items():
            cast(Tensor, getattr(self, name)).copy_(value)
        self.input_scale.fill_(1.0)
        self.output_scale.fill_(1.0)
        return self

    def dead_latents_loss(self, x_ND: Tensor, error_NO: Tensor, aux_k: int) -> Tensor:
        """AUX_WEIGHT times the mean of (e - e_hat)^2, e_hat from the aux_k dead latents with the highest pre-activations.

        It is 0 without dead latents.

        Source: arXiv:2406.04093, A.2. It gives latents that never fire a gradient towards what is not yet explained.
        """
        dead_J = self.is_dead.nonzero().flatten()
        if len(dead_J) == 0 or aux_k == 0:
            return error_NO.new_zeros(())
        select = top_entries(min(aux_k, len(dead_J)))
        code = sparse_encode(x_ND, self.W_enc[:, dead_J], self.b_enc[dead_J], self.centre, select)
        error_hat_NO = sparse_decode(code, self.W_dec[dead_J])
        return AUX_WEIGHT * (error_NO.detach() - error_hat_NO).square().mean()


def check_int(name: str, value: object) -> None:
    """Raise ValueError unless the value is an int: settings come from files, and an error later says less."""
    if not isinstance(value, int):
        raise ValueError(f"{name} ({value!r:.40}) must be an int")


def check_threshold(threshold_K: Tensor) -> None:
    """Raise ValueError unless all thresholds are finite and >= 0."""
    if not bool(((threshold_K >= 0) & threshold_K.isfinite()).all()):
        raise ValueError(f"threshold ({threshold_K.min():g} to {threshold_K.max():g}) must be finite and >= 0 for each latent")


def _scale(x_ND: Tensor) -> Tensor:
    """1 / the root of the mean square, 1 for activations that are all 0."""
    mean = x_ND.double().square().mean()
    return torch.where(mean > 0, mean.rsqrt(), 1.0).float()


def _turned_back(row_KO: Tensor, start_KO: Tensor) -> Tensor:
    """Rows of the same norms, of which those with a cosine below MIN_COSINE are turned towards the start until they have it."""
    norm_K1 = row_KO.norm(dim=-1, keepdim=True)
    along_K1 = (row_KO * start_KO).sum(dim=-1, keepdim=True)  # the rows of the start have norm 1
    across_KO = nn.functional.normalize(row_KO - along_K1 * start_KO, dim=-1)
    turned_KO = norm_K1 * (MIN_COSINE * start_KO + (1 - MIN_COSINE**2) ** 0.5 * across_KO)
    return torch.where(along_K1 < MIN_COSINE * norm_K1, turned_KO, row_KO)


def geometric_median(x_ND: Tensor) -> Tensor:
    """argmin_m sum_n |x_n - m|, float [D], by Weiszfeld's iteration from the mean, to a relative 1e-6."""
    x_ND = x_ND.double()
    median_D = x_ND.mean(dim=0)
    for _ in range(MAX_MEDIAN_STEPS):
        weight_N1 = 1 / (x_ND - median_D).norm(dim=-1, keepdim=True).clamp_min(1e-12)
        new_D = (weight_N1 * x_ND).sum(dim=0) / weight_N1.sum()
        moved, median_D = (new_D - median_D).norm(), new_D
        if moved <= 1e-6 * median_D.norm():
            break
    return median_D


ARCHITECTURES: Registry[SAE] = Registry("SAE architecture", SAE)  # type: ignore[type-abstract]
