"""From a batch of texts to the rows of a dump: what the model computes at some sites, without sinks and broken values.

B texts, T tokens of a text, N tokens of the batch without padding, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trix.superposition.backends.base_model import CausalLMBackend, Site
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


def read_rows(
    backend: CausalLMBackend,
    batch: TextBatch,
    label_B: Tensor,
    sites: Sequence[Site],
    dtype: torch.dtype,
    drop_sinks: bool,
) -> BatchRows:
    """Run the model once, up to the last of the sites, and keep the tokens that are no sink and finite at every site."""
    columns = {site: [Site(site.layer, name) for name in backend.columns(site.layer)] for site in sites}
    wanted = dict.fromkeys([*sites, *(column for of_site in columns.values() for column in of_site)])
    found = backend.activations(batch.id_BT, batch.is_token_BT, list(wanted))
    is_token_BT = batch.is_token_BT.to(backend.device)
    text_N, position_N = batch.is_token_BT.nonzero(as_tuple=True)
    acts = {site: found[site][is_token_BT].to(dtype) for site in sites}
    is_finite_N = torch.stack([x_ND.isfinite().all(dim=-1) for x_ND in acts.values()]).all(dim=0).cpu()
    is_sink_N = torch.zeros_like(is_finite_N)
    is_first_N = torch.zeros_like(is_finite_N)
    if drop_sinks:
        is_sink_N = torch.stack([has_sink_norm(x_ND, is_finite_N) for x_ND in acts.values()]).any(dim=0)
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
    by_site = {
        site: {"acts": acts[site][is_kept_N.to(backend.device)].cpu()}
        | {column.name: found[column].cpu()[batch.is_token_BT][is_kept_N] for column in columns[site]}
        for site in sites
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


def has_sink_norm(x_ND: Tensor, is_finite_N: Tensor) -> Tensor:
    """bool [N] on the CPU: finite tokens whose norm is more than SINK_RATIO times the median of the finite ones."""
    norm_N = torch.linalg.vector_norm(x_ND.float(), dim=-1).cpu()
    if not bool(is_finite_N.any()):
        return torch.zeros_like(is_finite_N)
    return is_finite_N & (norm_N > SINK_RATIO * norm_N[is_finite_N].median())
