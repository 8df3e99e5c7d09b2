from pathlib import Path

import lightning as L
import pytest
import torch
from small_runs import MakeTrainer, small_network

from lightning_modules.callbacks import ReclusterSchedule
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import LanguageModelTask, load_checkpoint
from trix.nn import FFNConfig, HierarchicalTriXFFN


def hierarchical_task(text: TextDataModule) -> LanguageModelTask:
    L.seed_everything(0)
    network = small_network(ffn=FFNConfig(kind="hierarchical", num_tiles=9, d_ff=36, num_probes=1))
    return LanguageModelTask(text.vocabulary, network, lambda p: torch.optim.Adam(p, lr=1.0), None)


def is_fresh(layer: HierarchicalTriXFFN) -> bool:
    """Whether the clusters are those of the present signatures."""
    before = layer.router.members_CM.clone()
    layer.recluster()
    fresh = layer.router.members_CM.clone()
    layer.router.members_CM.copy_(before)
    return torch.equal(before, fresh)


@pytest.mark.parametrize(("every_n_steps", "expected"), [(2, True), (3, False)])
def test_clusters_are_renewed_at_the_steps_asked_for_and_not_between(
    every_n_steps: int, expected: bool, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    task = hierarchical_task(text)
    trainer = make_trainer(max_steps=4, callbacks=[ReclusterSchedule(every_n_steps)])
    trainer.fit(task, text)
    layers = routed_layers(task)
    assert len(layers) == 2
    assert all(isinstance(layer, HierarchicalTriXFFN) for layer in layers.values())
    assert all(is_fresh(layer) == expected for layer in layers.values())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    loaded = routed_layers(load_checkpoint(tmp_path / "a.ckpt")[0])
    assert all(torch.equal(loaded[name].router.members_CM, layer.router.members_CM) for name, layer in layers.items())


def test_arguments_and_network_are_checked(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match=r"every_n_steps \(0\) must be >= 1"):
        ReclusterSchedule(0)
    with pytest.raises(UserError, match="ReclusterSchedule needs a layer of kind 'hierarchical'"):
        make_trainer(callbacks=[ReclusterSchedule()]).fit(language_model, text)
