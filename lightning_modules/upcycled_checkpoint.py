"""The checkpoint of an upcycled language model: one that ``trix fit`` goes on from."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from lightning_modules.tasks import LanguageModelTask
from lightning_modules.tasks.checkpoint import load_weights
from lightning_modules.tasks.upgrade import COPIES
from trix.nn import LanguageModel, routed_layers
from trix.upcycling import Upcycled, cut
from trix.upcycling.one_tile import down_of_tiles, up_of_tiles

# Callbacks whose memory is of the run, not of the network, and stays.
KEPT_CALLBACKS = ("RunRecord", "RandomState")

Move = Callable[[Tensor], Tensor]


def upcycled_checkpoint(
    task: LanguageModelTask, checkpoint: dict[str, Any], upcycled: Upcycled
) -> tuple[LanguageModelTask, dict[str, Any]]:
    """The task with the upcycled network, and its checkpoint, which shares with the old one what stays.

    Further copies of the weights are cut in the same way, and get the same signatures. What the optimizer remembers of a weight
    moves with it; of the signatures it remembers nothing. Callbacks begin anew, for what they remember is of another network.

    Raises:
        ValueError: the optimizer has several groups of parameters; the weights of a copy do not fit the task.
    """
    made = _task_of(upcycled.network, checkpoint)
    new = checkpoint | {
        "hyper_parameters": dict(made.hparams),
        "state_dict": made.state_dict(),
        "callbacks": {name: value for name, value in checkpoint.get("callbacks", {}).items() if name in KEPT_CALLBACKS},
    }
    for key in COPIES[1:]:
        if key in checkpoint:
            copied = _task_of(task.network, checkpoint)
            load_weights(copied, checkpoint[key])
            network = cut(copied.network, upcycled.groups, upcycled.network.config.ffn.top_k)
            for layer, of_main in zip(routed_layers(network), routed_layers(upcycled.network), strict=True):
                layer.router.load_state_dict(of_main.router.state_dict())
                layer.surgery_log.load_state_dict(of_main.surgery_log.state_dict())
            new[key] = _task_of(network, checkpoint).state_dict()
    if "optimizer_states" in checkpoint:
        new["optimizer_states"] = [_moved(state, task, made, upcycled.groups) for state in checkpoint["optimizer_states"]]
    return made, new


def _task_of(network: LanguageModel, checkpoint: dict[str, Any]) -> LanguageModelTask:
    task = LanguageModelTask(**checkpoint["hyper_parameters"] | {"network": asdict(network.config)})
    task.network.load_state_dict(network.state_dict())
    return task.eval()


def _moved(state: dict[str, Any], old: LanguageModelTask, new: LanguageModelTask, groups: Sequence[Tensor]) -> dict[str, Any]:
    """The state of an optimizer of all parameters, with what it remembers of each at the parameter's new place and shape."""
    place = {name: index for index, (name, _) in enumerate(old.named_parameters())}
    if len(state["param_groups"]) != 1 or len(state["param_groups"][0]["params"]) != len(place):
        raise ValueError(f"groups of parameters of the optimizer ({len(state['param_groups'])}) must be 1, of all parameters")
    memory: dict[int, dict[str, Any]] = {}
    for index, (name, parameter) in enumerate(new.named_parameters()):
        old_name, move = _origin(name, groups)
        old_name = old_name if old_name in place else old_name.replace(".tiles.", ".")  # of a dense layer
        of_parameter = state["state"].get(place.get(old_name))
        if of_parameter is not None and not name.endswith("router.raw_signatures"):
            memory[index] = {
                key: move(value) if isinstance(value, Tensor) and value.numel() == parameter.numel() > 1 else value
                for key, value in of_parameter.items()
            }
    group = state["param_groups"][0] | {"params": list(range(len(list(new.parameters()))))}
    return {"state": memory, "param_groups": [group]}


def _origin(name: str, groups: Sequence[Tensor]) -> tuple[str, Move]:
    """The name of the old parameter that a new one comes from, and what makes a value of the one into one of the other."""
    for index, groups_EH in enumerate(groups):
        prefix = f"network.stack.blocks.{index}.feed_forward.inner.tiles."
        for matrix, deal in (("up", up_of_tiles), ("down", down_of_tiles)):
            if name == f"{prefix}{matrix}.weight":
                return name, partial(_dealt, deal=deal, groups_EH=groups_EH)
    return name, lambda value: value


def _dealt(value: Tensor, deal: Callable[[Tensor, Tensor], Tensor], groups_EH: Tensor) -> Tensor:
    """A value [F, D] or [D, F], with or without an axis of one tile before it, by tiles."""
    return deal(value.reshape(value.shape[-2:]), groups_EH).contiguous()
