import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import exported_models
import numpy as np
import onnx
import pytest

from ort_ops.runtime import LanguageModelSession, ModelFileError, PromptError, draw
from trix.nn import FFNConfig

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_models.export(tmp_path_factory.mktemp("runtime"), exported_models.TOP2, num_layers=2).path


@pytest.mark.parametrize("use_library", [True, False])
def test_greedy_generation_equals_the_argmax_of_torch(path: Path, tmp_path: Path, use_library: bool) -> None:
    model = exported_models.make_model(exported_models.TOP2, num_layers=2)
    import torch

    tokens, start = [0, 1, 2], 0
    for _ in range(30):
        if len(tokens) - start > exported_models.CONTEXT:
            start = len(tokens) - exported_models.CONTEXT // 2
        tokens.append(int(model(torch.tensor([tokens[start:]]))[0, -1].argmax()))
    expected = "".join(exported_models.VOCABULARY[token] for token in tokens[3:])
    session = LanguageModelSession(path, use_library=use_library)
    assert "".join(session.generate("abc", num_tokens=30, temperature=0.0)) == expected


def test_of_a_long_prompt_the_last_context_is_read(path: Path) -> None:
    session, prompt = LanguageModelSession(path), "abcdefghijk" * 3
    text = "".join(session.generate(prompt, 20, temperature=0.0))
    assert text == "".join(session.generate(prompt[-exported_models.CONTEXT :], 20, temperature=0.0))


def test_threads_that_share_a_session_write_what_each_would_alone(path: Path) -> None:
    session = LanguageModelSession(path, num_threads=1)

    def write(seed: int) -> str:
        return "".join(session.generate("abc"[: seed % 3 + 1], 40, seed=seed))

    alone = [write(seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(write, range(16))) == alone


def test_two_texts_of_one_thread_grow_side_by_side(path: Path) -> None:
    session = LanguageModelSession(path)
    pairs = list(zip(session.generate("a", 30, seed=1), session.generate("b", 30, seed=2), strict=True))
    for place, (prompt, seed) in enumerate((("a", 1), ("b", 2))):
        assert "".join(pair[place] for pair in pairs) == "".join(session.generate(prompt, 30, seed=seed))


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
        "bad = {'torch', 'trix.nn', 'onnx', 'lightning'} & set(sys.modules); assert not bad, bad"
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
    with pytest.raises(ModelFileError, match=r"file format \(None\) must be 3: was it written by `trix export`\?"):
        LanguageModelSession(tmp_path / "other.onnx")


def test_a_file_of_an_earlier_format_is_refused(path: Path, tmp_path: Path) -> None:
    older = edited(path, tmp_path, lambda _, properties: properties.update({"trix.format": "1"}))
    with pytest.raises(ModelFileError, match=r"file format \(1\) must be 3: export its checkpoint again"):
        LanguageModelSession(older)


def edited(path: Path, folder: Path, edit: Callable[[onnx.ModelProto, dict[str, str]], object]) -> Path:
    """A copy of the file after `edit(model, metadata properties)`."""
    model = onnx.load(path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    edit(model, properties)
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, folder / "edited.onnx")
    return folder / "edited.onnx"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("task", None, r"task \(None\) must be language_model"),
        ("float32_bytes", '"many"', r"metadata float32_bytes \('many'\) must be of type int"),
        ("vocabulary", None, r"metadata vocabulary \(None\) must be of type str"),
        ("vocabulary", '"abc"', r"vocabulary \(3 characters\) must be as long as the last axis of logits .*11\]"),
        ("context_length", "true", r"metadata context_length \(True\) must be of type int"),
        ("context_length", "0", r"context_length \(0\) must be >= 1"),
        ("config", "[" * 100_000, ".* a value is nested too deeply"),
    ],
)
def test_damaged_metadata_is_named_when_loading(path: Path, tmp_path: Path, key: str, value: str | None, message: str) -> None:
    def edit(model: onnx.ModelProto, properties: dict[str, str]) -> None:
        del properties[f"trix.{key}"]
        properties |= {} if value is None else {f"trix.{key}": value}

    with pytest.raises(ModelFileError, match=f"edited.onnx: {message}"):
        LanguageModelSession(edited(path, tmp_path, edit))


@pytest.mark.parametrize("key", ["input", "logits", "tile_idx", "gap"])
@pytest.mark.parametrize("value", [None, 7, [[99]], [[1], [1, 2]], {"shape": [1], "float32_base64": "AAAA"}])
def test_a_damaged_reference_does_not_pass_for_parity(path: Path, tmp_path: Path, key: str, value: object) -> None:
    def edit(model: onnx.ModelProto, properties: dict[str, str]) -> None:
        properties["trix.reference"] = json.dumps(json.loads(properties["trix.reference"]) | {key: value})

    session = LanguageModelSession(edited(path, tmp_path, edit))
    with pytest.raises(ModelFileError, match=r"edited.onnx: the reference example can't be checked: \w+"):
        session.check_parity()


def test_a_missing_reference_is_named(path: Path, tmp_path: Path) -> None:
    session = LanguageModelSession(edited(path, tmp_path, lambda _, properties: properties.pop("trix.reference")))
    with pytest.raises(ModelFileError, match=r"metadata reference \(None\) must be of type dict"):
        session.check_parity()


def test_another_graph_with_the_metadata_of_a_language_model_is_refused(path: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto, properties: dict[str, str]) -> None:
        model.graph.output[-1].name = "other"
        model.graph.node.append(onnx.helper.make_node("Identity", ["present_value_1"], ["other"]))

    with pytest.raises(ModelFileError, match=r"outputs hold 'logits' and a present_ for each past_, got \(.*'other'\]\)"):
        LanguageModelSession(edited(path, tmp_path, edit))


def test_a_language_model_with_an_input_of_another_name_is_refused(path: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto, properties: dict[str, str]) -> None:
        model.graph.input.append(onnx.helper.make_tensor_value_info("future_key_0", onnx.TensorProto.FLOAT, ["batch"]))

    with pytest.raises(ModelFileError, match=r"'future_key_0'\]\) must be \['token', 'past_NAME_LAYER', \.\.\.\]"):
        LanguageModelSession(edited(path, tmp_path, edit))


def test_nan_weights_end_in_an_error_not_in_text(path: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto, properties: dict[str, str]) -> None:
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                values = np.full(tuple(tensor.dims), np.nan, dtype=np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    session = LanguageModelSession(edited(path, tmp_path, edit))
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelFileError, match="logits must be numbers, 11 of 11 are NaN"):
            list(session.generate("abc", 1, temperature=temperature))


def test_an_unknown_operator_is_not_blamed_on_the_library(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(path.read_bytes().replace(b"Gather", b"Gothic"))
    for use_library in (True, False):
        with pytest.raises(ModelFileError, match=r"other\.onnx: onnxruntime can't load it: .*Gothic"):
            LanguageModelSession(tmp_path / "other.onnx", use_library=use_library)


def test_a_damaged_file_prints_nothing(path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """onnxruntime's message then holds bytes that are no text, which its Python side takes for a provider's fault."""
    (tmp_path / "damaged.onnx").write_bytes(path.read_bytes().replace(b"Gather", b"Gathe\xff"))
    with pytest.raises(ModelFileError, match=r"damaged\.onnx: not an ONNX file, or a damaged one"):
        LanguageModelSession(tmp_path / "damaged.onnx")
    assert capfd.readouterr().out == ""


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
