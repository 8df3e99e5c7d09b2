import math
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import small_network
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.language_id import LanguageIdDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.errors import UserError
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks import CheckpointError, ClassifierTask, LanguageModelTask
from trix.nn import ClassifierConfig, FFNConfig


class OutputRecorder(L.Callback):
    """Keeps the outputs that callbacks see, and the learning rate of each step."""

    def __init__(self) -> None:
        self.train: list[Any] = []
        self.validation: list[Any] = []
        self.learning_rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        self.learning_rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *rest: Any) -> None:
        self.train.append(outputs)

    def on_validation_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *rest: Any) -> None:
        self.validation.append(outputs)


def test_training_loss_is_cross_entropy_plus_auxiliary_losses(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: Any
) -> None:
    recorder = OutputRecorder()
    trainer = make_trainer(max_steps=1, callbacks=[recorder])
    token, target = next(iter(text.train_dataloader()))
    language_model.train()
    logits, _, aux = language_model.network(token, return_routing=True)
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    for layer in routed_layers(language_model).values():
        layer.router.balance_bias.zero_()  # the forward above has moved it

    trainer.fit(language_model, text)

    assert trainer.callback_metrics["train/loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert trainer.callback_metrics["train/aux_loss"] == pytest.approx(aux["total_aux"].item(), rel=1e-6)
    assert recorder.train[0]["loss"] == pytest.approx((expected + aux["total_aux"]).item(), rel=1e-6)


def test_callbacks_see_routing_and_labels_without_gradient(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: Any
) -> None:
    recorder = OutputRecorder()
    make_trainer(callbacks=[recorder]).fit(language_model, text)
    for outputs, batch_size in ((recorder.train[0], 5), (recorder.validation[-1], 3)):
        assert list(outputs["routing"]) == ["layer_0", "layer_1"] == list(routed_layers(language_model))
        assert outputs["label"].shape == (batch_size, 8)
        for info in outputs["routing"].values():
            assert info["tile_idx"].shape == (batch_size, 8, 1)
            assert info["scores"].shape == (batch_size, 8, 4)
            assert not any(value.requires_grad for value in info.values())


def test_validation_loss_is_the_mean_over_all_tokens(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: Any
) -> None:
    trainer = make_trainer()
    metrics = trainer.validate(language_model, text, verbose=False)[0]
    tokens, targets = text.val_dataloader().dataset.tensors
    with torch.no_grad():
        logits = language_model.eval()(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert len(tokens) % text.batch_size != 0  # a mean of batch means would differ
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert trainer.test(language_model, text, verbose=False)[0]["test/loss"] == pytest.approx(expected, rel=1e-6)


def test_accuracy_is_the_share_of_correct_predictions(
    classifier: ClassifierTask, digits: DigitsDataModule, make_trainer: Any
) -> None:
    trainer = make_trainer()
    metrics = trainer.validate(classifier, digits, verbose=False)[0]
    predictions = trainer.predict(classifier, digits)
    label = torch.cat([batch["label"] for batch in predictions])
    probability = torch.cat([batch["probability"] for batch in predictions])
    truth = digits.val_dataloader().dataset.tensors[1]
    assert metrics["val/accuracy"] == pytest.approx((label == truth).float().mean().item())
    by_class = [(label == truth)[truth == digit].float().mean().item() for digit in range(10)]
    assert metrics["val/macro_accuracy"] == pytest.approx(sum(by_class) / 10)
    assert metrics["val/loss"] == pytest.approx(F.nll_loss(probability.log(), truth).item(), rel=1e-5)
    torch.testing.assert_close(probability.sum(dim=1), torch.ones(len(truth)))


def test_language_model_predicts_the_likeliest_next_token(language_model: LanguageModelTask, text: TextDataModule) -> None:
    batch = next(iter(text.predict_dataloader()))
    prediction = language_model.eval().predict_step(batch)
    probability = language_model(batch[0]).softmax(dim=-1)
    assert torch.equal(prediction["next_token"], probability.argmax(dim=-1))
    assert torch.equal(prediction["probability"], probability.amax(dim=-1))


def test_default_schedule_falls_to_zero_over_max_steps(
    language_model: LanguageModelTask, text: TextDataModule, make_trainer: Any
) -> None:
    recorder = OutputRecorder()
    make_trainer(max_steps=4, val_check_interval=4, callbacks=[recorder]).fit(language_model, text)
    assert recorder.learning_rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])


def test_a_run_resumed_with_more_steps_goes_on_along_the_longer_schedule(text: TextDataModule) -> None:
    task = LanguageModelTask(text.vocabulary, small_network())
    short_optimizer, short = task.make_optimizer(4)
    for _ in range(4):
        short_optimizer.step()
        short.step()
    assert short.get_last_lr() == [0.0]
    optimizer, longer = task.make_optimizer(8)
    longer.load_state_dict(short.state_dict())
    rates = []
    for _ in range(4):
        optimizer.step()
        longer.step()
        rates += longer.get_last_lr()
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 8)) for step in range(5, 9)])


def test_schedule_can_be_left_out_or_replaced(text: TextDataModule) -> None:
    constant = LanguageModelTask(text.vocabulary, small_network(), lr_scheduler=None)
    assert constant.make_optimizer(-1)[1] is None
    other = LanguageModelTask(
        text.vocabulary, small_network(), lr_scheduler=lambda optimizer, n: CosineAnnealingLR(optimizer, n, 1e-4)
    )
    schedule = other.make_optimizer(7)[1]
    assert isinstance(schedule, CosineAnnealingLR)
    assert (schedule.T_max, schedule.eta_min) == (7, 1e-4)


def test_a_schedule_needs_a_number_of_steps(language_model: LanguageModelTask, text: TextDataModule, make_trainer: Any) -> None:
    with pytest.raises(UserError, match=r"trainer.max_steps \(-1\) must be >= 1"):
        make_trainer(max_steps=-1, max_epochs=1, val_check_interval=None).fit(language_model, text)


def test_resumed_run_equals_an_uninterrupted_one(text: TextDataModule, make_trainer: Any, tmp_path: Any) -> None:
    def run(max_steps: int, ckpt_path: str | None = None) -> tuple[LanguageModelTask, L.Trainer]:
        L.seed_everything(3)
        task = LanguageModelTask(text.vocabulary, small_network())
        keeper = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = L.Trainer(
            max_steps=max_steps, accelerator="cpu", logger=False, callbacks=[keeper], enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(task, text, ckpt_path=ckpt_path, weights_only=True)
        return task, trainer

    whole, _ = run(7)
    resumed, trainer = run(7, str(tmp_path / "kept" / "step=3.ckpt"))  # in the middle of an epoch of four batches
    assert trainer.global_step == 7
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    with pytest.warns(UserWarning, match=r"max_steps \(9\) differs from the checkpoint's \(7\)"):
        run(9, str(tmp_path / "kept" / "step=6.ckpt"))


def test_checkpoint_of_another_network_is_refused(
    language_model: LanguageModelTask, classifier: ClassifierTask, text: TextDataModule, make_trainer: Any, tmp_path: Any
) -> None:
    trainer = make_trainer()
    trainer.fit(language_model, text)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    wider = LanguageModelTask(text.vocabulary, small_network(d_model=32))
    with pytest.raises(CheckpointError, match=r"network.d_model \(32\) must equal the checkpoint's \(16\)"):
        make_trainer().validate(wider, text, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match=r"task \(classifier\) must equal the checkpoint's \(language_model\)"):
        classifier.check_checkpoint(torch.load(tmp_path / "a.ckpt", weights_only=True))
    other_text = LanguageModelTask("abc", small_network())
    with pytest.raises(CheckpointError, match=r"vocabulary \(abc\) must equal the checkpoint's"):
        other_text.check_checkpoint(torch.load(tmp_path / "a.ckpt", weights_only=True))


def test_controls_without_tiles_train_too(text: TextDataModule, make_trainer: Any) -> None:
    recorder = OutputRecorder()
    task = LanguageModelTask(text.vocabulary, small_network(ffn=FFNConfig(kind="dense")))
    make_trainer(callbacks=[recorder]).fit(task, text)
    assert recorder.train[0]["routing"] == {}


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ("", r"\(0 characters, 0 distinct\)"),
        ("aba", r"\(3 characters, 2 distinct\)"),
        (None, r"vocabulary \(None\) must be a str"),
    ],
)
def test_vocabulary_is_checked(vocabulary: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelTask(vocabulary, small_network())


def test_class_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"number of class_names \(2\) must equal num_classes \(3\)"):
        ClassifierTask(8, 3, ["a", "b"])
    assert ClassifierTask(8, 3).class_names == ("0", "1", "2")


def test_data_longer_than_the_context_is_refused(language_model: LanguageModelTask, text: TextDataModule) -> None:
    text.context_length = 9
    with pytest.raises(UserError, match=r"data.context_length \(9\) must be <= network.context_length \(8\)"):
        language_model.check_data(text)


def test_data_that_does_not_fit_the_task_is_told(language_model: LanguageModelTask, digits: DigitsDataModule) -> None:
    with pytest.raises(
        UserError, match=r"labels of DigitsDataModule \(10 classes\) must be next characters: use ClassifierTask"
    ):
        language_model.check_data(digits)
    task = ClassifierTask(None, 98, network=ClassifierConfig(16, n_heads=2, context_length=8), vocabulary="\0?ab")
    with pytest.raises(UserError, match=r"data.context_length \(9\) must be <= network.context_length \(8\)"):
        task.check_data(LanguageIdDataModule(context_length=9))
