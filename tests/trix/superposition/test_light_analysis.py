import subprocess
import sys


def test_analysis_and_merging_load_their_heavy_libraries_when_they_need_them() -> None:
    code = (
        "import sys, trix.superposition.analysis, trix.superposition.evaluation, trix.superposition.merge; print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert {"pandas", "sklearn", "umap", "pydantic", "transformers"} & set(result.stdout.split()) == set()
