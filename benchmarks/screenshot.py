"""Take a picture of a page of TensorBoard, as a reader of a run sees it.

python benchmarks/screenshot.py runs/digits/version_0                                    # benchmarks/results/tensorboard.png
python benchmarks/screenshot.py runs --page custom_scalars --output custom_scalars.png   # all runs

Needs Chromium or Chrome; `make screenshot` trains the run, too.
"""

import argparse
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from trix.whole_file import write_whole

HERE = Path(__file__).resolve().parent
EVENT_FILES = "events.out.tfevents.*"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PAGES = ("timeseries", "scalars", "custom_scalars", "images", "histograms", "text", "hparams", "projector")
COLOURS = 256  # of the palette: a page is mostly plain areas


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run, or a folder of runs")
    parser.add_argument("--page", choices=PAGES, default="images", help="default: %(default)s")
    parser.add_argument("--query", default="", help="settings of the page, as they stand in its address between ? and #")
    parser.add_argument("--width", type=int, default=1060, help="pixels (default: %(default)s)")
    parser.add_argument("--height", type=int, default=1600, help="pixels (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "tensorboard.png", help="default: %(default)s")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"a browser must be on the path: {', '.join(BROWSERS)}", file=sys.stderr)
        return 1
    if next(arguments.folder.rglob(EVENT_FILES), None) is None:
        print(f"folder {arguments.folder} must hold TensorBoard files", file=sys.stderr)
        return 1
    with tensorboard(arguments.folder) as address:
        content = picture(browser, f"{address}/?{arguments.query}#{arguments.page}", arguments.width, arguments.height)
    write_whole(content, arguments.output)
    print(f"{arguments.output}: {len(content) / 1024:.0f} KB")
    return 0


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """TensorBoard on the folder, on a free port of this machine; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    is_run = next(folder.glob(EVENT_FILES), None) is not None
    with tempfile.TemporaryDirectory() as root:
        # The page shows the path of its folder, and calls a run that is the whole folder ".": here they are runs, runs/NAME.
        link = Path(root, "runs", folder.resolve().parent.name) if is_run else Path(root, "runs")
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(folder.resolve())
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", str(port), "--load_fast", "false"]
        server = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(f"http://127.0.0.1:{port}/data/runs", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=30)


def wait_for(address: str, server: "subprocess.Popen[bytes]", seconds: float = 60.0) -> None:
    """Until the server has read its first run.

    Raises:
        RuntimeError: it ended, or it takes longer.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5) as reply:
                if reply.read().strip() not in (b"", b"[]"):
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.5)
    raise RuntimeError(f"tensorboard did not read its runs within {seconds:.0f} s")


def picture(browser: str, address: str, width: int, height: int, seconds: float = 120.0) -> bytes:
    """The page as a PNG file of few colours.

    Raises:
        RuntimeError: the browser made none.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.png"
        command = [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},{height}",
            "--virtual-time-budget=20000",
            f"--screenshot={path}",
            address,
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
        if not path.is_file():
            raise RuntimeError(f"{browser} took no picture of {address}")
        content = io.BytesIO()
        Image.open(path).convert("RGB").quantize(COLOURS).save(content, format="png", optimize=True)
        return content.getvalue()


if __name__ == "__main__":
    sys.exit(main())
