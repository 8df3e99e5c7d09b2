"""The picture of TensorBoard in the README comes from a command: its errors, and a picture where there is a browser."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

SCREENSHOT = Path(__file__).parents[2] / "benchmarks" / "screenshot.py"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def take(folder: Path, *options: str, path: str | None = None) -> "subprocess.CompletedProcess[str]":
    environment = None if path is None else {"PATH": path}
    command = [sys.executable, str(SCREENSHOT), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_without_a_browser_it_says_so(tmp_path: Path) -> None:
    result = take(tmp_path, path=str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "a browser must be on the path: chromium, chromium-browser, google-chrome, chrome\n"


def test_without_a_run_it_says_so(tmp_path: Path) -> None:
    browser = tmp_path / "bin" / "chromium"
    browser.parent.mkdir()
    browser.write_text("#!/bin/sh\n")
    browser.chmod(0o755)
    result = take(tmp_path, path=str(browser.parent))
    assert (result.returncode, result.stderr) == (1, f"folder {tmp_path} must hold TensorBoard files\n")


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium here")
def test_the_picture_shows_the_page(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path / "mine" / "version_0") as writer:
        writer.add_scalar("val/loss", 1.0, 1)
    output = tmp_path / "page.png"
    options = ("--page", "scalars", "--width", "800", "--height", "600", "--output", str(output))
    result = take(tmp_path / "mine" / "version_0", *options)
    assert result.returncode == 0, result.stderr
    picture = Image.open(output).convert("RGB")
    assert picture.size == (800, 600)
    assert picture.getpixel((5, 5)) == pytest.approx((245, 124, 0), abs=20)  # TensorBoard's orange bar, so the page was drawn
    assert output.stat().st_size < 300_000
