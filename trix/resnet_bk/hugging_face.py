"""ResNet-BK among the models of transformers: AutoConfig and AutoModelForCausalLM know it once this file is imported.

``import trix.resnet_bk`` imports it too where transformers has been imported before.
"""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from trix.resnet_bk.config import ResNetBKConfig
from trix.resnet_bk.language_model import MODEL_TYPE, LanguageModel


class ResNetBKHubConfig(PretrainedConfig):
    """transformers' form of a :class:`~trix.resnet_bk.ResNetBKConfig`, with the same keys."""

    model_type = MODEL_TYPE

    def __init__(self, **kwargs: Any) -> None:
        for f in fields(ResNetBKConfig):
            value = kwargs.pop(f.name, f.default)
            setattr(self, f.name, list(value) if isinstance(value, tuple) else value)
        super().__init__(**kwargs)

    def settings(self) -> ResNetBKConfig:
        return ResNetBKConfig.from_mapping({f.name: getattr(self, f.name) for f in fields(ResNetBKConfig)})


class ResNetBKForCausalLM(PreTrainedModel):
    """transformers' form of a :class:`~trix.resnet_bk.LanguageModel`, which it holds as ``face``.

    It reads and writes the same files. ``generate`` is that of the face.
    """

    config_class = ResNetBKHubConfig
    base_model_prefix = "face"

    def __init__(self, config: ResNetBKHubConfig) -> None:
        super().__init__(config)
        self.face = LanguageModel(**asdict(config.settings()))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> CausalLMOutput:
        output = self.face(input_ids, attention_mask, labels=labels)
        hidden_states = output.hidden_states if output_hidden_states else None
        return CausalLMOutput(loss=output.loss, logits=output.logits, hidden_states=hidden_states)

    def generate(
        self, inputs: Tensor | None = None, max_length: int | None = None, *, input_ids: Tensor | None = None, **settings: Any
    ) -> Tensor:
        """See :meth:`trix.resnet_bk.LanguageModel.generate`; ``inputs`` is transformers' other name of ``input_ids``.

        Raises:
            ValueError: none or both of the two, and as there.
        """
        given = [ids for ids in (inputs, input_ids) if ids is not None]
        if len(given) != 1:
            raise ValueError(f"prompts ({len(given)}: inputs, input_ids) must be given once")
        return self.face.generate(given[0], max_length, **settings)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """See :meth:`trix.resnet_bk.LanguageModel.save_pretrained`."""
        self.face.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *_: Any, **settings: Any) -> Self:
        """See :meth:`trix.resnet_bk.LanguageModel.from_pretrained`; of transformers' settings, ``dtype`` is heeded."""
        face = LanguageModel.from_pretrained(pretrained_model_name_or_path)
        model = cls(ResNetBKHubConfig(**asdict(face.config)))
        model.face = face
        dtype = settings.get("dtype", settings.get("torch_dtype"))
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        return (model.to(dtype) if isinstance(dtype, torch.dtype) else model).eval()


AutoConfig.register(MODEL_TYPE, ResNetBKHubConfig, exist_ok=True)
AutoModelForCausalLM.register(ResNetBKHubConfig, ResNetBKForCausalLM, exist_ok=True)
