import subprocess
import sys
from pathlib import Path

import exported_models
import numpy as np
import onnx
import pytest

from ort_ops.runtime import LanguageModelSession, ModelFileError, PromptError, draw
from trix.nn import FFNConfig


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_models.export(tmp_path_factory.mktemp("runtime"), FFNConfig(num_tiles=4, top_k=2)).path


@pytest.mark.parametrize("use_library", [True, False])
def test_greedy_generation_equals_the_argmax_of_torch(path: Path, tmp_path: Path, use_library: bool) -> None:
    model = exported_models.export(tmp_path, FFNConfig(num_tiles=4, top_k=2)).model
    import torch

    tokens = [0, 1, 2]
    for _ in range(20):
        tokens.append(int(model(torch.tensor([tokens[-exported_models.CONTEXT :]]))[0, -1].argmax()))
    expected = "".join(exported_models.VOCABULARY[token] for token in tokens[3:])
    session = LanguageModelSession(path, use_library=use_library)
    assert "".join(session.generate("abc", num_tokens=20, temperature=0.0)) == expected


def test_a_seed_repeats_and_threads_do_not_matter(path: Path) -> None:
    one, two = LanguageModelSession(path, num_threads=1), LanguageModelSession(path, num_threads=2)
    text = "".join(one.generate("a", 30, seed=3))
    assert text == "".join(two.generate("a", 30, seed=3))
    assert text != "".join(one.generate("a", 30, seed=4))


def test_parity_is_measured_here_and_now(path: Path) -> None:
    for use_library in (True, False):
        parity = LanguageModelSession(path, use_library=use_library).check_parity()
        assert parity.max_relative_difference < 1e-5
        assert parity.routing_agreement == 1.0
        assert parity.num_tokens == exported_models.CONTEXT


def test_runtime_imports_neither_torch_nor_onnx(path: Path) -> None:
    code = (
        "import sys; from ort_ops.runtime import LanguageModelSession; "
        f"print(''.join(LanguageModelSession({str(path)!r}).generate('abc', 5))); "
        "bad = {'torch', 'trix', 'onnx', 'lightning'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_that_are_not_models_are_named_in_one_line(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"missing\.onnx: no such file"):
        LanguageModelSession(tmp_path / "missing.onnx")
    for name, data in {"empty": b"", "garbage": b"not a model" * 50, "truncated": path.read_bytes()[:-4000]}.items():
        file = tmp_path / f"{name}.onnx"
        file.write_bytes(data)
        with pytest.raises(ModelFileError, match=f"{name}.onnx: ") as error:
            LanguageModelSession(file)
        assert "\n" not in str(error.value)


def test_a_model_of_another_origin_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy")
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [x], [y]), ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 18)]
    )
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ModelFileError, match=r"file format \(None\) must be 1: was it written by `trix export`\?"):
        LanguageModelSession(tmp_path / "other.onnx")


def test_a_model_without_portable_functions_says_what_it_needs(tmp_path: Path) -> None:
    path = exported_models.export(tmp_path, FFNConfig(num_tiles=4), fallback=False).path
    with pytest.raises(ModelFileError, match="exported without portable functions and needs the native library"):
        LanguageModelSession(path, use_library=False)


def test_wrong_input_is_refused_at_the_call(path: Path) -> None:
    session = LanguageModelSession(path)
    with pytest.raises(PromptError, match=r"the prompt holds 'é', outside the vocabulary 'abcdefghijk'"):
        session.generate("abé")
    with pytest.raises(PromptError, match="at least 1 character"):
        session.generate("")
    for arguments, message in [
        ({"num_tokens": -1}, r"num_tokens \(-1\) must be >= 0"),
        ({"temperature": -0.5}, r"temperature \(-0.5\) must be finite and >= 0"),
        ({"temperature": float("nan")}, r"temperature \(nan\) must be finite"),
        ({"top_p": 0.0}, r"top_p \(0.0\) must be > 0 and <= 1"),
        ({"seed": -1}, r"seed \(-1\) must be >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            session.generate("abc", **arguments)
    with pytest.raises(ValueError, match=r"num_threads \(0\) must be >= 1"):
        LanguageModelSession(path, num_threads=0)


def test_draw_follows_temperature_and_nucleus() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    random = np.random.default_rng(0)
    assert draw(logits, 0.0, 1.0, random) == 0
    counts = np.bincount([draw(logits, 1.0, 1.0, random) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    nucleus = np.bincount([draw(logits, 1.0, 0.75, random) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(nucleus, [0.625, 0.375, 0, 0], atol=0.03)
    assert {draw(logits, 1e-3, 1.0, random) for _ in range(50)} == {0}
