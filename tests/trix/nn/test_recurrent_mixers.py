"""The mixers with a state of fixed size: resolvent (two hoppings, vector and matrix state) and its baseline, SSD."""

import pytest
import torch
import torch.nn.functional as F
from pieces import assert_pieces_are_the_whole
from torch import Tensor

from trix.functional.resolvent import Pair
from trix.nn import (
    FFNConfig,
    LanguageModel,
    LanguageModelConfig,
    RecurrentMixer,
    ResolventMixer,
    SSDMixer,
    TernaryWeight,
    TriXBlock,
    pack_model,
)
from trix.outputs import TokenContext

KINDS = {
    "hermitian": lambda **args: ResolventMixer(24, 4, hopping="hermitian", **args),
    "vector": lambda **args: ResolventMixer(24, 4, hopping="hermitian", d_state=0, **args),
    "one_way": lambda **args: ResolventMixer(24, 4, hopping="one_way", **args),
    "no_gauge": lambda **args: ResolventMixer(24, 4, hopping="hermitian", gauge=False, **args),
    "ssd": lambda **args: SSDMixer(24, 4, **args),
    "expanded": lambda **args: ResolventMixer(24, 4, hopping="hermitian", expand=2, **args),
    "expanded ssd": lambda **args: SSDMixer(24, 4, expand=3, **args),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, **args: object) -> RecurrentMixer:
    torch.manual_seed(0)
    mixer = KINDS[kind](**args).double().eval()
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # far from where training starts
    return mixer


def dense_rows(G: Pair, c: Pair) -> Tensor:
    """L [B, H, T, T] by its recurrence over rows, in complex numbers: row i is G_i (e_i - c_i row i - 1)."""
    pivot, hop = torch.complex(*G), torch.complex(*c)
    T = pivot.shape[-1]
    rows = [torch.zeros(*pivot.shape[:2], T, dtype=pivot.dtype)]
    for i in range(T):
        rows.append(pivot[..., i, None] * (F.one_hot(torch.tensor(i), T) - hop[..., i, None] * rows[-1]))
    return torch.stack(rows[1:], dim=-2)


@every_kind
def test_it_computes_the_formula_of_its_docstring(kind: str) -> None:
    mixer, x = make(kind), torch.randn(2, 9, 24, dtype=torch.float64)
    hops = mixer.read_hops(x)
    width = 6 * mixer.n_heads
    gate, channels = mixer.in_proj(x).split([width, mixer.num_channels], dim=-1)
    kernel = mixer.conv.weight[:, 0]
    padded = F.pad(channels, (0, 0, 3, 0))
    channels = F.silu(sum(padded[:, tap : tap + 9] * kernel[:, tap] for tap in range(4)) + mixer.conv.bias)
    u, q, k = channels.split([width, mixer.d_state, mixer.d_state], dim=-1)
    u = u.unflatten(-1, (mixer.n_heads, 6)).transpose(1, 2)
    weights = dense_rows(hops.G, hops.c)
    if mixer.d_state:
        weights = weights * (q @ k.mT)[:, None]
    y = weights @ (u * hops.scale_in[..., None]).to(weights.dtype)
    y = (y if hops.turn is None else y * torch.complex(*hops.turn)).real
    y = y if hops.scale_out is None else y * hops.scale_out[..., None]
    y = y + u * mixer.skip[:, None, None]
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = mixer.out_proj(y.transpose(1, 2).flatten(-2) * mixer.norm_weight * F.silu(gate))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-10, atol=1e-10)


def test_the_hermitian_rows_are_those_of_the_inverse_of_each_leading_block() -> None:
    mixer, x = make("hermitian"), torch.randn(1, 7, 24, dtype=torch.float64)
    energy, eta, hop = (part[0] for part in mixer.dynamics(x).transpose(1, 2).split(4, dim=1))
    eta, hops = F.softplus(eta) + 1e-3, mixer.read_hops(x)
    c = torch.complex(*hops.c)[0]
    torch.testing.assert_close(c.abs(), F.softplus(hop))
    mean_energy, mean_eta, mean_hop = mixer.dynamics.bias.split(4)
    alpha, w = torch.complex(mean_energy, -F.softplus(mean_eta) - 1e-3), F.softplus(mean_hop).square()
    end = 1 / alpha
    for _ in range(2000):
        end = 1 / (alpha - w * end)  # an endless row of equal tokens
    for head in range(4):
        H = torch.diag(torch.complex(energy[head], -eta[head]))
        H[0, 0] -= c[head, 0].abs().square() * end[head]
        for i in range(1, 7):
            H[i, i - 1], H[i - 1, i] = c[head, i], c[head, i].conj()
        L = dense_rows(hops.G, hops.c)[0, head]
        for i in range(7):
            torch.testing.assert_close(L[i, : i + 1], torch.linalg.inv(H[: i + 1, : i + 1])[i])


def test_ssd_is_its_recurrence() -> None:
    mixer, x = make("ssd"), torch.randn(2, 9, 24, dtype=torch.float64)
    hops = mixer.read_hops(x)
    step = F.softplus(mixer.dynamics(x)).transpose(1, 2)
    decay = torch.exp(-step * mixer.log_rate.exp()[:, None])
    total = torch.zeros(2, 4, 9, dtype=torch.float64)
    rows = []
    for i in range(9):
        total = decay[..., i, None] * total
        total[..., i] = step[..., i]
        rows.append(total)
    L = dense_rows(hops.G, hops.c) * hops.scale_in[..., None, :]
    torch.testing.assert_close(L, torch.stack(rows, dim=-2).to(L.dtype))


@every_kind
def test_pieces_are_the_whole(kind: str) -> None:
    mixer = make(kind)
    x, state, parts = torch.randn(2, 70, 24, dtype=torch.float64), mixer.empty_state(2), []
    for piece in x.split([1, 33, 1, 2, 32, 1], dim=1):
        update, state, _ = mixer(piece, TokenContext(), state)
        parts.append(update)
    torch.testing.assert_close(torch.cat(parts, dim=1), mixer(x)[0], rtol=1e-11, atol=1e-11)
    assert [tuple(part.shape[1:]) for part in state] == [spec.shape[1:] for spec in mixer.state_specs()]


@every_kind
def test_an_edited_token_changes_nothing_before_it_and_everything_after(kind: str) -> None:
    mixer, x = make(kind).float(), torch.randn(2, 40, 24)
    edited = x.clone()
    edited[:, 25] += 1.0
    before, after = mixer(x)[0], mixer(edited)[0]
    assert torch.equal(before[:, :25], after[:, :25])
    assert (before[:, 25:] != after[:, 25:]).any(-1).all()


@every_kind
def test_padding_changes_no_token(kind: str) -> None:
    mixer, x = make(kind), torch.randn(2, 12, 24, dtype=torch.float64)
    noise = torch.randn(2, 20, 24, dtype=torch.float64)
    padded = torch.cat([noise[:, :5], x, noise[:, 5:8]], dim=1)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[:, 5:17] = True
    update, _, phase = mixer(padded, TokenContext(mask_BT=mask))
    expected, _, expected_phase = mixer(x)
    torch.testing.assert_close(update[:, 5:17], expected, rtol=1e-12, atol=1e-12)
    if phase is not None:
        torch.testing.assert_close(phase[:, 5:17], expected_phase, rtol=1e-12, atol=1e-12)


def test_the_resolvent_says_a_phase_within_half_a_turn_that_routers_may_read() -> None:
    mixer, x = make("hermitian"), torch.randn(2, 50, 24, dtype=torch.float64)
    phase, hops = mixer(x)[2], mixer.read_hops(x)
    G = (torch.complex(*hops.G) * hops.scale_in.square()).sum(1)
    torch.testing.assert_close(phase, G.angle())
    assert phase.min() > 0
    assert phase.max() < torch.pi
    assert make("ssd")(x)[2] is None


@every_kind
def test_gradients_are_those_of_the_function(kind: str) -> None:
    mixer = make(kind)
    parameters = dict(mixer.named_parameters())
    x = torch.randn(1, 5, 24, dtype=torch.float64)

    def answer(*values: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(parameters, values, strict=True)), (x,))[0].square().sum()

    assert torch.autograd.gradcheck(answer, tuple(parameters.values()), fast_mode=True)


@pytest.mark.parametrize("hopping", ["hermitian", "one_way"])
def test_at_the_start_what_comes_from_afar_keeps_its_sign(hopping: str) -> None:
    """L_ij = G_i prod_j<m<=i (-c_m G_{m-1}), unwound, over random tokens: its mean is a good part of its mean modulus."""
    torch.manual_seed(0)
    mixer = ResolventMixer(32, 4, hopping=hopping).double()
    with torch.no_grad():
        hops = mixer.read_hops(torch.randn(500, 33, 32, dtype=torch.float64))
    G, c = (torch.complex(pair.re, pair.im) for pair in (hops.G, hops.c))
    assert hops.turn is not None
    turn_H = torch.complex(hops.turn.re, hops.turn.im)[:, 0, 0]
    hop_BHT = -c[..., 1:] * G[..., :-1]
    entry_BH = G[..., 32] * hop_BHT[..., 24:32].prod(-1) * turn_H
    assert (entry_BH.real.mean(0) > 0.3 * entry_BH.abs().mean(0)).all()  # .01 in one head where hops differ from token to token


@pytest.mark.parametrize(
    ("name", "value"), [("d_state", 8), ("conv_width", 2), ("expand", 2), ("hopping", "hermitian"), ("gauge", False)]
)
def test_each_argument_changes_the_answer(name: str, value: object) -> None:
    x, answers = torch.randn(1, 6, 24), []
    for args in ({}, {name: value}):
        torch.manual_seed(0)
        answers.append(ResolventMixer(24, 4, **args)(x)[0])  # type: ignore[arg-type]
    assert not torch.allclose(*answers)


@every_kind
def test_ternary_projections_pack(kind: str) -> None:
    mixer, x = make(kind, ternary=True).float(), torch.randn(2, 6, 24)
    expected = mixer(x)[0]
    packed = pack_model(mixer)
    assert [type(module) is not None for module in packed.modules() if isinstance(module, TernaryWeight)] == [True, True]
    torch.testing.assert_close(packed(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_recurrence_stays_in_float32() -> None:
    mixer, x = make("hermitian").float(), torch.randn(2, 64, 24)
    with torch.autocast("cpu", torch.bfloat16):
        update, state, _ = mixer(x, TokenContext(), mixer.empty_state(2))
    assert update.dtype == torch.bfloat16
    assert state[1].dtype == torch.float32
    torch.testing.assert_close(update.float(), mixer(x)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("mixer", ["resolvent", "ssd"])
@pytest.mark.parametrize("attention_at", [(), (1,)], ids=["pure", "hybrid"])
def test_a_language_model_reads_a_text_in_pieces(mixer: str, attention_at: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    config = LanguageModelConfig(24, 3, 4, 32, mixer=mixer, attention_at=attention_at, ffn=FFNConfig(num_tiles=4))
    assert_pieces_are_the_whole(LanguageModel(11, config).double().eval(), torch.randint(0, 11, (2, 20)), [1, 7, 8, 19])


def test_it_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"d_model \(24\) must be divisible by n_heads \(5\)"):
        ResolventMixer(24, 5)
    with pytest.raises(ValueError, match=r"d_state \(-1\) must be >= 0"):
        SSDMixer(24, 4, d_state=-1)
    with pytest.raises(ValueError, match=r"conv_width \(0\) must be >= 1"):
        ResolventMixer(24, 4, conv_width=0)
    with pytest.raises(ValueError, match=r"expand \(0\) must be >= 1"):
        SSDMixer(24, 4, expand=0)
    with pytest.raises(ValueError, match=r"hopping \('both'\) must be one of hermitian, one_way"):
        ResolventMixer(24, 4, hopping="both")  # type: ignore[arg-type]
    for eta_min in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"eta_min \({eta_min}\) must be > 0 and finite"):
            ResolventMixer(24, 4, eta_min=eta_min)
    with pytest.raises(ValueError, match=r"sequence length \(0\) must be >= 1"):
        ResolventMixer(24, 4)(torch.randn(2, 0, 24))
    for x, message in [
        (torch.randn(2, 3, 25), r"x \(2, 3, 25\) must be \[batch, sequence, d_model \(24\)\]"),
        (torch.randn(3, 24), r"x \(3, 24\) must be \[batch, sequence, d_model \(24\)\]"),
        (torch.randn(2, 3, 24).double(), r"dtype of x \(torch.float64\) must be that of the weights \(torch.float32\)"),
        (torch.ones(2, 3, 24, dtype=torch.int64), r"dtype of x \(torch.int64\) must be that of the weights \(torch.float32\)"),
    ]:
        for kind in (ResolventMixer, SSDMixer):
            for is_cast in (False, True):
                with torch.autocast("cpu", torch.bfloat16, is_cast), pytest.raises(ValueError, match=message):
                    kind(24, 4)(x)
    mixer, x = ResolventMixer(24, 4), torch.randn(2, 3, 24)
    with pytest.raises(ValueError, match=r"batch of the state \(3\) must be that of x \(2\)"):
        mixer(x, TokenContext(), mixer.empty_state(3))
    with pytest.raises(ValueError, match=r"with a state, mask_BT must be None"):
        mixer(x, TokenContext(mask_BT=torch.ones(2, 3, dtype=torch.bool)), mixer.empty_state(2))
    with pytest.raises(ValueError, match=r"is_causal \(False\) must be True with mixer ResolventMixer"):
        TriXBlock(24, 4, mixer="resolvent")(x, is_causal=False)
