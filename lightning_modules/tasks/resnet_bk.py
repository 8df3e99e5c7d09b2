"""Next-token prediction by the ResNet-BK language model, set by the keys of its interface."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from typing_extensions import override

from lightning_modules.recomputed_blocks import recomputed_blocks
from lightning_modules.tasks.checkpoint import check_blocks
from lightning_modules.tasks.language_model import LanguageModelTask
from lightning_modules.tasks.routed_task import Batch, StepOutput
from lightning_modules.tasks.task import half_cosine
from trix.resnet_bk.config import ResNetBKConfig

WEIGHT_DECAY = 0.1


class ResNetBKTask(LanguageModelTask):
    """Train the network of a :class:`trix.resnet_bk.LanguageModel`; measured, read and exported as every LanguageModelTask.

    AdamW; the rate rises for ``warmup_steps``, then falls along half a cosine to 0.

    Args:
        vocabulary: the characters, in the order of their token ids.
        network: size and kind of the network, by the keys of :class:`~trix.resnet_bk.ResNetBKConfig`; vocab_size is that of
            the vocabulary.
        learning_rate: highest rate. warmup_steps: steps in which the rate grows in proportion to the step's number.
        gradient_checkpointing: compute the blocks again in the backward pass of the training, rather than keep what they
            computed: less memory, about a third more time, the same gradients.

    Raises:
        ValueError: learning_rate <= 0, warmup_steps < 0, another vocab_size than the vocabulary's, and as LanguageModelTask and
        ResNetBKConfig.
    """

    length_key = "network.n_seq"

    def __init__(
        self,
        vocabulary: str,
        network: ResNetBKConfig = ResNetBKConfig(),  # noqa: B008 (frozen)
        learning_rate: float = 2e-3,
        warmup_steps: int = 20,
        gradient_checkpointing: bool = False,
    ) -> None:
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate ({learning_rate}) must be > 0 and finite")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps ({warmup_steps}) must be >= 0")
        settings = network if isinstance(network, ResNetBKConfig) else ResNetBKConfig.from_mapping(network)
        super().__init__(
            vocabulary,
            settings.network(),
            optimizer=lambda parameters: AdamW(parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY),
            lr_scheduler=partial(_warm_half_cosine, warmup_steps),
        )
        if settings.vocab_size not in (ResNetBKConfig.vocab_size, len(vocabulary)):
            raise ValueError(
                f"network.vocab_size ({settings.vocab_size}) must be that of the vocabulary ({len(vocabulary)}), or be left out"
            )
        self.gradient_checkpointing = gradient_checkpointing
        settings = replace(settings, vocab_size=len(vocabulary))
        self.save_hyperparameters(
            {
                "vocabulary": vocabulary,
                "network": asdict(settings),
                "learning_rate": learning_rate,
                "warmup_steps": warmup_steps,
                "gradient_checkpointing": gradient_checkpointing,
            }
        )

    @override
    def training_step(self, batch: Batch) -> StepOutput:
        with recomputed_blocks(self.network) if self.gradient_checkpointing else nullcontext():
            return super().training_step(batch)

    @classmethod
    @override
    def check_sizes(cls, settings: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
        network = settings.get("network")
        layers = {"num_layers": network["n_layers"]} if isinstance(network, dict) and "n_layers" in network else {}
        check_blocks({"network": layers}, state_dict)


def _warm_half_cosine(warmup_steps: int, optimizer: Optimizer, num_steps: int) -> LRScheduler:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (warmup_steps + 1)) * half_cosine(step, num_steps)

    return LambdaLR(optimizer, factor)
