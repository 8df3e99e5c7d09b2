"""The ResNet-BK language model with the names of its interface: a face of trix.nn.LanguageModel."""

import difflib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trix.nn.language_model
import trix.resnet_bk.mixer
from trix.functional.next_tokens import IGNORED_LABEL, next_tokens
from trix.resnet_bk.config import ResNetBKConfig
from trix.resnet_bk.core import BirmanSchwingerCore
from trix.routing.base_router import AGE
from trix.whole_file import whole_file, write_whole

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "resnet_bk"
MAX_LENGTH = 100
GENERATE_ARGUMENTS = (
    "input_ids",
    "max_length",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "do_sample",
    "attention_mask",
    "generator",
)
# The names of weights in a checkpoint by what they are called here: those of Trainer.save_checkpoint, and of `trix fit`.
PREFIXES = {"model.model.": "model.", "network.": "model."}


@dataclass
class LanguageModelOutput:
    """What a :class:`LanguageModel` answers. It has the shape of the logits, and indexes as a mapping does.

    logits: float [B, N, V]. loss: scalar, the mean cross entropy of the next token in nats, where labels were given.
    aux_loss: scalar, or None without tiles. state: see :meth:`LanguageModel.empty_state`, where one was given.
    hidden_states: float [B, N, D] each, as in transformers: the embeddings, the stream after each block but the last, and what
    the head reads; n_layers + 1 in all.
    """

    logits: Tensor
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    state: tuple[Any, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.logits.shape

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(f"{name} must be one of {', '.join(self.keys())}")
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def keys(self) -> list[str]:
        return [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]


class LanguageModel(nn.Module):
    """Blocks of resolvent mixing and tiles routed by its phase, by default; trained, exported and served as every
    :class:`trix.nn.LanguageModel`, which it holds as ``model``.

    Memory: on equal tokens the sensitivity to one falls as exp(-eta/(2 c sin k)) per token for an energy of 2 c cos k [to first
    order in eta], so below 1e-3 within about 138 tokens where eta = 0.1 and c = 1, and faster where the potential is rough
    (Anderson localisation). No claim of long recall; a few blocks of attention (``attention_at``) are the way to it.

    Args:
        vocab_size, d_model, n_layers, n_seq, epsilon, use_prime_bump, num_experts, top_k, use_scattering_router, use_act, and
            as keywords all others: see :class:`~trix.resnet_bk.ResNetBKConfig`.

    Raises:
        ValueError: an unknown keyword, with the nearest one, and as ResNetBKConfig.
    """

    def __init__(
        self,
        vocab_size: int = 30000,
        d_model: int = 256,
        n_layers: int = 6,
        n_seq: int = 512,
        epsilon: float = 1.0,
        use_prime_bump: bool = True,
        num_experts: int = 4,
        top_k: int = 2,
        use_scattering_router: bool = True,
        use_act: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        named = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_layers": n_layers,
            "n_seq": n_seq,
            "epsilon": epsilon,
            "use_prime_bump": use_prime_bump,
            "num_experts": num_experts,
            "top_k": top_k,
            "use_scattering_router": use_scattering_router,
            "use_act": use_act,
        }
        self.config = ResNetBKConfig.from_mapping({**named, **kwargs})
        self.model = trix.nn.language_model.LanguageModel(vocab_size, self.config.network())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
        *,
        labels: Tensor | None = None,
        state: Any = None,
    ) -> LanguageModelOutput | Tensor:
        """Logits of the next token.

        Args:
            input_ids: int64 [B, N] in [0, vocab_size), 1 <= N <= n_seq. attention_mask: [B, N], 0 for padding, on the left or
                right. return_dict: False: the logits alone.
            labels: int64 [B, N], the input's own tokens; token i + 1 is what i is compared with; -100 is not counted, nor is
                what padding predicts or is. state:
                from :meth:`empty_state` or the answer to the tokens before; then only input_ids is computed.

        Raises:
            ValueError: another shape or dtype, N = 0, N > n_seq, a token outside the vocabulary, or a mask with a state.
        """
        self._check_tokens(input_ids)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids {tuple(input_ids.shape)}"
            )
        mask_BT = None if attention_mask is None else attention_mask.bool()
        if mask_BT is not None and not torch.compiler.is_compiling() and bool(mask_BT.all()):
            mask_BT = None
        if state is not None and mask_BT is not None:
            num_padded = int((~mask_BT).sum())
            raise ValueError(f"attention_mask (0 at {num_padded} tokens) must be 1 at all of them where a state is given")
        hidden: list[Tensor] = []
        if state is not None:
            (logits, _, aux), state = self.model(input_ids, state=state, hidden_states=hidden)
        else:
            logits, _, aux = self.model(input_ids, return_routing=True, mask_BT=mask_BT, hidden_states=hidden)
        if not return_dict:
            return logits
        loss = None if labels is None else self._loss(logits, labels, mask_BT)
        return LanguageModelOutput(logits, loss, None if aux is None else aux["total_aux"], state, tuple(hidden))

    @staticmethod
    def _loss(logits: Tensor, labels: Tensor, mask_BT: Tensor | None) -> Tensor:
        if labels.shape != logits.shape[:2] or labels.dtype != torch.int64:
            raise ValueError(f"labels {tuple(labels.shape)} {labels.dtype} must be int64 {tuple(logits.shape[:2])}")
        target = next_tokens(labels, mask_BT).flatten()
        total = F.cross_entropy(logits.flatten(0, 1), target, ignore_index=IGNORED_LABEL, reduction="sum")
        return total / (target != IGNORED_LABEL).sum().clamp_min(1)

    def empty_state(self, batch_size: int) -> Any:
        """The state before the first token; its size does not grow with the text, except in blocks of attention."""
        return self.model.empty_state(batch_size)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 0.9,
        top_k: int = 50,
        do_sample: bool = True,
        *,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        max_new_tokens: int | None = None,
        **unknown: Any,
    ) -> Tensor:
        """The prompts and their continuations: int64 [B, max_length]. The prompt is read at once, then each token costs O(1).

        Args:
            input_ids: int64 [B, N], N <= max_length. max_length: length of the whole, <= n_seq; None: 100, or n_seq where
                that is less. max_new_tokens: the same without the prompt, in its place.
            temperature, top_p, top_k: limits on the distribution that is drawn from; top_k 0 means all, and top_p counts all
                tokens. do_sample: False takes the likeliest token.
            attention_mask: as a tokenizer returns it; prompts of one call are of one length, so it must be all 1.
            generator: source of the random numbers.

        Raises:
            ValueError: a mask with a 0, max_length < N or > n_seq, max_length and max_new_tokens at once, temperature <= 0,
            top_p outside (0, 1], top_k < 0, an unknown keyword, with the nearest one, and as :meth:`forward`.
        """
        for name in unknown:
            nearest = difflib.get_close_matches(name, GENERATE_ARGUMENTS, n=1, cutoff=0.0)[0]
            raise ValueError(f"argument ({name}) must be one of {', '.join(GENERATE_ARGUMENTS)}; the nearest is {nearest}")
        self._check_tokens(input_ids)
        if attention_mask is not None and not bool(attention_mask.all()):
            num_padded = int((attention_mask == 0).sum())
            raise ValueError(
                f"attention_mask (0 at {num_padded} tokens) must be 1 at all: give prompts of one length at a time"
            )
        if max_new_tokens is not None:
            if max_length is not None:
                raise ValueError(f"max_length ({max_length}) and max_new_tokens ({max_new_tokens}) say the same: give one")
            room = self.config.n_seq - input_ids.shape[1]
            if not 0 <= max_new_tokens <= room:
                raise ValueError(f"max_new_tokens ({max_new_tokens}) must be >= 0 and <= n_seq less the prompt ({room})")
            max_length = input_ids.shape[1] + max_new_tokens
        max_length = min(MAX_LENGTH, self.config.n_seq) if max_length is None else max_length
        if not input_ids.shape[1] <= max_length <= self.config.n_seq:
            raise ValueError(
                f"max_length ({max_length}) must be >= the prompt's ({input_ids.shape[1]}) and <= n_seq ({self.config.n_seq})"
            )
        if not temperature > 0:
            raise ValueError(f"temperature ({temperature}) must be > 0; for the likeliest token, do_sample=False")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p ({top_p}) must be > 0 and <= 1")
        if top_k < 0:
            raise ValueError(f"top_k ({top_k}) must be >= 0")
        was_training = self.training
        self.eval()
        try:
            tokens, new, state = [input_ids], input_ids, self.empty_state(input_ids.shape[0])
            for _ in range(max_length - input_ids.shape[1]):
                (logits, _, _), state = self.model(new, state=state)
                new = _draw(logits[:, -1], temperature, top_p, top_k, do_sample, generator)
                tokens.append(new)
        finally:
            self.train(was_training)
        return torch.cat(tokens, dim=1)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float | bool]:
        """What can be said of the operators: ``band``, the largest |energy| / hop of a head's mean (below 2: inside the band);
        ``eta_min`` and ``eta_max`` of the heads' means; with ``use_mourre``, ``mourre``: the commutator identities hold.
        """
        found: dict[str, float | bool] = {}
        if self.config.use_mourre:
            found["mourre"] = BirmanSchwingerCore(min(self.config.n_seq, 256)).verify_mourre_estimate()
        mixers = [mixer for mixer in self.model.stack.mixers if isinstance(mixer, trix.resnet_bk.mixer.BirmanSchwingerMixer)]
        if not mixers:
            return found
        means = [mixer.mean_operator() for mixer in mixers]
        energy = torch.cat([alpha.re for alpha, _, _ in means])
        eta, hop = torch.cat([eta for _, eta, _ in means]), torch.cat([hop for _, _, hop in means])
        return found | {
            "band": float((energy / hop).abs().max()),
            "eta_min": float(eta.min()),
            "eta_max": float(eta.max()),
        }

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json and model.safetensors, each whole or not at all; the folder is made.

        Raises:
            ValueError: a weight is not finite; then nothing is made.
        """
        weights = {name: value.detach().contiguous().cpu() for name, value in self.state_dict().items()}
        for name, value in weights.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"weight {name} ({int((~value.isfinite()).sum())} values that are not) must be finite")
        folder = Path(save_directory)
        about = {"model_type": MODEL_TYPE, "architectures": ["ResNetBKForCausalLM"], **asdict(self.config)}
        with whole_file(folder / WEIGHTS_FILE) as partial:
            save_file(_unshared(weights), partial, metadata={"format": "pt"})
        write_whole((json.dumps(about, indent=2) + "\n").encode(), folder / CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | Path) -> Self:
        """Read what :meth:`save_pretrained` wrote, for evaluation: a local folder, or a repository on the Hugging Face Hub,
        where huggingface_hub is installed.

        Raises:
            ValueError: no such folder or repository, other files than safetensors (a pickle can run code), or weights that do
                not fit the configuration.
        """
        folder = _local(model_name_or_path)
        if not (folder / WEIGHTS_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"{folder} must hold {CONFIG_FILE} and {WEIGHTS_FILE}; pickles (.bin, .pt) are not read")
        try:
            about = json.loads((folder / CONFIG_FILE).read_text())
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE} must be JSON: {_first_line(error)}") from error
        return cls._made(about, _weights(folder / WEIGHTS_FILE), str(folder))

    @classmethod
    def from_checkpoint(cls, checkpoint_path: str | Path) -> Self:
        """Read a checkpoint of a training, for evaluation; no pickled code is run.

        Args:
            checkpoint_path: written by CheckpointManager or ``Trainer.save_checkpoint`` of lightning_modules.resnet_bk, or by
                ``trix fit`` with ResNetBKTask.

        Raises:
            ValueError: another file, or weights that do not fit the configuration.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of a strange pickle before it refuses it
                content = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise ValueError(f"checkpoint ({checkpoint_path}) must exist") from error
        except Exception as error:  # whatever a damaged or hostile file makes torch raise
            # torch's own text of a pickle is six lines, which tell how to run what is in it.
            why = f": {_first_line(error)}" if isinstance(error, OSError | RuntimeError) else ""
            raise ValueError(f"checkpoint ({checkpoint_path}) must hold tensors and plain values only{why}") from error
        about, weights = _config_of(content), content.get("state_dict") if isinstance(content, dict) else None
        if not isinstance(about, dict) or not isinstance(weights, dict):
            needed = "state_dict, and config or hyper_parameters.network"
            raise ValueError(f"checkpoint ({checkpoint_path}) must hold {needed} of a LanguageModel")
        return cls._made(about, _own_names(weights), str(checkpoint_path))

    @classmethod
    def _made(cls, about: Any, weights: dict[str, Tensor], source: str) -> Self:
        if not isinstance(about, dict):
            raise ValueError(f"configuration in {source} ({type(about).__name__}) must be a mapping")
        foreign = about.get("model_type", MODEL_TYPE)
        if foreign != MODEL_TYPE:
            raise ValueError(f"model_type in {source} ({foreign!r}) must be {MODEL_TYPE!r}")
        known = {name: value for name, value in about.items() if name in ResNetBKConfig.__dataclass_fields__}
        num_layers = known.get("n_layers", 0)
        if type(num_layers) is not int or num_layers > len(weights):
            raise ValueError(f"n_layers in {source} ({num_layers}) must be <= the number of its tensors ({len(weights)})")
        with torch.device("meta"):  # nothing is allocated before the weights are known to fit
            planned = cls(**known)
        expected = {name: value.shape for name, value in planned.state_dict().items()}
        for name, shape in expected.items():
            if name not in weights and name.endswith(f".{AGE}"):
                continue
            if name not in weights:
                raise ValueError(f"weights in {source} ({len(weights)} tensors) must hold {name}")
            if not isinstance(weights[name], Tensor):
                raise ValueError(f"{name} in {source} ({type(weights[name]).__name__}) must be a tensor")
            if weights[name].is_floating_point() and not bool(weights[name].isfinite().all()):
                raise ValueError(f"{name} in {source} ({int((~weights[name].isfinite()).sum())} values) must be finite")
            # A history of surgery is as long as it is.
            is_log = name.endswith("_extra_state") and weights[name].dtype == torch.uint8 and weights[name].ndim == 1
            if weights[name].shape != shape and not is_log:
                raise ValueError(f"shape of {name} in {source} {tuple(weights[name].shape)} must be {tuple(shape)}")
        for name in weights.keys() - expected.keys():
            raise ValueError(f"weight {name} in {source} must be one of the model's")
        model = cls(**known)
        model.load_state_dict(weights)
        return model.eval()

    def _check_tokens(self, input_ids: Tensor) -> None:
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids {tuple(input_ids.shape)} {input_ids.dtype} must be int64 [batch, sequence]")
        if not 1 <= input_ids.shape[1] <= self.config.n_seq:
            raise ValueError(f"sequence of input_ids ({input_ids.shape[1]}) must be >= 1 and <= n_seq ({self.config.n_seq})")
        if torch.compiler.is_compiling() or input_ids.numel() == 0:
            return
        low, high = (int(value) for value in torch.aminmax(input_ids))
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"token ({low if low < 0 else high}) must be >= 0 and < vocab_size ({self.config.vocab_size})")


def _draw(
    logits_BV: Tensor, temperature: float, top_p: float, top_k: int, do_sample: bool, generator: torch.Generator | None
) -> Tensor:
    """The next token of each row, [B, 1]."""
    if not do_sample:
        return logits_BV.argmax(dim=-1, keepdim=True)
    ordered_BV, token_BV = logits_BV.float().sort(dim=-1, descending=True)
    ordered_BV = (ordered_BV - ordered_BV[:, :1]) / temperature
    probability_BV = ordered_BV.softmax(dim=-1)
    is_kept_BV = probability_BV.cumsum(dim=-1) - probability_BV < top_p  # the first one always
    if top_k:
        is_kept_BV = is_kept_BV & (torch.arange(logits_BV.shape[-1], device=logits_BV.device) < top_k)
    place_B1 = torch.multinomial(probability_BV * is_kept_BV, 1, generator=generator)
    return token_BV.gather(-1, place_B1)


def _unshared(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those that share memory, as the head does with the embedding: the format knows no shared memory."""
    seen: set[int] = set()
    unshared = {}
    for name, value in weights.items():
        is_shared = value.data_ptr() in seen
        seen.add(value.data_ptr())
        unshared[name] = value.clone() if is_shared else value
    return unshared


def _config_of(content: Any) -> Any:
    """What a checkpoint says of the model's configuration; ``trix fit`` keeps it among the task's arguments."""
    if not isinstance(content, dict):
        return None
    if "config" in content:
        return content["config"]
    arguments = content.get("hyper_parameters")
    return arguments.get("network") if isinstance(arguments, dict) else None


def _own_names(weights: dict[str, Any]) -> dict[str, Any]:
    for prefix, own in PREFIXES.items():
        if weights and all(isinstance(name, str) and name.startswith(prefix) for name in weights):
            return {own + name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _local(name_or_path: str | Path) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if Path(name_or_path).exists():
        raise ValueError(f"model ({name_or_path}) must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, it is a file")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"model ({name_or_path}) must be a folder, or huggingface_hub be installed") from None
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # no network, no such repository, no such name
        raise ValueError(f"model ({name_or_path}) must be a folder or a repository of the hub: {_first_line(error)}") from error


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a safetensors file: {_first_line(error)}") from error
