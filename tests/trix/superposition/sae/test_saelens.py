"""Our files in the real SAELens, and back: `make test-saelens` runs these in an environment of their own."""

from pathlib import Path

import pytest
import torch
from small_autoencoders import SETTINGS, WIDTH, small_autoencoder

from trix.superposition.sae import load_sae, save_sae

sae_lens = pytest.importorskip("sae_lens")


@pytest.mark.parametrize("name", SETTINGS)
def test_the_real_saelens_does_the_same_with_our_files_and_we_with_its(name: str, tmp_path: Path) -> None:
    ours = small_autoencoder(name)
    save_sae(ours, tmp_path / "ours")
    kind = sae_lens.JumpReLUTranscoder if name == "transcoder" else sae_lens.SAE
    theirs = kind.load_from_disk(str(tmp_path / "ours"))
    theirs.save_model(str(tmp_path / "theirs"))
    again = load_sae(tmp_path / "theirs")
    assert type(again) is type(ours)
    x = torch.randn(50, WIDTH)
    with torch.no_grad():
        x_hat, z = ours(x)
        for other in (theirs, again):
            assert torch.allclose(other.encode(x), z, atol=1e-5)
            assert torch.allclose(other.decode(z), x_hat, atol=1e-5)
