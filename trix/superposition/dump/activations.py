"""The activations of a model on labelled texts, written to disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from trix.superposition.backends.base_model import DTYPES, RESIDUAL, CausalLMBackend, Site
from trix.superposition.config import DumpConfig
from trix.superposition.dump.batch_rows import RowReader
from trix.superposition.dump.manifest import DumpSettings, Identity, trix_version
from trix.superposition.dump.texts import TokenizedTexts
from trix.superposition.dump.writer import ShardWriter
from trix.superposition.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd


def dump_layer_activations(
    df: "pd.DataFrame", text_col: str, label_col: str, backend: CausalLMBackend, cfg: DumpConfig, out_dir: Path | str
) -> None:
    """Write the residual stream that enters block ``cfg.layer`` at every token of the texts to the folder ``out_dir``.

    The folder gets ``manifest.json`` and shards ``shard_00000.safetensors``, ... of cfg.shard_tokens tokens each, with the
    columns acts [N, D] in cfg.dtype, labels, tokids, titleidx (row of the frame) and position (in the text), all int64 [N];
    of a TriX layer with tiles also tile, int64, and score, float32. The rows of a text are neighbours. Texts of like length are
    read together, in batches whose order is drawn with a fixed seed.

    Padding is left out; so are attention sinks, unless ``cfg.drop_sinks`` is off, and tokens with NaN or infinite values, which
    the manifest names and a warning counts. If the folder holds a part of the same dump, the dump goes on, and ends with the
    files that it would have had without the interruption.

    Args:
        df: texts, and labels that are ints.

    Raises:
        ValueError: the folder holds another dump, or damaged shards; no token is left; a token is NaN or infinite, with
            ``cfg.strict``; a text that is no str, labels that are no ints, or a layer that the model lacks.
        OSError: a file cannot be written.
    """
    _dump(df, text_col, label_col, backend, cfg, {Site(cfg.layer, RESIDUAL): Path(out_dir)})


def dump_sites(
    df: "pd.DataFrame",
    text_col: str,
    label_col: str,
    backend: CausalLMBackend,
    cfg: DumpConfig,
    sites: Sequence[Site | str],
    out_dir: Path | str,
) -> dict[Site, Path]:
    """Write several sites in one run of the model, each as :func:`dump_layer_activations` does, to ``out_dir/SITE.LAYER``.

    Row n of a site and row n of another belong to the same token: one that is left out at a site is left out at all.

    Args:
        cfg: its layer is not read. sites: as ``resid_pre.13``.

    Returns:
        The folder of each site.

    Raises:
        ValueError: no sites, one of them twice or unknown, and as dump_layer_activations. OSError: a file cannot be written.
    """
    parsed = [Site.parse(site) if isinstance(site, str) else site for site in sites]
    if not parsed or len(set(parsed)) < len(parsed):
        raise ValueError(f"sites ({', '.join(map(str, parsed)) or 'none'}) must be >= 1, each once")
    for site in parsed:
        if site.name not in backend.sites:
            raise ValueError(f"site ({site}) must be one of {', '.join(backend.sites)}")
    folders = {site: Path(out_dir) / str(site) for site in parsed}
    _dump(df, text_col, label_col, backend, cfg, folders)
    return folders


def _dump(
    df: "pd.DataFrame",
    text_col: str,
    label_col: str,
    backend: CausalLMBackend,
    cfg: DumpConfig,
    folders: Mapping[Site, Path],
) -> None:
    for site in folders:
        backend.block(site.layer)  # an unknown layer is refused before anything is tokenized
    texts = TokenizedTexts.from_frame(df, text_col, label_col, backend, cfg.max_len)
    batches = texts.batches(cfg.batch_size)
    empty = int((texts.length == 0).sum())
    of_site = identities(texts, backend, cfg, list(folders))
    writer = ShardWriter(folders, of_site, len(texts.label), empty, len(texts.id_N), cfg.strict)
    if writer.is_complete:
        return
    reader = RowReader(backend, list(folders), DTYPES[cfg.dtype], cfg.drop_sinks)
    write_batches(writer, reader, texts, batches)


def write_batches(writer: ShardWriter, reader: RowReader, texts: TokenizedTexts, batches: Sequence[NDArray[np.int64]]) -> None:
    """Write the rows of batches of texts, from the writer's next one on, and that the dump is complete."""
    label = torch.from_numpy(texts.label)
    sizes = [len(batch) * int(texts.length[batch].max()) for batch in batches]
    with progress_bar() as progress:
        task = progress.add_task("activations", total=sum(sizes), completed=sum(sizes[: writer.batch]))
        for document, size in zip(batches[writer.batch :], sizes[writer.batch :], strict=True):
            batch = texts.batch(document)
            writer.add(reader.read(batch, label[batch.document_B]))
            progress.advance(task, size)
    writer.finish()


def identities(texts: TokenizedTexts, backend: CausalLMBackend, cfg: DumpConfig, sites: Sequence[Site]) -> dict[Site, Identity]:
    """What the dump of each site is of."""
    model, data = backend.digest(), texts.digest()
    settings = DumpSettings(
        max_len=cfg.max_len,
        batch_size=cfg.batch_size,
        shard_tokens=cfg.shard_tokens,
        drop_sinks=cfg.drop_sinks,
        sites=sorted(map(str, sites)),
    )
    return {
        site: Identity(
            trix=trix_version(),
            model=model,
            data=data,
            layer=site.layer,
            site=site.name,
            dtype=cfg.dtype,
            settings=settings,
        )
        for site in sites
    }
