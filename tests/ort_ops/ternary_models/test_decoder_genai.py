"""Folders of random ternary decoders in onnxruntime-genai, against the models of transformers with BitLinear in float32."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from random_decoders import CONFIGS, RandomCheckpoint, quantised_activations
from ternary_folders import tiny_model, write_master, write_packed
from torch import nn

from lightning_modules.cli import main
from ort_ops.library import session_options
from ort_ops.ternary_models.decoder_folder import write_decoder
from ort_ops.ternary_models.decoder_graph import PRODUCTS
from ort_ops.ternary_models.reading import open_checkpoint

genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai: make test-transformers")
pytest.importorskip("transformers", reason="needs transformers: make test-transformers")
tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: make test-transformers")

from hugging_face_decoders import PROJECTIONS, hugging_face_model  # noqa: E402  (it imports transformers)
from transformers import AutoModelForCausalLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("native_library")

NUM_TOKENS = 64
END = 319
SENTENCES = [
    "The cat sat on the mat, and the dog looked at it.",
    "Short words.",
    "A longer sentence, which has more words than the others, is read by the model as well.",
]
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}<|assistant|>"


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def checkpoint_of(name: str, seed: int) -> RandomCheckpoint:
    return RandomCheckpoint(replace(CONFIGS[name], eos_token_ids=(END,)), seed)


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A tokenizer of bytes and of some pairs, with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|user|>", "<|assistant|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=END, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_special_tokens(["</s>"])
    assert tokenizer.token_to_id("</s>") == END
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json", folder / "tokenizer_config.json"


def write(checkpoint: RandomCheckpoint, folder: Path, files: tuple[Path, ...] = ()) -> Path:
    checkpoint.tokenizer_files = files
    write_decoder(checkpoint, folder, head="float32")
    return folder


def load(folder: Path) -> Any:
    """With one thread: several would wait for each other in a loop on a busy machine."""
    settings = genai.Config(str(folder))
    settings.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    return genai.Model(settings)


def greedy(model: Any, prompts: list[list[int]], num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    """What follows each prompt; shorter ones are padded at the end, as encode_batch of onnxruntime-genai does."""
    longest = max(map(len, prompts))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=longest + num_tokens, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt + [0] * (longest - len(prompt)) for prompt in prompts], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(i)[longest:].tolist() for i in range(len(prompts))]


def assert_greedy(found: list[int], reference: Any, prompt: list[int]) -> bool:
    """The tokens are those of transformers, to the end (True) or up to a place where its best two scores are nearly equal."""
    with torch.no_grad():
        text = reference.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=END)[0]
        logits = reference(text[None]).logits[0].numpy()
    expected = text[len(prompt) :].tolist()
    for place, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            score = logits[len(prompt) + place - 1]
            assert score[other] - score[one] <= 0.01 * np.abs(score).max(), (place, found, expected)
            return False
    assert len(found) == len(expected)
    return True


@pytest.mark.parametrize("name", CONFIGS)
def test_64_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Norms and attention add floats in another order, which now and then moves an activation across a step of the quantiser.
    Transformers differs from itself so, too, between its eager and its SDPA attention."""
    equal = []
    for seed in range(5):
        checkpoint = checkpoint_of(name, seed)
        prompt = np.random.default_rng(seed).integers(3, END, 10).tolist()
        model = load(write(checkpoint, tmp_path / str(seed)))
        (found,) = greedy(model, [prompt])
        assert len(set(found)) > 5, "a text that repeats itself says little"
        equal.append(assert_greedy(found, hugging_face_model(checkpoint), prompt))
    assert sum(equal) >= 3, equal


@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_sequences_are_answered_as_by_transformers(name: str, seed: int, tmp_path: Path) -> None:
    """The model of transformers goes on from what each product reads and writes in onnxruntime, as one step of the quantiser
    that differs would change all that follows. The steps that differ are counted: in what a product reads and, by token, in
    what it makes of it."""
    checkpoint = checkpoint_of(name, seed)
    model = onnx.load(write(checkpoint, tmp_path / "decoder") / "model.onnx")
    products = {node.name.removesuffix(".out"): node for node in model.graph.node if node.op_type == "TernaryMatMul"}
    shown = {value for node in products.values() for value in (node.input[0], node.output[0])}
    model.graph.output.extend(helper.make_tensor_value_info(value, 1, None) for value in shown)
    session = ort.InferenceSession(model.SerializeToString(), session_options(intra_op_num_threads=1))
    token_BT = np.random.default_rng(8).integers(0, END, (3, 40))
    empty = np.zeros((3, checkpoint.config.num_key_value_heads, 0, checkpoint.config.head_size), np.float32)
    past = {value.name: empty for value in session.get_inputs() if value.name.startswith("past")}
    outputs = [value.name for value in session.get_outputs()]
    given = {"input_ids": token_BT, "attention_mask": np.ones_like(token_BT)} | past
    there = dict(zip(outputs, session.run(None, given), strict=True))
    counts = {"all": 0, "other": 0}

    def read_there(x_there: np.ndarray) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            steps, steps_there = (quantised_activations(x)[0] for x in (arguments[0].numpy(), x_there))
            counts["all"] += steps.size
            counts["other"] += int((steps != steps_there).sum())
            assert np.abs(steps - steps_there).max() <= 1
            return (torch.from_numpy(x_there),)

        return hook

    def write_there(y_there: np.ndarray) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
            error_BT = np.abs(y.numpy() - y_there).max(-1) / np.abs(y_there).max(-1)
            counts["other"] += int((error_BT > 1e-6).sum())
            assert error_BT.max() <= 5e-3
            return torch.from_numpy(y_there)

        return hook

    reference: Any = hugging_face_model(checkpoint)
    for layer, block in enumerate(reference.model.layers):
        for fused, projections in PRODUCTS.items():
            product = products[f"layers.{layer}.{fused}"]
            linears = [block.get_submodule(PROJECTIONS[projection]) for projection in projections]
            ends = np.cumsum([linear.out_features for linear in linears])[:-1]
            for linear, y_there in zip(linears, np.split(there[product.output[0]], ends, axis=-1), strict=True):
                linear.register_forward_pre_hook(read_there(there[product.input[0]]))
                linear.register_forward_hook(write_there(y_there.copy()))
    with torch.no_grad():
        expected = reference(torch.from_numpy(token_BT)).logits.numpy()
    assert counts["other"] <= 1e-4 * counts["all"], counts
    assert np.abs(there["logits"] - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_with_padding_is_continued_as_each_of_its_texts(
    name: str, tokenizer_files: tuple[Path, ...], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(name, 1)
    model = load(write(checkpoint, tmp_path / "decoder", tokenizer_files))
    tokenizer = genai.Tokenizer(model)
    prompts = [tokenizer.encode(sentence).tolist() for sentence in SENTENCES]
    assert len({len(prompt) for prompt in prompts}) == 3
    longest = max(map(len, prompts))
    batch = tokenizer.encode_batch(SENTENCES).as_numpy()
    np.testing.assert_array_equal(batch, [prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    reference = hugging_face_model(checkpoint)
    found = greedy(model, prompts, num_tokens=30)
    assert found == [greedy(model, [prompt], num_tokens=30)[0] for prompt in prompts]
    assert len({tuple(text) for text in found}) == 3
    with torch.no_grad():
        for prompt, text in zip(prompts, found, strict=True):
            answer = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=END)[0]
            assert text[:8] == answer[len(prompt) :].tolist()


def test_a_chat_is_templated_and_its_answer_streamed(tokenizer_files: tuple[Path, ...], tmp_path: Path) -> None:
    model = load(write(checkpoint_of("bitnet", 2), tmp_path / "decoder", tokenizer_files))
    tokenizer = genai.Tokenizer(model)
    messages = json.dumps([{"role": "user", "content": SENTENCES[1]}])
    prompt = tokenizer.apply_chat_template(messages=messages, add_generation_prompt=True)
    assert prompt == f"<|user|>{SENTENCES[1]}<|assistant|>"
    token_T = tokenizer.encode(prompt).tolist()
    assert (token_T[0], token_T[-1]) == (2, 3)
    stream = tokenizer.create_stream()
    (found,) = greedy(model, [token_T], num_tokens=20)
    streamed = "".join(stream.decode(token) for token in found)
    assert len(streamed) > 5
    # decode gives up at the first bytes that are no UTF-8, which random weights soon write.
    assert streamed.startswith(tokenizer.decode(np.array(found, np.int32)).rstrip("\ufffd"))


@pytest.mark.parametrize("kind", ["packed", "master", "TQ1_0", "TQ2_0"])
def test_a_checkpoint_on_disk_is_imported_and_goes_on_as_in_transformers(kind: str, tmp_path: Path) -> None:
    is_gguf = kind.startswith("TQ")
    tiny, source = tiny_model("llama" if is_gguf else "bitnet", is_head_tied=False, seed=1), tmp_path / "source"
    if is_gguf:
        gguf = pytest.importorskip("gguf", reason="files in GGUF need gguf")
        from ternary_gguf import write_gguf

        path = write_gguf(tmp_path / "model.gguf", tiny, gguf.GGMLQuantizationType[kind])
    else:
        path = (write_packed if kind == "packed" else write_master)(source, tiny)
    folder = tmp_path / "imported"
    assert main(["import", str(path), "--output", str(folder), "--head", "float32"]) == 0
    reference: Any = (  # of a file in GGUF transformers makes floats
        hugging_face_model(open_checkpoint(path))
        if is_gguf
        else AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    )
    prompt = [1, 9, 30, 17, 4]
    (found,) = greedy(load(folder), [prompt], num_tokens=12)
    with torch.no_grad():
        answer = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2)[0]
    assert found == answer[len(prompt) :].tolist()


def test_the_command_continues_a_text(
    tokenizer_files: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write(checkpoint_of("bitnet", 3), tmp_path / "decoder", tokenizer_files))
    arguments = ["generate", folder, "--prompt", "The cat", "--num-tokens", "12"]
    texts = []
    for more in (["--temperature", "0"], ["--seed", "1"], ["--seed", "1", "--threads", "1"], ["--seed", "2", "--top-p", "0.9"]):
        assert main([*arguments, *more]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("The cat")
        assert "tokens/s (12 tokens, onnxruntime-genai)" in err
        texts.append(out)
    model = genai.Model(folder)
    tokenizer = genai.Tokenizer(model)
    (found,) = greedy(model, [tokenizer.encode("The cat").tolist()], num_tokens=12)
    stream = tokenizer.create_stream()
    assert texts[0] == "The cat" + "".join(stream.decode(token) for token in found) + "\n"
    assert texts[1] == texts[2]
    assert len(set(texts)) == 3


def test_the_command_refuses_what_the_model_cannot_do(
    tokenizer_files: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write(checkpoint_of("bitnet", 3), tmp_path / "decoder", tokenizer_files))
    for more, text in (
        (["--prompt", ""], "the prompt must have at least 1 token, got 0"),
        (["--num-tokens", "200"], "+ num_tokens (200) must be <= the context of the model (128 tokens)"),
        (["--temperature", "-1"], "temperature (-1.0) must be finite and >= 0"),
        (["--top-p", "0"], "top_p (0.0) must be > 0 and <= 1"),
        (["--seed", str(2**31)], "seed (2147483648) must be <= 2147483647"),
        (["--threads", "0"], "num_threads (0) must be >= 1 and <= 1024"),
        (["--prompt", "The \udc80"], "the prompt must be Unicode text: surrogates not allowed (place 4)"),
    ):
        assert main(["generate", folder, "--prompt", "The", *more]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert text in err
    assert main(["generate", folder, "--prompt", "The", "--num-tokens", "1", "--seed", str(2**31 - 1)]) == 0
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    assert main(["generate", str(bare), "--prompt", "The"]) == 2
    assert "onnxruntime-genai can't load it" in capsys.readouterr().err


def test_the_tokenizer_of_another_model_is_told(
    tokenizer_files: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(checkpoint_of("bitnet", 3), tmp_path / "decoder", tokenizer_files)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["dinosaur"])
    assert tokenizer.token_to_id("dinosaur") == CONFIGS["bitnet"].vocab_size
    tokenizer.save(str(folder / "tokenizer.json"))
    assert main(["generate", str(folder), "--prompt", "The cat", "--num-tokens", "4"]) == 0
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "The dinosaur", "--num-tokens", "4"]) == 2
    out, err = capsys.readouterr()
    text = "tokens of the prompt (320 is the largest) must be < vocab_size (320): the tokenizer is another model's"
    assert (out, err) == ("", f"trix: error: {text}\n")


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 319), ("eos_token_id", -1)])
def test_what_fails_after_loading_is_one_line(
    name: str,
    value: int,
    tokenizer_files: tuple[Path, ...],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = write(checkpoint_of("bitnet", 3), tmp_path / "decoder", tokenizer_files)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"][name] = value
    (folder / "genai_config.json").write_text(json.dumps(config))
    assert main(["generate", str(folder), "--prompt", "The cat", "--num-tokens", "4"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"trix: error: {folder}: onnxruntime-genai can't run it: ")
    assert err.count("\n") == 1
