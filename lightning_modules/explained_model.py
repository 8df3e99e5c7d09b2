"""The model whose activations are dumped or explained, and its texts."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning_modules.checkpoint_data import load_task, run_data
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from lightning_modules.data import RunData
    from trix.superposition.backends import CausalLMBackend, TriXBackend

TEXT, LABEL = "text", "label"
DEFAULT_MAX_LEN = 128  # of models of Hugging Face
HF_CONFIG = "config.json"


@dataclass(frozen=True)
class ExplainedModel:
    """path: as it was given. data: what a model of this project was trained on; None for one of Hugging Face."""

    path: str
    backend: "CausalLMBackend"
    data: "RunData | None"

    def max_len(self, wanted: int | None) -> int:
        """The tokens of a text that are read, by default the model's context.

        Raises:
            UserError: more than the context of a model of this project.
        """
        if self.data is None:
            return wanted or DEFAULT_MAX_LEN
        limit = cast("TriXBackend", self.backend).model.config.context_length
        if wanted is not None and wanted > limit:
            raise UserError(f"--max-len ({wanted}) must be <= context_length ({limit}) of the model")
        return wanted or limit

    def training_texts(self, num_tokens: int, max_len: int) -> list[str]:
        """Windows of the text that the model was trained on; they do not overlap, so that some can be held out from others.
        They have fewer tokens than num_tokens where the text has."""
        return self._windows(self._own_data().training_documents(num_tokens), num_tokens, max_len)

    def held_out_texts(self, num_tokens: int, max_len: int) -> list[str]:
        """Windows of the text that the model was validated on."""
        return self._windows([self._own_data().held_out(num_tokens).inputs], num_tokens, max_len)

    def _own_data(self) -> "RunData":
        if self.data is None:
            raise UserError(f"{self.path} needs texts to read: --text FILE")
        return self.data

    def _windows(self, batches: "Iterator[Tensor] | list[Tensor]", num_tokens: int, max_len: int) -> list[str]:
        vocabulary, wanted = cast("TriXBackend", self.backend).vocabulary, -(-num_tokens // max_len)
        texts: list[str] = []
        for token_BT in batches:
            texts += ["".join(vocabulary[index] for index in token_T) for token_T in token_BT[:, :max_len].tolist()]
            if len(texts) >= wanted:
                break
        return texts[:wanted]


def read_model(path: str, command: str, trusted: Collection[str] = ()) -> ExplainedModel:
    """A model by a checkpoint, by a run folder, or by the folder of a model of Hugging Face.

    Raises:
        UserError: no such model, or no language model.
    """
    if (Path(path) / HF_CONFIG).is_file():
        from trix.superposition.backends import HFCausalLM

        return ExplainedModel(path, HFCausalLM.from_pretrained(path), None)
    from lightning_modules.tasks.backend import backend_of

    ckpt = best_checkpoint(Path(path))
    task, checkpoint = load_task(str(ckpt), command, trusted)
    return ExplainedModel(path, backend_of(task, ckpt), run_data(task, checkpoint, ckpt, trusted))


def frame_of(model: ExplainedModel, text: str | None, num_tokens: int, max_len: int) -> "pd.DataFrame":
    """The texts of a file, or without one num_tokens of what the model was trained on, all with the label 0."""
    if text is not None:
        return read_texts(text)
    import pandas as pd

    return pd.DataFrame({TEXT: model.training_texts(num_tokens, max_len), LABEL: 0})


def read_texts(path: str) -> "pd.DataFrame":
    """The paragraphs of a text file, or all texts of a CSV file with the columns text and label."""
    from trix.superposition.data import load_text, load_titles_csv

    if path.lower().endswith(".csv"):
        return load_titles_csv(path, TEXT, LABEL, balance=False)  # by itself it drops texts of the larger of two named classes
    return load_text(path, TEXT, LABEL)


@contextmanager
def told_to_the_user(output: str | Path) -> Iterator[None]:
    """Raise what trix.superposition raises as a UserError. output: the file that an error is about which names none."""
    try:
        yield
    except ImportError as error:
        if error.name is None:  # it says itself what to install
            raise UserError(str(error)) from error
        extra = "transformers" if error.name == "transformers" else "superposition"
        raise UserError(f"{error.name} must be installed for this: pip install 'trix[{extra}]'") from error
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror or error}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
