"""Every YAML under configs/ runs for one batch, by the command that it opens with."""

import re
import shlex
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.strategies import DDPStrategy
from small_dumps import small_dump

from lightning_modules.callbacks.run_record import read_metrics
from lightning_modules.cli import main
from lightning_modules.commands.surgery import is_equal
from lightning_modules.data import corpora
from trix.nn import FFNConfig, RoutedLayer, TriXBlock

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
# What starts further processes; a run of two is tests/lightning_modules/test_scale_out.py.
SEVERAL_PROCESSES = sorted((CONFIGS / "trainer").glob("*.yaml"))
OF_ONE_PROCESS = [path for path in FILES if path not in SEVERAL_PROCESSES]


def opening_command(path: Path) -> list[str]:
    """The arguments of the `trix` command in a file's first line."""
    match = re.fullmatch(r"# trix (.*)", path.read_text().splitlines()[0])
    assert match, f"{path} must open with its command"
    return shlex.split(match[1])


def test_there_are_configs() -> None:
    assert {"char_lm.yaml", "digits.yaml", "language_id.yaml"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", OF_ONE_PROCESS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = opening_command(path)
    assert str(path.relative_to(CONFIGS.parent)) in arguments
    stand_in = tmp_path / "stand_in.txt"
    stand_in.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    monkeypatch.setattr(corpora, "fetch", lambda _file: stand_in)  # nothing is downloaded in tests
    monkeypatch.chdir(tmp_path)
    if "--data.path" in arguments:  # of a dump, which another command writes
        folder = Path(arguments[arguments.index("--data.path") + 1])
        small_dump(folder.parent, (folder.name,))
    before = sorted(tmp_path.rglob("*"))
    arguments = [str(CONFIGS.parent / text) if text.startswith("configs/") else text for text in arguments]
    assert main([*arguments, "--trainer.fast_dev_run=1", "--data.batch_size=2"]) == 0
    assert sorted(tmp_path.rglob("*")) == before  # a trial leaves nothing


@pytest.mark.parametrize("name", ["diversity", "evolution", "surgery"])
def test_callbacks_that_change_signatures_come_with_signatures_that_learn(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = opening_command(CONFIGS / "callbacks" / f"{name}.yaml")
    arguments = [str(CONFIGS.parent / text) if text.startswith("configs/") else text for text in command]
    assert main([*arguments, "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["network"]["ffn"]
    layer = FFNConfig(**settings).build(16)
    assert isinstance(layer, RoutedLayer)
    assert not layer.router.frozen_tiles().any()


@pytest.mark.parametrize("name", ["char_lm", "digits", "language_id"])
def test_experiments_keep_all_they_write_in_one_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    interval = ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"]
    small = ["--model.network.d_model=16", "--model.network.num_layers=1", "--data.batch_size=2"]
    assert main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--trainer.max_steps=1", *interval, *small]) == 0
    assert [item.name for item in tmp_path.iterdir()] == ["runs"]
    run = tmp_path / "runs" / name / "version_0"
    assert {item.name for item in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {item.name for item in run.iterdir()} >= {"config.yaml", "environment.json", "metrics.csv", "report.html"}
    out = capsys.readouterr().out
    assert f"checkpoint   runs/{name}/version_0/checkpoints/best.ckpt (val/" in out
    assert out.endswith(f"report       runs/{name}/version_0/report.html\n")


@pytest.mark.parametrize("path", SEVERAL_PROCESSES, ids=lambda path: path.name)
def test_a_trainer_of_several_processes_can_be_made(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(CONFIGS.parent / text) if text.startswith("configs/") else text for text in opening_command(path)]
    assert str(path) in arguments
    stand_in = tmp_path / "stand_in.txt"
    stand_in.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    monkeypatch.setattr(corpora, "fetch", lambda _file: stand_in)
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)["trainer"]
    if settings["strategy"] == "fsdp":  # as far as it goes without a GPU
        assert main([*arguments, "--trainer.accelerator=cpu", "--trainer.devices=2"]) == 2
        assert "strategy `fsdp` requires a GPU accelerator" in capsys.readouterr().err
        return
    devices = 2 if settings["devices"] == -1 else settings["devices"]
    trainer = L.Trainer(accelerator="cpu", strategy=settings["strategy"], devices=devices, num_nodes=settings["num_nodes"])
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.world_size == (16 if path.stem == "multi_node" else 2)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_of_resnet_bk(("model:", "model:"), tmp_path_factory.mktemp("before"), monkeypatch)


def run_of_resnet_bk(change: tuple[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a short run of configs/resnet_bk.yaml leaves, with one of its lines changed."""
    num_forwards, forward = 0, TriXBlock.forward

    def counted(block: TriXBlock, *args: Any, **settings: Any) -> Any:
        nonlocal num_forwards
        num_forwards += block.training
        return forward(block, *args, **settings)

    text = (CONFIGS / "resnet_bk.yaml").read_text()
    for before, after in [
        ("every_n_train_steps: 50", "every_n_train_steps: 3"),
        ("warmup_steps: 20", "warmup_steps: 2"),
        change,
    ]:
        assert before in text
        text = text.replace(before, after)
    (folder / "config.yaml").write_text(text)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 100)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(TriXBlock, "forward", counted)
    small = {"d_model": 16, "n_layers": 1, "n_seq": 16, "num_experts": 4, "low_rank": 2, "n_heads": 2}
    arguments = ["fit", "--config=config.yaml", "--data.path=text.txt", "--data.context_length=16", "--trainer.max_steps=8"]
    arguments += [f"--model.network.{key}={value}" for key, value in small.items()]
    assert main(arguments) == 0
    run = folder / "runs" / "resnet_bk" / "version_0"
    rows = read_metrics(run / "metrics.csv")
    saved, last = (torch.load(run / "checkpoints" / name, weights_only=True) for name in ("saved.ckpt", "last.ckpt"))
    return {
        "weights": last["state_dict"],
        "saved": saved["global_step"],
        "logged": [row["step"] for row in rows if "train/loss" in row],
        "evaluated": [row["step"] for row in rows if "val/loss" in row],
        "forwards": num_forwards,
    }


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (("gradient_checkpointing: false", "gradient_checkpointing: true"), {"forwards"}),
        (("precision: 32-true", "precision: bf16-mixed"), {"weights"}),
        (("every_n_train_steps: 3", "every_n_train_steps: 5"), {"saved"}),
        (("val_check_interval: 100", "val_check_interval: 4"), {"evaluated"}),
        (("log_every_n_steps: 10", "log_every_n_steps: 2"), {"logged"}),
        (("gradient_clip_val: 1.0", "gradient_clip_val: 0.01"), {"weights"}),
        (("accumulate_grad_batches: 1", "accumulate_grad_batches: 2"), {"weights", "forwards"}),
        (("warmup_steps: 2", "warmup_steps: 0"), {"weights"}),
        (("learning_rate: 2e-3", "learning_rate: 1e-3"), {"weights"}),
        (("batch_size: 16", "batch_size: 8"), {"weights"}),
    ],
    ids=lambda value: value[0].split(":")[0] if isinstance(value, tuple) else "",
)
def test_the_keys_of_resnet_bk_change_the_run(
    change: tuple[str, str], changed: set[str], before: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = run_of_resnet_bk(change, tmp_path, monkeypatch)
    assert {name for name in before if not is_equal(before[name], after[name])} == changed
    assert (before["saved"], before["forwards"]) == (6, 8)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.network.epsilon=0", "epsilon (0.0) must be > 0 and finite"),
        ("model.network.top_k=17", "top_k (17) must be <= num_experts (16)"),
        ("model.network.n_seq=0", "n_seq (0) must be >= 1"),
        ("model.network.n_seq=64", "data.context_length (128) must be <= network.n_seq (64)"),
        ("model.network.n_heads=7", "d_model (128) must be divisible by n_heads (7)"),
        ("model.network.attention_at=[4]", "attention_at ([4]) must be >= 0 and < n_layers (4)"),
        ("model.network.schatten_threshold=0", "schatten_threshold (0.0) must be > 0 and finite, or None for no limit"),
        ("model.network.hopping=two_sided", "hopping ('two_sided') must be one of hermitian, one_way"),
        ("model.network.num_expert=4", "did you mean --model.network.num_experts?"),
        ("model.learning_rate=0", "learning_rate (0.0) must be > 0 and finite"),
        ("model.lerning_rate=1", "unknown key 'lerning_rate'; did you mean learning_rate?"),
        ("model.learning_rate=fast", "learning_rate must be of type float, got 'fast'"),
    ],
)
def test_bad_settings_of_resnet_bk_are_told_in_a_line_and_write_nothing(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", str(CONFIGS / "resnet_bk.yaml"), f"--{argument}"]) == 2
    assert message in capsys.readouterr().err.rstrip("\n").splitlines()[0]
    assert list(tmp_path.iterdir()) == []
