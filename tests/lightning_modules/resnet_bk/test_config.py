"""ConfigLoader: the keys and defaults of the interface; errors in a line with the rule and both values."""

from pathlib import Path
from typing import Any

import pytest

from lightning_modules.errors import UserError
from lightning_modules.resnet_bk import ConfigError, ConfigLoader, TrainingConfig
from trix.resnet_bk import LanguageModel, ResNetBKConfig

COMPLETE = """
model:
  vocab_size: 30000
  d_model: 256
  n_layers: 6
  n_seq: 512
  epsilon: 1.0
  use_prime_bump: true
  prime_bump_scale: 0.02
  k_max: 3
  num_experts: 4
  top_k: 2
  use_scattering_router: true
  use_mourre: true
  use_lap: true
  schatten_threshold: 100.0
  use_semiseparable: true
  low_rank: null
  use_act: false
  act_halt_threshold: 0.2
training:
  batch_size: 8
  learning_rate: 1e-3
  num_epochs: 3
  warmup_steps: 100
  gradient_clip_norm: 1.0
  gradient_checkpointing: true
  gradient_accumulation_steps: 1
  mixed_precision: true
  log_interval: 50
  eval_interval: 500
  save_interval: 1000
"""


def load(text: str, folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "config.yaml"
    path.write_text(text)
    return ConfigLoader.load(str(path))


def test_the_complete_configuration_is_that_of_the_defaults(tmp_path: Path) -> None:
    config = load(COMPLETE, tmp_path)
    assert config == load("", tmp_path) == load("model: {}\n", tmp_path)
    assert ResNetBKConfig(**config["model"]) == ResNetBKConfig()
    assert TrainingConfig(**config["training"]) == TrainingConfig()
    named = [line.split(":")[0].strip() for line in COMPLETE.splitlines() if line.startswith("  ")]
    assert sorted([*named, "attention_at", "hopping", "n_heads", "ternary_mixer"]) == sorted(
        [*config["model"], *config["training"]]
    )
    assert ConfigLoader.validate(config)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "'1e-3'"])
def test_a_rate_is_a_number_however_it_is_written(text: str, tmp_path: Path) -> None:
    rate = load(f"training: {{learning_rate: {text}}}", tmp_path)["training"]["learning_rate"]
    assert isinstance(rate, float)
    assert rate == 0.001


def test_whole_numbers_and_null_keep_their_types(tmp_path: Path) -> None:
    config = load("model: {epsilon: 1, low_rank: 7, use_act: true}", tmp_path)["model"]
    assert (config["epsilon"], config["low_rank"], config["use_act"]) == (1.0, 7, True)
    assert isinstance(config["epsilon"], float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {d_modle: 8}", r"^unknown key 'd_modle'; did you mean d_model\? \(in .*config.yaml, line 1\)$"),
        ("training:\n  lerning_rate: 1", r"^unknown key 'lerning_rate'; did you mean learning_rate\? \(in .*, line 2\)$"),
        ("modle: {}", r"config.yaml: unknown key 'modle'; did you mean model\?$"),
        ("training: {learning_rate: fast}", r"^training.learning_rate must be of type float, got 'fast' \(in .*, line 1\)$"),
        ("training: {num_epochs: 1.5}", r"^training.num_epochs must be of type int, got '1.5' \(in .*config.yaml, line 1\)$"),
        ("model: {use_act: 7}", r"^model.use_act must be of type bool, got '7' \(in .*config.yaml, line 1\)$"),
        ("model: {low_rank: wide}", r"^model.low_rank must be of type int, got 'wide' \(in .*config.yaml, line 1\)$"),
        ("model: {top_k: 5}", r"config.yaml: top_k \(5\) must be <= num_experts \(4\)$"),
        ("model: {n_seq: 0}", r"config.yaml: n_seq \(0\) must be >= 1$"),
        ("model: {low_rank: 0}", r"config.yaml: low_rank \(0\) must be >= 1$"),
        ("model: {epsilon: 0}", r"config.yaml: epsilon \(0.0\) must be > 0 and finite$"),
        ("training: {learning_rate: .nan}", r"config.yaml: learning_rate \(nan\) must be > 0 and finite$"),
        ("training: {gradient_clip_norm: -1}", r"config.yaml: gradient_clip_norm \(-1.0\) must be >= 0 and finite$"),
        ("training: {save_interval: 0}", r"config.yaml: save_interval \(0\) must be >= 1$"),
        ("model: 3", r"config.yaml: model must be keys and values, got 3$"),
        ("training:", r"config.yaml: training must be keys and values, got None$"),
        ("[1, 2]", r"config.yaml: the configuration must be keys and values, got \[1, 2\]$"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(text, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_dict_is_checked_as_a_file_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^unknown key 'batch_sise'; did you mean batch_size\?$"):
        ConfigLoader.validate({"training": {"batch_sise": 4}})
    with pytest.raises(UserError, match=r"missing.yaml cannot be read: No such file"):
        ConfigLoader.load(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="must be YAML"):
        load("model: {", tmp_path)


FIT = """
model:
  class_path: ResNetBKTask
  init_args:
    network: {d_model: 24, top_k: 1}
    warmup_steps: 7
data: {class_path: TextDataModule, init_args: {batch_size: 5}}
trainer:
  max_epochs: 4
  val_check_interval: 30
  accumulate_grad_batches: 2
  precision: bf16-mixed
  callbacks:
  - class_path: ModelCheckpoint
    init_args: {every_n_train_steps: 9}
"""


def test_a_file_for_trix_fit_stands_for_both_sections(tmp_path: Path) -> None:
    config = load(FIT, tmp_path)
    assert ResNetBKConfig(**config["model"]) == ResNetBKConfig(d_model=24, top_k=1)
    of_file = {"batch_size": 5, "num_epochs": 4, "warmup_steps": 7, "gradient_accumulation_steps": 2, "mixed_precision": True}
    of_file |= {"eval_interval": 15, "save_interval": 9}
    of_fit = {"learning_rate": 2e-3, "gradient_clip_norm": 0.0, "gradient_checkpointing": False}  # the defaults there
    assert TrainingConfig(**config["training"]) == TrainingConfig(**of_file, **of_fit)


def test_the_projects_own_file_gives_a_model(tmp_path: Path) -> None:
    config = ConfigLoader.load(Path(__file__).parents[3] / "configs" / "resnet_bk.yaml")
    assert config["model"]["schatten_threshold"] is None
    assert config["training"] == {
        "batch_size": 16,
        "learning_rate": 2e-3,
        "num_epochs": 3,
        "warmup_steps": 20,
        "gradient_clip_norm": 1.0,
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 1,
        "mixed_precision": False,
        "log_interval": 10,
        "eval_interval": 100,
        "save_interval": 50,
    }
    assert LanguageModel(**config["model"] | {"vocab_size": 5}).config.num_experts == 16


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("d_model", "d_modle", r"^unknown key 'd_modle'; did you mean d_model\? \(in .*config.yaml, line 5\)$"),
        ("max_epochs", "max_epoch", r"^unknown key 'trainer.max_epoch'; did you mean max_epochs\? \(in .*, line 9\)$"),
        ("top_k: 1", "top_k: 5", r"top_k \(5\) must be <= num_experts \(4\)"),
        ("max_epochs: 4", "max_epochs: -1", r"config.yaml: num_epochs \(-1\) must be >= 1$"),
        ("ResNetBKTask", "ResNetBKTsk", r"^unknown class 'ResNetBKTsk'; did you mean ResNetBKTask\?"),
    ],
)
def test_a_file_for_trix_fit_is_checked_as_there(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(FIT.replace(old, new), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_for_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model.class_path \(lightning_modules.tasks.LanguageModelTask\) must be ResNetBKTask"
    ):
        load("model: LanguageModelTask\ndata: TextDataModule\n", tmp_path)
