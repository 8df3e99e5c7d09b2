"""`trix sae tiles`: what it writes for a trained model, the line about routing, and what it refuses."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from small_runs import SENTENCE, save_checkpoint, small_network

from lightning_modules.cli import main
from lightning_modules.data.activations import ActivationDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask
from lightning_modules.tasks.sparse_autoencoder import AutoencoderConfig, SparseAutoencoderTask
from trix.nn import FFNConfig
from trix.superposition.dump import ActivationDump


def made(folder: Path, site: str, **ffn: object) -> tuple[Path, Path]:
    """Checkpoints of an autoencoder and of its model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(SENTENCE * 30)
    data = TextDataModule(path=str(folder / "text.txt"), context_length=8, batch_size=4)
    torch.manual_seed(0)
    network = small_network(ffn=FFNConfig(**{"num_tiles": 4, **ffn}))  # type: ignore[arg-type]
    model = save_checkpoint(LanguageModelTask(data.vocabulary, network), data, folder / "model.ckpt")
    arguments = ["--site", site, "--num-tokens", "1200", "--output", str(folder)]
    assert main(["dump", str(model), *arguments]) == 0
    activations = ActivationDataModule(path=str(folder / site), batch_size=64, validation_fraction=0.4)
    autoencoder = AutoencoderConfig(architecture="topk", k=24, settings={"active": 4})
    return save_checkpoint(SparseAutoencoderTask(16, autoencoder=autoencoder), activations, folder / "sae.ckpt"), model


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made(tmp_path_factory.mktemp("hidden"), "router_in.1", route_on="hidden")


def tiles(sae: Path, model: Path, output: Path, *arguments: str) -> int:
    return main(["sae", "tiles", str(sae), "--model", str(model), "--output", str(output), *arguments])


class References(HTMLParser):
    """What a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe"):
            self.found.append(tag)
        self.found += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("data:")
        ]


def test_figures_record_and_page_of_a_model_that_routes_on_hidden_states(
    hidden: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiles(*hidden, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "routed by the token alone" not in out
    record = json.loads((tmp_path / "out" / "tiles.json").read_text())
    dump = ActivationDump(hidden[0].parent / "router_in.1")
    assert record["provenance"]["activations"] == dump.manifest.identity.model_dump()
    assert record["provenance"]["model_digest"] == dump.manifest.identity.model
    assert (record["site"], record["layer"], record["decided_by"]) == ("router_in.1", 1, "hidden")
    assert record["tokens"] == len(dump)
    assert record["contingency"]["shifted_discovery_rate"] <= 0.05
    share = torch.bincount(dump.column("tile"), minlength=4) / len(dump)
    assert [reading["share"] for reading in record["tiles"]] == pytest.approx(share.tolist())
    assert record["probe"]["num_tokens"] > 0
    assert record["causal"]["tokens"] == sum(reading["causal"]["tokens"] for reading in record["tiles"])
    assert record["insertion"]["insertion"]["kl"] >= 0
    page = (tmp_path / "out" / "tiles.html").read_text()
    references = References()
    references.feed(page)
    assert references.found == []
    assert page.count('<div class="tile">') == 4
    latents = [latent["latent"] for reading in record["tiles"] for latent in reading["latents"]]
    assert latents
    for latent in latents:
        assert f"<td>{latent}</td>" in page


@pytest.mark.parametrize(
    ("route_on", "line"),
    [
        ("embedding", "routed by the token alone"),
        ("context", "routed on a code of the last tokens that no gradient moves"),
    ],
)
def test_a_model_whose_routing_reads_no_hidden_states_is_said_to(
    route_on: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae, model = made(tmp_path, "router_in.0", route_on=route_on)
    capsys.readouterr()
    assert tiles(sae, model, tmp_path / "out") == 0
    assert sum(one.startswith(line) for one in capsys.readouterr().out.splitlines()) == 1
    record = json.loads((tmp_path / "out" / "tiles.json").read_text())
    assert record["routed_by_the_token_alone"] == (route_on == "embedding")
    assert record["causal"] is record["insertion"] is None
    if route_on == "embedding":
        assert record["bits"]["tile_given_token"] == 0
        assert record["bits"]["latents"]["given_token_K"]["max"] == pytest.approx(0, abs=1e-9)
        assert record["bits"]["latents"]["tile_K"]["max"] > 0.05


def test_another_site_or_layer_has_less_and_the_output_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae, model = made(tmp_path, "resid_pre.1", route_on="hidden")
    assert tiles(sae, model, tmp_path / "a") == 0
    assert "probe, alignment and insertion are defined at router_in.1 only" in capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "tiles.json").read_text())
    assert record["probe"] is record["alignment"] is record["insertion"] is None
    assert record["causal"]["tokens"] > 0  # by running the block
    assert tiles(sae, model, tmp_path / "b", "--layer", "0") == 0
    assert "latents are of resid_pre.1, tiles of layer 0" in capsys.readouterr().out
    other = json.loads((tmp_path / "b" / "tiles.json").read_text())
    assert other["causal"] is None
    assert other["layer"] == 0
    assert [one["share"] for one in other["tiles"]] != [one["share"] for one in record["tiles"]]


def test_the_same_seed_gives_the_same_record(hidden: tuple[Path, Path], tmp_path: Path) -> None:
    records = []
    for name in ("a", "b"):
        assert tiles(*hidden, tmp_path / name, "--num-tokens", "400") == 0
        records.append(json.loads((tmp_path / name / "tiles.json").read_text()))
    first, second = (record.pop("provenance") for record in records)
    assert records[0] == records[1]
    assert records[0]["tokens"] <= 400
    assert {name for name in first if first[name] != second[name]} <= {"command", "date"}
    assert first["command"][-2:] == ["--num-tokens", "400"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-tokens", "0"], "--num-tokens (0) must be >= 1"),
        (["--seed", "-1"], "--seed (-1) must be >= 0"),
        (["--output", "n" * 300], "File name too long"),
        (["--layer", "-1"], "--layer (-1) must be >= 0"),
        (["--layer", "2"], "layer (2) must be >= 0 and < number of layers (2)"),
        (["--num-tokens", "8"], "number of documents (1) >= 2"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    hidden: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiles(*hidden, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_model_and_a_file_in_the_way_are_refused(
    hidden: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, other = made(tmp_path / "other", "router_in.1", route_on="hidden", num_tiles=8)
    capsys.readouterr()
    assert tiles(hidden[0], other, tmp_path / "out") == 2
    assert "must be that of the model whose activations" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert tiles(*hidden, tmp_path / "file") == 2
    assert f"output {tmp_path / 'file'} must be a folder" in capsys.readouterr().err


def test_a_transcoder_is_refused(hidden: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = hidden[1]
    assert (
        main(["dump", str(model), "--site", "router_in.1", "ffn_out.1", "--num-tokens", "600", "--output", str(tmp_path)]) == 0
    )
    data = ActivationDataModule(
        path=str(tmp_path / "router_in.1"), target=str(tmp_path / "ffn_out.1"), batch_size=64, validation_fraction=0.4
    )
    autoencoder = AutoencoderConfig(architecture="transcoder", k=24, settings={"active": 4})
    sae = save_checkpoint(SparseAutoencoderTask(16, autoencoder=autoencoder), data, tmp_path / "sae.ckpt")
    capsys.readouterr()
    assert tiles(sae, model, tmp_path / "out") == 2
    assert "must reconstruct the activations that it reads, which a transcoder does not" in capsys.readouterr().err


def test_cards_of_the_inspected_layer_show_the_latents_that_go_with_each_tile(
    hidden: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae, model = hidden
    assert main(["inspect", str(model), "--sae", str(sae), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    before, _, after = page.partition('id="layer-1"')
    assert before.count("latents of router_in.1 that go with it") == 0
    assert after.count("latents of router_in.1 that go with it") == 4
    assert "active on" in after
    _, other = made(tmp_path / "other", "router_in.1", route_on="hidden", num_tiles=8)
    capsys.readouterr()
    assert main(["inspect", str(other), "--sae", str(sae), "--output", str(tmp_path / "no.html")]) == 2
    assert "must be that of the model whose activations" in capsys.readouterr().err
    assert not (tmp_path / "no.html").exists()
