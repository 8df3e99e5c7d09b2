"""From a batch of texts to the rows of a dump: what the model computes at some sites, without sinks and broken values.

B texts, T tokens of a text, S places of the batch with padding, N without, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trix.superposition.backends.base_model import CausalLMBackend, Site
from trix.superposition.dump.batching import own_pages
from trix.superposition.dump.manifest import Dropped
from trix.superposition.dump.texts import TextBatch

SINK_RATIO = 10.0


@dataclass(frozen=True)
class BatchRows:
    """Rows of the tokens that are kept, in the order of the texts, on the CPU.

    common: the columns that all sites share. by_site: acts [rows, D] and the columns of the model.
    not_finite: (row, document, position) of each token that was left out as such; row counts the rows before it.
    """

    common: dict[str, Tensor]
    by_site: dict[Site, dict[str, Tensor]]
    dropped: Dropped
    not_finite: list[tuple[int, int, int]]

    def __len__(self) -> int:
        return len(self.common["labels"])

    def part(self, start: int, stop: int) -> dict[Site, dict[str, Tensor]]:
        """All columns of some rows, site by site."""
        return {
            site: {name: column[start:stop] for name, column in {**columns, **self.common}.items()}
            for site, columns in self.by_site.items()
        }


class RowReader:
    """Runs a model on batches of texts, each time up to the last of the sites, and keeps the tokens that are no sink and finite
    at every site.

    Activations are rounded and selected in buffers that grow to the largest batch and then stay: blocks of memory of as many
    sizes as there are batches would leave holes, and the memory of the process would grow.
    """

    def __init__(self, backend: CausalLMBackend, sites: Sequence[Site], dtype: torch.dtype, drop_sinks: bool) -> None:
        self._backend, self._sites, self._dtype, self._drop_sinks = backend, list(sites), dtype, drop_sinks
        self._columns = {site: [Site(site.layer, name) for name in backend.columns(site.layer)] for site in sites}
        self._buffers: dict[tuple[Site, str], Tensor] = {}

    def read(self, batch: TextBatch, label_B: Tensor) -> BatchRows:
        """The rows of a batch. The activations are views of the buffers: they hold until the next batch is read."""
        backend = self._backend
        wanted = dict.fromkeys([*self._sites, *(column for of_site in self._columns.values() for column in of_site)])
        found = backend.activations(batch.id_BT, batch.is_token_BT, list(wanted))
        place_N = batch.is_token_BT.flatten().nonzero().flatten()  # of the tokens, among tokens and padding
        acts = {site: self._rounded(site, found.pop(site).flatten(0, 1)) for site in self._sites}
        on_device_N = place_N.to(backend.device)
        # NaN where a value is NaN
        largest = [torch.linalg.vector_norm(x_SD, torch.inf, dim=-1)[on_device_N] for x_SD in acts.values()]
        is_finite_N = torch.stack([largest_N.isfinite() for largest_N in largest]).all(dim=0).cpu()
        text_N, position_N = batch.is_token_BT.nonzero(as_tuple=True)
        is_sink_N = torch.zeros_like(is_finite_N)
        is_first_N = torch.zeros_like(is_finite_N)
        if self._drop_sinks:
            norms = [torch.linalg.vector_norm(x_SD, dim=-1, dtype=torch.float32)[on_device_N].cpu() for x_SD in acts.values()]
            is_sink_N = torch.stack([has_sink_norm(norm_N, is_finite_N) for norm_N in norms]).any(dim=0)
            if backend.has_sinks:
                is_first_N = position_N == 0
        is_broken_N = ~is_finite_N & ~is_first_N
        is_kept_N = ~is_first_N & is_finite_N & ~is_sink_N
        document_N = batch.document_B[text_N]
        common = {
            "labels": label_B[text_N],
            "tokids": batch.id_BT[batch.is_token_BT],
            "titleidx": document_N,
            "position": position_N,
        }
        kept_N = on_device_N[is_kept_N.to(backend.device)]
        by_site = {
            site: {"acts": self._selected(site, x_SD, kept_N).cpu()}
            | {column.name: found[column].cpu()[batch.is_token_BT][is_kept_N] for column in self._columns[site]}
            for site, x_SD in acts.items()
        }
        row_N = is_kept_N.cumsum(0)
        broken = [
            (int(row_N[index]), int(document_N[index]), int(position_N[index]))
            for index in is_broken_N.nonzero().flatten().tolist()
        ]
        dropped = Dropped(
            padding=int((~batch.is_token_BT).sum()),
            first=int(is_first_N.sum()),
            not_finite=len(broken),
            norm=int((is_sink_N & ~is_first_N & is_finite_N).sum()),
        )
        return BatchRows({name: column[is_kept_N] for name, column in common.items()}, by_site, dropped, broken)

    def _rounded(self, site: Site, x_SD: Tensor) -> Tensor:
        return self._buffer(site, "all", x_SD, len(x_SD)).copy_(x_SD)

    def _selected(self, site: Site, x_SD: Tensor, kept_N: Tensor) -> Tensor:
        return torch.index_select(x_SD, 0, kept_N, out=self._buffer(site, "kept", x_SD, len(kept_N)))

    def _buffer(self, site: Site, use: str, like_SD: Tensor, rows: int) -> Tensor:
        """Head of a buffer, [rows, D]."""
        buffer = self._buffers.get((site, use))
        if buffer is None or len(buffer) < rows:
            buffer = own_pages((rows, like_SD.shape[1]), self._dtype).to(like_SD.device)
            self._buffers[site, use] = buffer
        return buffer[:rows]


def has_sink_norm(norm_N: Tensor, is_finite_N: Tensor) -> Tensor:
    """bool [N]: finite tokens whose norm, float32 [N], is more than SINK_RATIO times the median of the finite ones."""
    if not bool(is_finite_N.any()):
        return torch.zeros_like(is_finite_N)
    return is_finite_N & (norm_N > SINK_RATIO * norm_N[is_finite_N].median())
