import copy
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from small_runs import MakeTrainer, read_events, small_network
from torch import Tensor

from lightning_modules.callbacks import ClaimMonitor, ClaimWatch, MetricCondition, SurgeryEvent, SurgerySchedule
from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import ClassifierTask, LanguageModelTask
from trix.nn import ClassifierConfig, FFNConfig


class SignatureRecorder(L.Callback):
    """The raw signatures in force in layer 0, and what is frozen, as each batch starts its step."""

    def __init__(self) -> None:
        self.raw: list[Tensor] = []
        self.frozen: list[list[bool]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        layer = routed_layers(pl_module)["layer_0"]
        self.raw.append(layer.get_tile_signatures().clone())
        self.frozen.append([layer.is_frozen(tile) for tile in range(layer.num_tiles)])


SIGNS = "-+0-" * 4
SIGNATURE = torch.tensor([-1.0, 1.0, 0.0, -1.0] * 4)
RISEN = MetricCondition("m", above=0.9)


def insert(signature: Any, step: int = 2, **settings: Any) -> SurgeryEvent:
    return SurgeryEvent("insert", [3], step=step, signature=signature, tag="concept", **settings)


class Scripted(L.Callback):
    """Log the values as the metric "m", one a validation; keep what is frozen in layer 1 as each batch starts its step."""

    def __init__(self, *values: float) -> None:
        self.values, self.frozen = list(values), list[list[int]]()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("m", self.values.pop(0))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        layer = routed_layers(pl_module)["layer_1"]
        self.frozen.append([tile for tile in range(layer.num_tiles) if layer.is_frozen(tile)])


def test_frozen_signatures_hold_while_the_others_learn(
    text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    L.seed_everything(0)
    task = LanguageModelTask(text.vocabulary, small_network(), lambda p: torch.optim.SGD(p, lr=100.0), None)
    events = [SurgeryEvent("freeze", [0, 2], "all", step=1), SurgeryEvent("unfreeze", [2], [0], step=4)]
    recorder = SignatureRecorder()
    callbacks = [recorder, SurgerySchedule(events)]
    make_trainer(max_steps=6, limit_val_batches=0, logger=tensorboard, callbacks=callbacks).fit(task, text)
    expected = [[False] * 4] + [[True, False, True, False]] * 3 + [[True, False, False, False]] * 2
    assert recorder.frozen == expected
    for later in recorder.raw[1:]:
        assert torch.equal(later[0], recorder.raw[0][0])
    assert all(torch.equal(later[2], recorder.raw[0][2]) for later in recorder.raw[1:4])
    assert not torch.equal(recorder.raw[-1][[1, 3]], recorder.raw[0][[1, 3]])
    counts = read_events(tensorboard)
    assert [(event.step, event.value) for event in counts.Scalars("surgery/layer_0/frozen")] == [(1, 2.0), (4, 1.0)]
    assert [(event.step, event.value) for event in counts.Scalars("surgery/layer_1/frozen")] == [(1, 2.0), (4, 2.0)]


def test_epoch_events_come_with_their_epoch(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    recorder = SignatureRecorder()
    schedule = SurgerySchedule([SurgeryEvent("freeze", [1], epoch=1)])
    make_trainer(max_steps=6, limit_val_batches=0, callbacks=[recorder, schedule]).fit(language_model, text)
    assert [frozen[1] for frozen in recorder.frozen] == [False] * 4 + [True] * 2


def test_a_resumed_run_does_not_apply_an_event_again(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    freeze, new = SurgeryEvent("freeze", [0], step=1), SurgeryEvent("freeze", [3], step=2)
    trainer = make_trainer(max_steps=3, limit_val_batches=0, callbacks=[SurgerySchedule([freeze])])
    trainer.fit(language_model, text)
    for layer in routed_layers(language_model).values():
        layer.unfreeze_signature(0)  # by hand: only a second application could freeze it again
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    task = LanguageModelTask(text.vocabulary, small_network(), lr_scheduler=None)
    resumed = make_trainer(max_steps=5, limit_val_batches=0, callbacks=[SurgerySchedule([new, freeze])])
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["lr_schedulers"] = []
    torch.save(checkpoint, tmp_path / "a.ckpt")
    resumed.fit(task, text, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    layer = routed_layers(task)["layer_1"]
    assert [layer.is_frozen(tile) for tile in range(4)] == [False, False, False, True]  # the new event, late, and nothing else


def test_an_event_of_the_step_after_a_checkpoint_is_applied_after_resuming(
    text: TextDataModule, language_model: LanguageModelTask, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    events = [SurgeryEvent("freeze", [0], step=2)]
    trainer = make_trainer(max_steps=2, limit_val_batches=0, callbacks=[SurgerySchedule(events)])
    trainer.fit(language_model, text)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not routed_layers(language_model)["layer_0"].is_frozen(0)
    task = LanguageModelTask(text.vocabulary, small_network())
    resumed = make_trainer(max_steps=3, limit_val_batches=0, callbacks=[SurgerySchedule(events)])
    with pytest.warns(UserWarning, match="max_steps"):
        resumed.fit(task, text, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert routed_layers(task)["layer_0"].is_frozen(0)


OPTIMIZERS = {
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=10.0, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("routing", ["explicit", "emergent"])
def test_no_optimizer_moves_an_inserted_signature_until_it_is_unfrozen(
    optimizer: str, routing: str, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    L.seed_everything(0)
    network = small_network(ffn=FFNConfig(num_tiles=4, routing=routing))
    task = LanguageModelTask(text.vocabulary, network, OPTIMIZERS[optimizer], None)
    events = [insert(SIGNS), SurgeryEvent("unfreeze", [3], step=6, tag="free")]
    recorder = SignatureRecorder()
    layer = routed_layers(task)["layer_0"]
    held: list[Tensor] = []

    class RawRecorder(L.Callback):
        def on_train_batch_end(self, *rest: Any) -> None:
            held.append(layer.get_raw_signatures()[3].clone())

    callbacks = [recorder, RawRecorder(), SurgerySchedule(events)]
    make_trainer(max_steps=8, limit_val_batches=0, callbacks=callbacks).fit(task, text)
    assert [frozen[3] for frozen in recorder.frozen] == [False] * 2 + [True] * 4 + [False] * 2
    assert [torch.equal(raw, SIGNATURE) for raw in held] == [False] * 2 + [True] * 4 + [False] * 2
    for each in routed_layers(task).values():
        history = [(entry["operation"], entry["tile_idx"], entry["step"], entry["tag"]) for entry in each.get_surgery_history()]
        assert history == [("insert", 3, 2, "concept"), ("unfreeze", 3, 6, "free")]


@pytest.mark.parametrize("signature", [SIGNS, SIGNATURE.tolist(), [-1, 1, 0, -1] * 4])
def test_signatures_can_be_written_as_signs_and_numbers(
    signature: Any, language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    make_trainer(max_steps=1, limit_val_batches=0, callbacks=[SurgerySchedule([insert(signature, 0)])]).fit(
        language_model, text
    )
    assert torch.equal(routed_layers(language_model)["layer_1"].get_tile_signatures()[3], SIGNATURE)


def test_an_unfrozen_insert_learns_without_what_the_optimizer_remembered(
    text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    """Of the weights of the tile it goes on remembering; the signature moves as by a first step of Adam."""
    L.seed_everything(0)
    task = LanguageModelTask(text.vocabulary, small_network(), lambda p: torch.optim.Adam(p, lr=1e-2), None)
    layer = routed_layers(task)["layer_0"]
    seen: dict[str, Tensor] = {}

    class AfterSurgery(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
            if trainer.global_step == 2:
                memory = trainer.optimizers[0].state
                seen["signatures"] = memory[layer.router.raw_signatures]["exp_avg"].clone()
                seen["weights"] = memory[layer.tiles.up.weight]["exp_avg"].clone()

    dims = {"positive_dims": [1, 5, 9, 13], "negative_dims": [0, 3, 4, 7, 8, 11, 12, 15]}
    schedule = SurgerySchedule([insert(dims, freeze=False)])
    make_trainer(max_steps=3, limit_val_batches=0, callbacks=[schedule, AfterSurgery()]).fit(task, text)
    assert not seen["signatures"][3].any()
    assert seen["signatures"][[0, 1, 2]].any(dim=1).all()
    assert seen["weights"][3].any()
    raw = layer.get_raw_signatures()[3]
    assert not layer.is_frozen(3)
    assert 0 < float((raw - SIGNATURE).abs().max()) < 0.04  # one step of Adam without memory


def test_a_condition_fires_once_after_the_validation_that_meets_it(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tensorboard: TensorBoardLogger
) -> None:
    script = Scripted(0.9, float("nan"), 0.95, 0.2, 0.99)
    low = MetricCondition("m", below=0.5)
    events = [SurgeryEvent("freeze", [1], when=RISEN), SurgeryEvent("unfreeze", [1], when=low, tag="low")]
    trainer = make_trainer(
        max_steps=10,
        val_check_interval=2,
        num_sanity_val_steps=0,
        logger=tensorboard,
        callbacks=[SurgerySchedule(events), script],
    )
    trainer.fit(language_model, text)
    assert script.frozen == [[]] * 6 + [[1]] * 2 + [[]] * 2
    history = routed_layers(language_model)["layer_1"].get_surgery_history()
    assert [(entry["operation"], entry["step"], entry["tag"]) for entry in history] == [
        ("freeze", 6, ""),
        ("unfreeze", 8, "low"),
    ]
    frozen = read_events(tensorboard).Scalars("surgery/layer_1/frozen")
    assert [(event.step, event.value) for event in frozen] == [(6, 1.0), (8, 0.0)]


def test_the_sanity_check_before_the_training_is_no_validation(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    script = Scripted(0.99, 0.1, 0.1)
    schedule = SurgerySchedule([SurgeryEvent("freeze", [1], when=RISEN)])
    make_trainer(max_steps=4, num_sanity_val_steps=1, callbacks=[schedule, script]).fit(language_model, text)
    assert script.frozen == [[]] * 4


def test_a_tile_is_frozen_once_it_has_claimed_a_class(digits: DigitsDataModule, make_trainer: MakeTrainer) -> None:
    """Freeze tile 3 once its claim rate of class 7 is above 0.9: it rises from 0.77 to 0.94 as the digits are learned."""
    L.seed_everything(3)
    ffn = FFNConfig(num_tiles=4, route_on="hidden", balance_rate=0.0, balance_weight=0.0)
    network = ClassifierConfig(16, 1, 2, context_length=8, ffn=ffn)
    task = ClassifierTask(8, 10, digits.class_names, network, lambda p: torch.optim.AdamW(p, lr=1e-2), None)
    layer, rates, raw = routed_layers(task)["layer_0"], list[float](), list[Tensor]()

    class Recorder(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *rest: Any) -> None:
            rates.append(float(trainer.callback_metrics["claims/layer_0/7/tile_3"]))
            raw.append(layer.get_raw_signatures())

    condition = MetricCondition("claims/layer_0/7/tile_3", above=0.9)
    schedule = SurgerySchedule([SurgeryEvent("freeze", [3], [0], when=condition, tag="seven")])
    callbacks = [ClaimMonitor(max_classes=0, watch=[ClaimWatch(7, 0, 3)]), schedule, Recorder()]
    make_trainer(max_steps=44, val_check_interval=1.0, callbacks=callbacks).fit(task, digits)
    first = next(index for index, rate in enumerate(rates) if rate > 0.9)
    assert 0 < first < 3
    (entry,) = layer.get_surgery_history()
    assert (entry["operation"], entry["tile_idx"], entry["tag"]) == ("freeze", 3, "seven")
    assert entry["step"] == 11 * (first + 1)  # an epoch has 11 batches

    def holds(before_D: Tensor, after_D: Tensor) -> bool:
        """What is frozen is the ternary form."""
        return torch.equal(after_D, before_D) or torch.equal(after_D, before_D.sign() * (before_D.abs() > 0.3))

    is_same = [[holds(before[tile], after[tile]) for tile in range(4)] for before, after in pairwise(raw)]
    assert is_same == [[False, False, False, index >= first] for index in range(3)]


def test_a_condition_that_a_checkpoint_has_seen_is_neither_lost_nor_repeated(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The checkpoint of the validation that met it holds the network as it was measured, and the resumed run acts first."""

    class SaveAtValidation(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *rest: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def schedule() -> SurgerySchedule:
        return SurgerySchedule([SurgeryEvent("freeze", [1], when=RISEN), SurgeryEvent("unfreeze", [1], step=3)])

    make_trainer(max_steps=4, callbacks=[schedule(), Scripted(0.95, 0.95), SaveAtValidation()]).fit(language_model, text)
    frozen = "network.stack.blocks.1.feed_forward.inner.router.is_frozen_E"
    assert not torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"][frozen].any()
    for step, expected in ((2, [[1], [], []]), (4, [[]])):
        task, script = LanguageModelTask(text.vocabulary, small_network()), Scripted(0.1, 0.95, 0.95)
        trainer = make_trainer(max_steps=5, callbacks=[schedule(), script])
        with pytest.warns(UserWarning, match="max_steps"):
            trainer.fit(task, text, ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
        assert script.frozen == expected
        assert [entry["operation"] for entry in routed_layers(task)["layer_1"].get_surgery_history()] == ["freeze", "unfreeze"]


@pytest.mark.parametrize(
    ("metric", "hint"),
    [("val/los", r"did you mean val/loss\?$"), ("claims/layer_0/e/tile_1", r"\(ClaimMonitor logs the claims")],
)
def test_a_metric_that_is_not_logged_is_named_with_the_nearest_after_the_first_validation(
    metric: str, hint: str, language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    event = SurgeryEvent("freeze", [1], when=MetricCondition(metric, below=1.0))
    trainer = make_trainer(max_steps=4, callbacks=[SurgerySchedule([event])])
    with pytest.raises(
        UserError, match=rf"freeze tiles 1 of all layers once {metric} < 1.0: metric \({metric}\) must .*{hint}"
    ):
        trainer.fit(language_model, text)
    assert trainer.global_step == 2


def test_a_condition_needs_a_validation(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(limit_val_batches=0, callbacks=[SurgerySchedule([SurgeryEvent("freeze", [1], when=RISEN)])])
    with pytest.raises(UserError, match="conditions are judged after validations, of which this run has none"):
        trainer.fit(language_model, text)


@pytest.mark.parametrize("routing", ["explicit", "emergent"])
def test_all_tiles_freeze_at_a_share_of_the_steps(routing: str, text: TextDataModule, make_trainer: MakeTrainer) -> None:
    L.seed_everything(0)
    network = small_network(ffn=FFNConfig(num_tiles=4, routing=routing))
    task = LanguageModelTask(text.vocabulary, network, lambda p: torch.optim.SGD(p, lr=100.0), None)
    events = [SurgeryEvent("freeze", "all", share=0.3, tag="rest"), SurgeryEvent("unfreeze", "all", [0], share=0.8)]
    recorder = SignatureRecorder()
    make_trainer(max_steps=10, limit_val_batches=0, callbacks=[recorder, SurgerySchedule(events)]).fit(task, text)
    assert recorder.frozen == [[False] * 4] * 3 + [[True] * 4] * 5 + [[False] * 4] * 2
    for later in recorder.raw[4:8]:
        assert torch.equal(later, recorder.raw[3])
    assert not torch.equal(recorder.raw[9], recorder.raw[3])
    history = routed_layers(task)["layer_0"].get_surgery_history()
    told = [(entry["operation"], entry["tile_idx"], entry["step"], entry["tag"]) for entry in history]
    assert told == [("freeze", -1, 3, "rest"), ("unfreeze", -1, 8, "")]


def test_a_share_needs_a_number_of_steps(text: TextDataModule, make_trainer: MakeTrainer) -> None:
    task = LanguageModelTask(text.vocabulary, small_network(), lambda p: torch.optim.SGD(p, lr=1.0), None)
    schedule = SurgerySchedule([SurgeryEvent("freeze", "all", share=0.5)])
    with pytest.raises(
        UserError, match=r"freeze all tiles of all layers at 50% of the steps: trainer.max_steps \(-1\) must be"
    ):
        make_trainer(max_steps=-1, max_epochs=1, callbacks=[schedule]).fit(task, text)


def test_events_of_files_from_before_there_was_a_share_stay_applied() -> None:
    event = SurgeryEvent("freeze", [1], step=1)
    old = {name: value for name, value in asdict(event).items() if name != "share"}
    schedule = SurgerySchedule([event])
    schedule.load_state_dict({"met": [], "applied": [old]})
    assert schedule.state_dict()["applied"] == [asdict(event)]


def test_the_end_names_what_never_came(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    events = [SurgeryEvent("freeze", [1], when=RISEN), SurgeryEvent("freeze", [0], step=1), insert(SIGNS, 99)]
    with caplog.at_level("INFO"):
        make_trainer(callbacks=[SurgerySchedule(events), Scripted(0.5)]).fit(language_model, text)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("SurgerySchedule")]
    assert told == [
        "SurgerySchedule at step 1: freeze tiles 0 of all layers at step 1",
        "SurgerySchedule: the training ended at step 2 before: freeze tiles 1 of all layers once m > 0.9",
        "SurgerySchedule: the training ended at step 2 before: insert tiles 3 of all layers at step 99, tag 'concept'",
    ]


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({}, r"exactly one of above \(None\) and below \(None\)"),
        ({"above": 1.0, "below": 0.0}, r"exactly one of above \(1.0\) and below \(0.0\)"),
        ({"above": float("nan")}, r"above \(nan\) or below \(None\) must be finite"),
    ],
)
def test_conditions_have_one_bound(bounds: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetricCondition("m", **bounds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "melt", "tiles": [0], "step": 1}, r"action \('melt'\) must be 'insert', 'freeze' or 'unfreeze'"),
        ({"action": "freeze", "tiles": [0]}, r"one of step \(None\), epoch \(None\), share \(None\) and when \(None\)"),
        ({"action": "freeze", "tiles": "all", "share": 1.0}, r"share \(1.0\) must be >= 0 and < 1"),
        ({"action": "insert", "tiles": "all", "step": 1, "signature": "+"}, r"number of tiles \(all\) of an insert must be 1"),
        (
            {"action": "freeze", "tiles": [0], "step": 1, "epoch": 2},
            r"exactly one of step \(1\), epoch \(2\), share \(None\) and when \(None\)",
        ),
        ({"action": "freeze", "tiles": [0], "step": 1, "when": RISEN}, r"exactly one of step \(1\), epoch .* when \(m > 0.9\)"),
        ({"action": "freeze", "tiles": [0], "step": -1}, r"must be >= 0"),
        ({"action": "freeze", "tiles": [], "step": 1}, r"number of tiles \(0\) must be >= 1"),
        ({"action": "freeze", "tiles": [0, -1], "step": 1}, r"tiles \(0, -1\) must be >= 0"),
        ({"action": "freeze", "tiles": [1, 1], "step": 1}, r"tiles \(1, 1\) must be distinct"),
        ({"action": "freeze", "tiles": [1], "layers": [], "step": 1}, r"number of layers \(0\) must be >= 1"),
        ({"action": "insert", "tiles": [1], "step": 1}, "insert needs a signature"),
        ({"action": "insert", "tiles": [1, 2], "step": 1, "signature": "+"}, r"number of tiles \(2\) of an insert must be 1"),
        ({"action": "freeze", "tiles": [1], "step": 1, "signature": "+"}, r"signature \(\+\) belongs to insert, not to freeze"),
        ({"action": "unfreeze", "tiles": [1], "step": 1, "freeze": False}, r"freeze \(False\) belongs to insert, not to unf"),
    ],
)
def test_events_are_checked_when_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SurgeryEvent(**arguments)


def test_schedules_are_checked_when_made() -> None:
    event = SurgeryEvent("freeze", [0], step=1)
    with pytest.raises(ValueError, match=r"number of events \(0\) must be >= 1"):
        SurgerySchedule([])
    with pytest.raises(ValueError, match=r"events\[1\] .* must not repeat events\[0\]"):
        SurgerySchedule([event, SurgeryEvent("freeze", [0], step=1)])


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (SurgeryEvent("freeze", [4], step=1), r"tile \(4\) must be < num_tiles \(4\) of layer 0"),
        (SurgeryEvent("freeze", [0], [2], step=1), r"layer \(2\) must be < number of routed layers \(2\)"),
        (insert("+0-"), r"insert tiles 3 of all layers at step 2, tag 'concept': signature \(3,\) must have shape \(16,\)"),
        (insert("+x"), r"signature \(\+x\) must be a row of \+, 0 and -"),
        (insert([0.5] * 16), r"signature\[0\] \(0.5\) must be -1, 0 or 1"),
        (
            insert({"positive_dims": [1], "negative_dims": [16]}),
            r"signature: negative_dims \(16\) must be >= 0 and < d_model \(16\)",
        ),
        (insert({"positive_dims": [1]}), r"signature: negative_dims must be a list of integers"),
    ],
)
def test_events_are_checked_against_the_network(
    event: SurgeryEvent, message: str, language_model: LanguageModelTask, text: TextDataModule, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(callbacks=[SurgerySchedule([event])]).fit(language_model, text)


@pytest.mark.parametrize(("routing", "router"), [("learned", "LearnedRouter"), ("hash", "HashRouter")])
def test_a_router_without_signatures_has_nothing_to_freeze(routing: str, router: str, text: TextDataModule) -> None:
    task = LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig(num_tiles=4, routing=routing)))
    with pytest.raises(UserError, match=rf"the router \({router}\) of layer 0 has no signatures"):
        SurgerySchedule([SurgeryEvent("freeze", [0], step=1)]).check_network(task)


def test_an_emergent_signature_cannot_be_inserted_unfrozen(text: TextDataModule) -> None:
    task = LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig(num_tiles=4, routing="emergent")))
    state = copy.deepcopy(task.state_dict())
    with pytest.raises(UserError, match=r"freeze \(False\) must be True for a router of source 'emergent'"):
        SurgerySchedule([insert(SIGNS, freeze=False)]).check_network(task)
    SurgerySchedule([insert(SIGNS)]).check_network(task)
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())
