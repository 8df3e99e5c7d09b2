"""`trix sae dashboard`: the page of a trained autoencoder, the figures on it, and what it refuses."""

import html
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pandas")

import torch
from small_dumps import contents
from small_runs import save_checkpoint, small_network

from lightning_modules.cli import main
from lightning_modules.commands import sae_dashboard
from lightning_modules.commands.sae import ACTIONS
from lightning_modules.data.activations import ActivationDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import AutoencoderConfig, LanguageModelTask, SparseAutoencoderTask, load_autoencoder
from trix.superposition.backends.io_store import read_column
from trix.superposition.dump import ActivationDump

TEXT = "if a < b & b > c: </script><script>alert('x')</script> 0123\n"
K = 24
RUN = ("sae", "dashboard")


def language_model(folder: Path, name: str, seed: int) -> Path:
    (folder / "text.txt").write_text(TEXT * 30)
    data = TextDataModule(path=str(folder / "text.txt"), context_length=8, batch_size=4)
    torch.manual_seed(seed)
    return save_checkpoint(LanguageModelTask(data.vocabulary, small_network()), data, folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.ckpt, another model other.ckpt, dumps of three sites, autoencoders of two of them, sae.ckpt and router.ckpt, and a
    transcoder from the second to the third, layer.ckpt.
    """
    folder = tmp_path_factory.mktemp("sae")
    model = language_model(folder, "model.ckpt", 0)
    language_model(folder, "other.ckpt", 1)
    sites = ["resid_pre.1", "router_in.1", "ffn_out.1"]
    arguments = ["--num-tokens", "1200", "--shard-tokens", "500", "--dtype", "fp32"]
    assert main(["dump", str(model), "--site", *sites, "--output", str(folder), *arguments]) == 0
    for site, name in zip(sites[:2], ("sae", "router"), strict=True):
        data = ActivationDataModule(str(folder / site), batch_size=200, validation_fraction=0.2)
        torch.manual_seed(0)
        main_one, control = AutoencoderConfig("topk", K, {"active": 3}), AutoencoderConfig("standard", 8)
        save_checkpoint(
            SparseAutoencoderTask(16, autoencoder=main_one, others={"small": control}), data, folder / f"{name}.ckpt"
        )
    data = ActivationDataModule(*(str(folder / site) for site in sites[1:]), batch_size=200, validation_fraction=0.2)
    layer = SparseAutoencoderTask(16, autoencoder=AutoencoderConfig("transcoder", 8, {"active": 3}))
    save_checkpoint(layer, data, folder / "layer.ckpt")
    return folder


def run(folder: Path, *arguments: str, name: str = "sae", model: str = "model") -> int:
    return main([*RUN, str(folder / f"{name}.ckpt"), "--model", str(folder / f"{model}.ckpt"), *arguments])


def section(page: str, latent: int) -> str:
    found = re.search(rf'<section id="l{latent}">.*?</section>', page, re.DOTALL)
    assert found is not None
    return found[0]


def test_the_page_says_what_the_dump_and_the_weights_say(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "page.html"
    assert run(folder, "--output", str(output)) == 0
    assert capsys.readouterr().out == f"wrote   {output}  (open it in a browser)\n"
    page = output.read_text()
    dump, sae = ActivationDump(folder / "resid_pre.1"), load_autoencoder(folder / "sae.ckpt")
    acts_ND = torch.cat([read_column(path, "acts") for path in dump.paths])
    with torch.no_grad():
        z_NK = sae.encode(acts_ND)
    share_K = (z_NK > 0).double().mean(dim=0)
    mass_K = z_NK.double().sum(dim=0) * sae.W_dec.detach().double().norm(dim=-1)
    model = LanguageModelTask.load_from_checkpoint(folder / "model.ckpt", weights_only=True)
    row_KO = sae.W_dec.detach().double()
    unit_KO = row_KO / row_KO.square().mean(dim=-1, keepdim=True).sqrt()
    logit_KV = (unit_KO * model.network.norm.weight.double()) @ model.network.head.weight.double().t()
    for latent in range(K):
        card = section(page, latent)
        if share_K[latent] == 0:
            assert f"Dead: it fires at none of {len(dump):,} tokens." in card
            continue
        percent, part = f"{100 * share_K[latent]:.3g} %", f"{100 * mass_K[latent] / mass_K.sum():.3g} %"
        assert f"Fires on {percent} of the tokens ({int((z_NK[:, latent] > 0).sum()):,}); {part} of the mass" in card
        values = re.findall(r"</code> ([+-][\d.e-]+)</li>", card)
        expected = logit_KV[latent].sort(descending=True)
        largest = [*expected.values[:10].tolist(), *expected.values.flip(0)[:10].tolist()]
        assert [float(value) for value in values] == pytest.approx(largest, rel=6e-3, abs=1e-5)
        best = model.vocabulary[int(expected.indices[0])].replace(" ", "␣").replace("\n", "⏎")
        assert f"<h4>Largest logits</h4><ol><li><code>{html.escape(best)}</code>" in card
    assert f"<dt>active latents per token</dt><dd>{float(share_K.sum()):.2f}</dd>" in page
    assert f"<dt>digest of the model</dt><dd>{dump.manifest.identity.model}</dd>" in page
    assert "<h4>Tiles</h4>" in page
    x_ND = torch.cat([x for x, _ in ActivationDataModule(str(folder / "resid_pre.1"), None, 200, 0.2).val_dataloader()])
    with torch.no_grad():
        error = (sae(x_ND)[0] - x_ND).double().square().sum() / (x_ND - x_ND.mean(dim=0)).double().square().sum()
    found = re.search(r"explained variance</dt><dd>(-?[\d.]+) \(on the ([\d,]+) tokens", page)
    assert found is not None
    assert float(found[1]) == pytest.approx(float(1 - error), abs=1e-4)
    assert int(found[2].replace(",", "")) == len(x_ND)


def test_one_closed_file_whose_texts_are_escaped(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "--output", str(tmp_path / "page.html")) == 0
    page = (tmp_path / "page.html").read_text()
    assert re.search(r"https?:|\ssrc=|<link|@import|url\(", page) is None
    assert page.count("<script") == 1
    assert "&lt;" in page
    assert "&amp;" in page
    assert contents(tmp_path).keys() == {"page.html"}


def test_the_same_command_writes_the_same_page_over_an_old_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [tmp_path / f"{number}.html" for number in range(3)]
    pages[1].write_text("old " * 10**6)
    for output, seed in zip(pages, ("0", "0", "7"), strict=True):
        assert run(folder, "--num-latents", "9", "--seed", seed, "--output", str(output)) == 0
    first, second, third = (output.read_text() for output in pages)
    assert first == second
    shown = [re.findall(r'<section id="l(\d+)"', page) for page in (first, third)]
    assert [len(latents) for latents in shown] == [9, 9]
    assert shown[0] != shown[1]
    assert f"9 of {K} latents, drawn at random." in first
    monkeypatch.setattr(sae_dashboard, "_page", lambda *_: "new \ud800")  # no text that can be written
    assert run(folder, "--output", str(pages[0])) == 2
    assert pages[0].read_text() == first


def test_the_latents_and_examples_that_were_asked_for(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    assert run(folder, "--latents", "5, 1,5", "--examples", "2", "--output", str(output)) == 0
    page = output.read_text()
    assert re.findall(r'<section id="l(\d+)"', page) == ["1", "5"]
    groups = re.split(r"<h4>(?:top|\d+-\d+ %)", section(page, 1) + section(page, 5))[1:]
    assert max(group.count('class="passage"') for group in groups) == 2


def test_another_autoencoder_of_the_run_and_another_site(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    assert run(folder, "--autoencoder", "small", "--output", str(output)) == 0
    assert f"<dd>small of {folder / 'sae.ckpt'}</dd>" in output.read_text()
    assert "standard, 8 latents of width 16" in output.read_text()
    assert run(folder, "--output", str(output), name="router") == 0
    assert "<dd>router_in.1</dd>" in output.read_text()
    assert "There are no logits" in output.read_text()
    assert run(folder, "--output", str(output), name="layer") == 0
    assert "<dt>site</dt><dd>router_in.1</dd><dt>writes</dt><dd>ffn_out.1</dd>" in output.read_text()
    assert "<h4>Largest logits</h4>" in output.read_text()


def test_the_default_page_lies_next_to_the_checkpoint(folder: Path) -> None:
    assert run(folder, "--latents", "0") == 0
    (folder / "sae_latents.html").unlink()


def test_the_group_names_its_actions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sae"]) == 0
    assert re.search(r"^ +dashboard\s+write one HTML page", capsys.readouterr().out, re.MULTILINE)
    assert main(["sae", "dashbord"]) == 2
    assert "action (dashbord) of `trix sae` must be one of" in capsys.readouterr().err
    for action in ACTIONS:
        assert action.module.make_parser().prog == f"trix sae {action.name}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latents", f"1,{K}"], f"latent ({K}) must be >= 0 and < k ({K})"),
        (["--latents", "1,-2"], "--latents (1,-2) must be numbers >= 0 with commas between them, as 1,5,9: '-2' is none"),
        (["--latents", ""], "--latents () must be numbers >= 0"),
        (["--latents", "1", "--num-latents", "4"], "give one of the two"),
        (["--num-latents", "0"], "--num-latents (0) must be >= 1"),
        (["--num-latents", "5000"], "--num-latents (5000) must be <= 4096"),
        (["--examples", "0"], "--examples (0) must be >= 1"),
        (["--examples", "1000000000"], "--examples (1000000000) must be <= 100"),
        (["--seed", "-1"], "--seed (-1) must be >= 0"),
        (["--autoencoder", "big"], "--autoencoder (big) must be one of sae, small"),
        (["--output", "."], "must be a file, not a directory"),
    ],
)
def test_bad_arguments_are_named(
    folder: Path, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "page.html")]
    assert run(folder, *arguments, *output) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert contents(tmp_path) == {}


def test_what_does_not_belong_together_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ("--output", str(tmp_path / "page.html"))
    digest = ActivationDump(folder / "resid_pre.1").manifest.identity.model
    for arguments, message in (
        ({"model": "other"}, f"must be that of the model whose activations {folder / 'sae.ckpt'} learned from ({digest[:12]})"),
        ({"name": "model"}, "task ('language_model') must be sparse_autoencoder"),
        ({"name": "none"}, "none.ckpt cannot be read: No such file"),
    ):
        assert run(folder, *output, **arguments) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    moved = tmp_path / "moved"
    shutil.move(folder / "resid_pre.1", moved)
    try:
        assert run(folder, *output) == 2
        line = f"dump {folder / 'resid_pre.1'}, which {folder / 'sae.ckpt'} learned from, is not there: --dump DIR says where"
        assert line in capsys.readouterr().err
    finally:
        shutil.move(moved, folder / "resid_pre.1")
    assert contents(tmp_path) == {}
