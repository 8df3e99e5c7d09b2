"""One training step of a TopK sparse autoencoder, against plain torch and SAELens; memory; and what Lightning adds.

Width 512, 4096 latents, 32 active, 4096 tokens a step, float32, Adam, one thread. A step: loss, backward pass, what the
library does with gradients and weights around the optimizer's step, and its count of the latents that fired. Contestants:
ours; the same in plain torch, with the latents in full; SAELens by default, without rescaling by the decoder's norms, and
with sparse activations on top, which is its fastest setting (with rescaling the latter fails on a CPU). Its learning-rate
and logging machinery is left out. All take turns; a ratio is the median over the turns of the CPU time over ours. SAELens is
left out where it is not installed: see `make test-saelens`.

Memory: the most that torch holds at once in a step of ours beyond parameters, gradients and Adam's state, over the bytes of
float32 [tokens, latents]. Lightning: CPU time of `trainer.fit` with SparseAutoencoderTask over that of the bare loop, which
ends with the same weights, at width 128, 1024 latents and 2048 tokens a step.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from case_options import whole
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from turns import interleaved, one_thread

from lightning_modules.tasks import AutoencoderConfig, SparseAutoencoderTask
from trix.superposition.sae import TopKSAE
from trix.superposition.sae.train import take_step

WIDTH, LATENTS, ACTIVE, TOKENS = 512, 4096, 32, 4096
SMALL_WIDTH, SMALL_LATENTS, SMALL_TOKENS, SMALL_STEPS = 128, 1024, 2048, 100
OURS = "ours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=whole(5), default=7, help="turns (default: %(default)s)")


def run(repeats: int) -> dict[str, Any]:
    x_ND = activations(TOKENS, WIDTH)
    with one_thread():
        ways, left_out = contestants(x_ND)
        interleaved(ways, 2)
        seconds = interleaved(ways, repeats)
        ratios = {
            name: [theirs / ours for theirs, ours in zip(of_name, seconds[OURS], strict=True)]
            for name, of_name in seconds.items()
        }
        return {
            "step_ms": {name: [1000 * value for value in of_name] for name, of_name in seconds.items()},
            "ratios": ratios,
            "left_out": left_out,
            "memory_over_latents_in_full": memory(x_ND),
            "lightning": lightning(repeats),
        }


def activations(num_tokens: int, width: int) -> Tensor:
    """Correlated, as those of a model are."""
    generator = torch.Generator().manual_seed(0)
    mixing_DD = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(num_tokens, width, generator=generator) @ mixing_DD


def contestants(x_ND: Tensor) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    ours, plain = made(WIDTH, LATENTS), made(WIDTH, LATENTS)
    adam, plain_adam = (torch.optim.Adam(sae.parameters(), lr=3e-4) for sae in (ours, plain))
    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: take_step(ours, adam, x_ND, x_ND),
        "plain torch": lambda: step_in_full(plain, plain_adam, x_ND),
    }
    try:
        import sae_lens
    except ImportError as error:
        return ways, {"SAELens": str(error)}
    settings: dict[str, dict[str, Any]] = {
        "": {},
        ", no rescaling": {"rescale_acts_by_decoder_norm": False},
        ", no rescaling, sparse": {"rescale_acts_by_decoder_norm": False, "use_sparse_activations": True},
    }
    return ways | {f"SAELens{name}": step_of_saelens(sae_lens, x_ND, changes) for name, changes in settings.items()}, {}


def made(width: int, latents: int) -> TopKSAE:
    torch.manual_seed(0)
    return TopKSAE(width, latents, active=ACTIVE)


def step_in_full(sae: TopKSAE, optimizer: torch.optim.Optimizer, x_ND: Tensor) -> None:
    """What take_step does, with the latents in full: five dense products."""
    scaled_ND = sae.scaled(x_ND)
    pre_NK = sae.pre_activations(scaled_ND)
    value_NA, latent_NA = pre_NK.topk(ACTIVE)
    z_NK = torch.zeros_like(pre_NK).scatter(1, latent_NA, value_NA.relu())
    loss = (z_NK @ sae.W_dec + sae.b_dec - scaled_ND).square().mean()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    sae.before_optimizer_step()
    optimizer.step()
    sae.after_optimizer_step()
    sae.tokens_since_fired_K.add_(len(x_ND)).mul_((z_NK > 0).sum(dim=0) == 0)


def step_of_saelens(sae_lens: Any, x_ND: Tensor, changes: dict[str, Any]) -> Callable[[], None]:
    """A step as its trainer takes it: training_forward_pass, latents that fired, clipped gradients, Adam."""
    torch.manual_seed(0)
    config = sae_lens.TopKTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=ACTIVE, **changes)
    sae = sae_lens.TopKTrainingSAE(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4)
    steps_since_fired_K, frequency_K = torch.zeros(LATENTS), torch.zeros(LATENTS)
    from sae_lens.saes.sae import TrainStepInput

    def step() -> None:
        given = TrainStepInput(
            sae_in=x_ND,
            coefficients={},
            dead_neuron_mask=steps_since_fired_K > 1000,
            n_training_steps=1,
            is_logging_step=False,
        )
        output = sae.training_forward_pass(step_input=given)
        with torch.no_grad():
            is_fired = output.feature_acts.bool().float()
            of_batch = is_fired.sum(-2).bool()
            of_batch = of_batch.to_dense() if of_batch.is_sparse else of_batch
            steps_since_fired_K.add_(1)
            steps_since_fired_K[of_batch] = 0
            frequency_K.add_(is_fired.sum(0))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory(x_ND: Tensor) -> float:
    """The highest sum of what a step allocates and has not freed, without the gradients of the parameters."""
    sae = made(WIDTH, LATENTS)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4)
    take_step(sae, optimizer, x_ND, x_ND)
    optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take_step(sae, optimizer, x_ND, x_ND)
    held = most = 0
    for event in profiler.profiler.kineto_results.events():  # in the order of time
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    gradients = sum(parameter.numel() * 4 for parameter in sae.parameters())
    return (most - gradients) / (4 * TOKENS * LATENTS)


def lightning(repeats: int) -> dict[str, Any]:
    """CPU seconds of SMALL_STEPS steps in either loop, in turns; both end with the same weights."""
    batches = [(part, part) for part in activations(SMALL_TOKENS * SMALL_STEPS, SMALL_WIDTH).split(SMALL_TOKENS)]
    config = AutoencoderConfig("topk", SMALL_LATENTS, {"active": ACTIVE})
    weights: dict[str, Tensor] = {}

    def task() -> SparseAutoencoderTask:
        torch.manual_seed(0)
        return SparseAutoencoderTask(SMALL_WIDTH, autoencoder=config, lr_scheduler=None)

    def bare() -> None:
        sae = task().autoencoders["sae"]
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        sae.start_from(*batches[0])
        for batch in batches:
            take_step(sae, optimizer, *batch)
        weights["bare"] = sae.W_dec.detach()

    def harness() -> None:
        trained = task()
        trainer = L.Trainer(
            max_steps=SMALL_STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(trained, DataLoader(batches, batch_size=None))
        weights["harness"] = trained.autoencoders["sae"].W_dec.detach()

    ways = {"bare": bare, "harness": harness}
    interleaved(ways, 1)
    assert torch.equal(weights["bare"], weights["harness"])
    seconds = interleaved(ways, repeats)
    return {**seconds, "ratios": [ours / other for ours, other in zip(seconds["harness"], seconds["bare"], strict=True)]}


def table(results: dict[str, Any]) -> str:
    lines = ["| step | ms | x ours |", "|---|---|---|"]
    for name, ratios in results["ratios"].items():
        lines.append(f"| {name} | {statistics.median(results['step_ms'][name]):.0f} | {statistics.median(ratios):.2f} |")
    lines += [f"\nleft out: {name} ({why})" for name, why in results["left_out"].items()]
    lines.append(f"\nmemory of a step over float32 [tokens, latents]: {results['memory_over_latents_in_full']:.2f}")
    lines.append(f"Lightning over the bare loop: {statistics.median(results['lightning']['ratios']):.3f}")
    return "\n".join(lines)
