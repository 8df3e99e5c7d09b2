"""What one thread of this CPU can do at most, measured by `native/limits.cpp`."""

import os
import subprocess
import tempfile
from pathlib import Path


def limits() -> dict[str, float] | None:
    """Multiply-adds of int8, with VNNI and with AVX2 (0 without), and bytes read, per second; None without a compiler."""
    compiler = os.environ.get("CXX", "c++")
    source = Path(__file__).resolve().parent / "native" / "limits.cpp"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        try:
            subprocess.run([compiler, "-O3", "-std=c++17", "-o", str(program), str(source)], check=True, capture_output=True)
            output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None
    products, avx2_products, read = map(float, output.split())
    return {"int8_products_per_s": products, "avx2_products_per_s": avx2_products, "bytes_read_per_s": read}
