"""What the tile cards of ``trix inspect`` say of the latents of a sparse autoencoder."""

import html
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning_modules.commands.sae_run import Places, open_run
from lightning_modules.explained_model import ExplainedModel, told_to_the_user

if TYPE_CHECKING:
    from lightning_modules.tasks import TrixTask
    from trix.nn import RoutedLayer, TriXBlock

LATENTS_OF_CARD = 4
NUM_TOKENS = 50_000


def latent_remarks(
    task: "TrixTask",
    ckpt: Path,
    run: str,
    trusted: Collection[str] = (),
    dump: str | None = None,
    autoencoder: str | None = None,
) -> dict[int, list[str]]:
    """HTML for each tile of the layer whose activations an autoencoder reads, by the layer's number among the routed ones.

    Args:
        task: of the model, from ckpt. run: of the autoencoder. dump: where the run's dump is now, if it was moved.
        autoencoder: which of several in the run; None: the main one.

    Raises:
        UserError: no such autoencoder, one of another model, or a layer without tiles.
    """
    with told_to_the_user(run):
        from lightning_modules.tasks.backend import backend_of
        from trix.nn.routed_layer import routed_layers
        from trix.superposition.tiles import contingency, decided_by, read_traffic
        from trix.superposition.tiles.page import latent_table
        from trix.superposition.tiles.report import tile_latents

        backend, sae_run = backend_of(task, ckpt), open_run(run, "tiles", trusted, Places(str(ckpt), dump))
        sae_run.check_model(ExplainedModel(str(ckpt), backend, None))
        block = cast("TriXBlock", backend.block(sae_run.identity.layer))
        decided_by(block)  # refuses a layer without tiles
        layer = block.ffn
        name, sae = sae_run.autoencoder(autoencoder)
        with sae_run.data.rows(NUM_TOKENS) as rows:
            traffic = read_traffic(sae, rows.dump, cast("RoutedLayer", layer).num_tiles, NUM_TOKENS)
        found = contingency(traffic)
        site = f"{sae_run.identity.site}.{sae_run.identity.layer}"
        which = "" if len(sae_run.task.autoencoders) == 1 else f" of the autoencoder {html.escape(name)}"
        title = f"<p>latents of {site}{which} that go with it, in {len(traffic.starts_P):,} documents:</p>"
        index = next(index for index, one in enumerate(routed_layers(backend.model)) if one is layer)
        cards = [
            title + latent_table(tile_latents(traffic, found, tile, LATENTS_OF_CARD), backend.vocabulary)
            for tile in range(traffic.num_tiles)
        ]
        return {index: cards}
