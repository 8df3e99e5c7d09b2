"""What a checkpoint says about the file system: names count, paths do not, and nothing of the user's is removed or replaced."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

from lightning_modules.cli import main
from lightning_modules.whole_files import WholeFileCheckpointIO

RUN = Path("runs/small")
LAST = RUN / "version_0/checkpoints/last.ckpt"
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and a folder of the user's next to it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    (folder / "precious/inner").mkdir(parents=True)
    (folder / "precious/best.ckpt").write_text("of another run")
    (folder / "precious/inner/thesis.txt").write_text("years of work")
    network = {"d_model": 8, "num_layers": 1, "n_heads": 1, "context_length": 8, "ffn": {"num_tiles": 2}}
    content = {
        "model": {"class_path": "LanguageModelTask", "init_args": {"network": network}},
        "data": {"class_path": "TextDataModule", "init_args": {"path": "text.txt", "context_length": 8, "batch_size": 2}},
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "val_check_interval": 1,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 1,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "small"}},
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"filename": "best", "monitor": "val/loss"}}],
        },
        "report": {"num_tokens": 0},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "small.yaml"]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path | str) -> dict[str, bytes]:
    """Of a folder, or of one file."""
    return {str(path): path.read_bytes() for path in [Path(folder), *Path(folder).rglob("*")] if path.is_file()}


def change(path: Path, edit: Change) -> None:
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path)


def model_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = next(value for key, value in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
    return state


def all_paths_to(target: str, dirpath: str) -> Change:
    def edit(checkpoint: dict[str, Any]) -> None:
        # Any validation is better than this one, so that the first of them removes what is named here.
        worst = torch.tensor(1e9)
        state = model_checkpoint(checkpoint)
        state |= {"best_k_models": {target: worst}, "kth_best_model_path": target, "best_model_path": target}
        state |= {"last_model_path": target, "kth_value": worst, "best_model_score": worst, "dirpath": dirpath}

    return edit


@pytest.mark.parametrize("dirpath", ["runs/small/version_1/checkpoints", "{run}/precious"])  # the first is the callback's own
@pytest.mark.parametrize(
    "target",
    [
        "runs/small/version_1/checkpoints/../../../../precious",
        "{run}/runs/small/version_1/checkpoints/../../../../precious/best.ckpt",
        "precious/inner",
        "..",
    ],
)
def test_a_checkpoint_removes_nothing_of_the_users(run: Path, target: str, dirpath: str) -> None:
    before, kept = contents("precious"), contents(RUN / "version_0/checkpoints/best.ckpt")
    change(LAST, all_paths_to(target.format(run=run), dirpath.format(run=run)))
    assert main(["fit", "--resume", str(RUN), "--trainer.max_steps", "4"]) == 0
    assert contents("precious") == before
    assert contents(RUN / "version_0/checkpoints/best.ckpt") == kept


def test_files_of_a_given_folder_are_neither_replaced_nor_removed(run: Path) -> None:
    # The configuration itself sends the checkpoints to a folder in which there are others.
    config = RUN / "version_0/config.yaml"
    config.write_text(config.read_text().replace("dirpath: null", f"dirpath: {run}/precious"))
    before = contents("precious")
    change(LAST, all_paths_to(f"{run}/precious/best.ckpt", f"{run}/precious"))
    assert main(["fit", "--resume", str(RUN), "--trainer.max_steps", "4"]) == 0
    assert contents("precious").items() >= before.items()


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.csv"])
def test_a_run_folder_does_not_send_logs_to_a_folder_that_is_there(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "precious" / name).write_text("kept")
    config = RUN / "version_0/config.yaml"
    text = config.read_text().replace("name: small", "name: precious").replace("version: null", "version: ''")
    config.write_text(text.replace("save_dir: runs", "save_dir: ."))
    before = contents("precious")
    assert main(["fit", "--resume", str(RUN), "--trainer.max_steps", "4"]) == 2
    assert f"must be new, it holds {name}" in capsys.readouterr().err
    assert contents("precious") == before


def test_a_run_folder_chooses_no_writer_of_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RUN / "version_0/config.yaml"
    plugin = "plugins:\n  - class_path: lightning.pytorch.plugins.io.TorchCheckpointIO"
    config.write_text(config.read_text().replace("plugins: null", plugin))
    assert main(["fit", "--resume", str(RUN), "--trainer.max_steps", "4"]) == 2
    assert "trainer.plugins (TorchCheckpointIO) must hold no CheckpointIO" in capsys.readouterr().err


def test_a_lone_checkpoint_names_no_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("evil").mkdir()
    Path("evil/config.yaml").write_text("model: os.system\n")
    Path("alone").mkdir()
    for folder in ("evil", str(run / "evil"), "../evil", "alone/../evil"):
        lone = Path("alone/model.ckpt")
        lone.write_bytes(LAST.read_bytes())
        change(lone, lambda checkpoint, folder=folder: checkpoint["callbacks"]["RunRecord"].update(folder=folder))  # type: ignore[misc]
        assert main(["fit", "--resume", str(lone)]) == 2
        error = capsys.readouterr().err
        assert "its run has left no config.yaml there: --config FILE gives the configuration" in error


WRONG_STATES: dict[str, Change] = {
    "no paths": lambda checkpoint: model_checkpoint(checkpoint).clear(),
    "paths are numbers": lambda checkpoint: model_checkpoint(checkpoint).update(best_k_models={3: 4}, best_model_path=5),
    "random state": lambda checkpoint: checkpoint["callbacks"]["RandomState"].update(processes=[{"torch": 3}]),
    "no random state": lambda checkpoint: checkpoint["callbacks"].update(RandomState={"other": 1}),
    "callback": lambda checkpoint: checkpoint["callbacks"].update(RunNotebook=[1, 2]),
    "loops": lambda checkpoint: checkpoint["loops"].update(fit_loop={"state_dict": 3}),
    "loader": lambda checkpoint: checkpoint["loops"]["fit_loop"]["state_dict"].update(combined_loader=[{"epoch": "one"}]),
    "optimizer": lambda checkpoint: checkpoint.update(optimizer_states=[{"state": {0: 3}, "param_groups": []}]),
    "schedule": lambda checkpoint: checkpoint.update(lr_schedulers=[3]),
    "moments": lambda checkpoint: checkpoint["optimizer_states"][0]["state"][0].update(exp_avg=torch.ones(3, 3)),
    "learning rate": lambda checkpoint: checkpoint["optimizer_states"][0]["param_groups"][0].update(lr="x"),
    "schedule's step": lambda checkpoint: checkpoint["lr_schedulers"][0].update(step=3),
    "scores": lambda checkpoint: model_checkpoint(checkpoint).update(kth_value="x"),
}


@pytest.mark.parametrize("edit", WRONG_STATES.values(), ids=WRONG_STATES)
def test_a_state_that_does_not_fit_is_told_in_one_line(
    run: Path, edit: Change, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(LAST, edit)
    capsys.readouterr()
    code = main(["fit", "--resume", str(RUN), "--trainer.max_steps", "4"])
    error = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "\n".join(error)
    # A ModelCheckpoint without its files starts anew; all else is an error.
    assert code in (0, 2)
    if code == 2:
        assert error[-1].startswith(f"trix: error: {LAST}: ")
    else:
        assert edit in (WRONG_STATES["no paths"], WRONG_STATES["paths are numbers"], WRONG_STATES["scores"])
        return
    # Nothing is left that the next start would go on from.
    assert not list(RUN.glob("version_1/checkpoints/*.ckpt"))


def test_the_writer_removes_regular_checkpoints_of_its_own_folder_alone(tmp_path: Path) -> None:
    io = WholeFileCheckpointIO()
    own, foreign = tmp_path / "own", tmp_path / "foreign"
    foreign.mkdir()
    for name in ("a", "b"):
        io.save_checkpoint({"x": torch.ones(1)}, own / f"{name}.ckpt")
    (own / "earlier.ckpt").write_text("kept")
    (foreign / "b.ckpt").write_text("kept")
    (own / "notes.txt").write_text("kept")
    (own / "folder.ckpt").mkdir()
    (own / "folder.ckpt/inner").write_text("kept")
    (own / "link.ckpt").symlink_to(own / "b.ckpt")
    (own / "way").symlink_to(foreign)
    for path in (
        "own/earlier.ckpt",
        "own/notes.txt",
        "own/folder.ckpt",
        "own/link.ckpt",
        "foreign/b.ckpt",
        "own/../foreign/b.ckpt",
        "own/way/b.ckpt",
    ):
        with pytest.warns(UserWarning, match="is left as it is"):
            io.remove_checkpoint(tmp_path / path)
        assert (tmp_path / path).exists()
    io.remove_checkpoint(own / "missing.ckpt")
    io.adopt(own / "earlier.ckpt")
    io.remove_checkpoint(own / "earlier.ckpt")
    assert not (own / "earlier.ckpt").exists()
    io.remove_checkpoint(own / "a.ckpt")
    assert not (own / "a.ckpt").exists()
