"""Models of transformers as backends, tiny and random: `make test-transformers` runs these."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pandas")
pytest.importorskip("transformers")

import pandas as pd
import torch
import transformers
from torch import Tensor

from trix.superposition import DumpConfig
from trix.superposition.backends import HFCausalLM, Site
from trix.superposition.dump import ActivationDump, dump_layer_activations, stream_shards
from trix.superposition.sae import SAE, TopKSAE
from trix.superposition.steering import set_or_scale_latent, steering

VOCAB_SIZE, WIDTH, LAYERS = 50, 32, 3
LLAMA_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaConfig": LLAMA_LIKE,
    "Gemma3TextConfig": LLAMA_LIKE,
    "Qwen3Config": LLAMA_LIKE,
    "Qwen3MoeConfig": LLAMA_LIKE | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "GPT2Config": {"vocab_size": VOCAB_SIZE, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 64},
    "GPTNeoXConfig": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}


def tokenizer(**tokens: str) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: place for place, word in enumerate(["<end>", "<unknown>", *(f"w{place}" for place in range(48))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unknown>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **{"eos_token": "<end>", **tokens})


def model(config: str = "LlamaConfig", **changed: Any) -> Any:
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**CONFIGS[config], **changed, eos_token_id=0, bos_token_id=0, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(settings).eval()


def batch() -> tuple[Tensor, Tensor]:
    id_BT = torch.randint(1, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(id_BT)
    mask_BT[1, 4:] = 0
    return id_BT, mask_BT


def made_sae() -> SAE:
    torch.manual_seed(1)
    made = TopKSAE(WIDTH, 48, active=4)
    made.start_from(torch.randn(50, WIDTH))
    return made.eval()


@pytest.mark.parametrize("config", CONFIGS)
def test_hidden_states_are_those_of_transformers(config: str) -> None:
    backend, (id_BT, mask_BT) = HFCausalLM(model(config), tokenizer()), batch()
    with torch.no_grad():
        states = backend.model(input_ids=id_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
    is_token_BT = mask_BT.bool()
    for layer in range(LAYERS):
        assert torch.equal(backend.forward_hidden(id_BT, mask_BT, layer)[is_token_BT], states[layer][is_token_BT])
    with pytest.raises(ValueError, match=r"layer \(3\) must be >= 0 and < number of layers \(3\)"):
        backend.forward_hidden(id_BT, mask_BT, LAYERS)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_feed_forward_layer_maps_its_input_to_its_output(config: str) -> None:
    backend, (id_BT, mask_BT) = HFCausalLM(model(config), tokenizer()), batch()
    found = backend.activations(id_BT, mask_BT, [Site(1, "mlp_in"), Site(1, "mlp_out"), Site(2, "resid_pre")])
    got = backend.block(1).mlp(found[Site(1, "mlp_in")])  # type: ignore[operator]
    torch.testing.assert_close(got[0] if isinstance(got, tuple) else got, found[Site(1, "mlp_out")])
    assert found[Site(1, "mlp_in")].shape == found[Site(1, "mlp_out")].shape == (2, 7, WIDTH)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_end_of_the_stream_gives_the_logits_of_the_model(config: str) -> None:
    backend, (id_BT, _), streams = HFCausalLM(model(config), tokenizer()), batch(), list[Tensor]()

    def keep(_: object, __: object, output: Any) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    handle = backend.blocks[-1].register_forward_hook(keep)
    with torch.no_grad():
        logits_BTV = backend.run(id_BT, None)
    handle.remove()
    torch.testing.assert_close(backend.unembed(streams[0].flatten(0, 1)), logits_BTV.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_nothing_beyond_the_site_is_computed() -> None:
    def raise_if_run(*_: object, **__: object) -> None:
        raise AssertionError("this must not be computed")

    backend, (id_BT, mask_BT) = HFCausalLM(model(), tokenizer()), batch()
    expected = backend.forward_hidden(id_BT, mask_BT, 1)
    backend.block(1).self_attn.forward = raise_if_run  # type: ignore[union-attr, method-assign, assignment]
    backend.model.lm_head.forward = raise_if_run  # type: ignore[union-attr, method-assign, assignment]
    assert torch.equal(backend.forward_hidden(id_BT, mask_BT, 1), expected)
    with pytest.raises(AssertionError, match="must not be computed"):
        backend.forward_hidden(id_BT, mask_BT, 2)


def test_blocks_without_one_feed_forward_layer_are_refused() -> None:
    config = transformers.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        word_embed_proj_dim=WIDTH,
    )
    backend, (id_BT, mask_BT) = HFCausalLM(transformers.AutoModelForCausalLM.from_config(config), tokenizer()), batch()
    with pytest.raises(ValueError, match=r"site \(mlp_in.1\) needs .* parts with matrices: self_attn, fc1, fc2"):
        backend.activations(id_BT, mask_BT, [Site(1, "mlp_in")])
    assert backend.forward_hidden(id_BT, mask_BT, 2).shape == (2, 7, WIDTH)


def test_texts_are_padded_on_the_right_with_the_end_of_text() -> None:
    left = tokenizer(padding_side="left")
    backend = HFCausalLM(model(), left)
    tokens = backend.tokenize(["w0 w1 w2", "w5", ""], 2)
    assert tokens["input_ids"].tolist() == [[2, 3], [7, 0], [0, 0]]
    assert tokens["attention_mask"].tolist() == [[1, 1], [1, 0], [0, 0]]
    assert tokens["input_ids"].dtype == backend.tokenize([""], 2)["input_ids"].dtype == torch.int64
    own = HFCausalLM(model(), tokenizer(pad_token="<unknown>"))
    assert own.tokenize(["w0 w1", "w5"], 2)["input_ids"].tolist() == [[2, 3], [7, 1]]
    bare = tokenizer()
    bare.eos_token = None
    with pytest.raises(ValueError, match="must not both be None"):
        HFCausalLM(model(), bare)


def test_a_saved_model_is_the_same(tmp_path: Path) -> None:
    original = HFCausalLM(model(), tokenizer())
    original.model.save_pretrained(tmp_path)  # type: ignore[operator]
    original.tokenizer.save_pretrained(tmp_path)
    backend = HFCausalLM.from_pretrained(str(tmp_path), dtype="fp32", device_map="auto")
    tokens = backend.tokenize(["w0 w1 w2", "w5"], 8)
    assert torch.equal(backend.forward_hidden(**tokens, layer=2), original.forward_hidden(**tokens, layer=2))
    assert backend.digest() == original.digest()
    assert HFCausalLM.from_pretrained(str(tmp_path)).forward_hidden(**tokens, layer=2).dtype == torch.bfloat16
    assert HFCausalLM.from_pretrained(str(tmp_path)).digest() != original.digest()
    with pytest.raises(ValueError, match=r"dtype \('int8'\) must be one of bf16, fp16, fp32"):
        HFCausalLM.from_pretrained(str(tmp_path), dtype="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_left", [False, True])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_map_that_changes_nothing_changes_no_bit(dtype: torch.dtype, is_left: bool, positions: Any) -> None:
    backend, sae = HFCausalLM(model().to(dtype), tokenizer()), made_sae()
    id_BT, mask_BT = (tensor.flip(-1) if is_left else tensor for tensor in batch())

    def answers() -> list[Tensor]:
        """The logits of the texts, and of one more token by the cache."""
        longer_BT = torch.cat((mask_BT, mask_BT.new_ones(2, 1)), dim=1)
        with torch.no_grad():
            first = backend.model(id_BT, attention_mask=mask_BT, use_cache=True)
            cache = first.past_key_values
            return [first.logits, backend.model(id_BT[:, :1], attention_mask=longer_BT, past_key_values=cache).logits]

    plain = answers()
    with steering(backend, 1, sae, set_or_scale_latent(3, scale_by=1.0), positions):
        assert all(map(torch.equal, answers(), plain))
    with steering(backend, 1, sae, set_or_scale_latent(3, set_to=20.0), positions):
        assert not any(map(torch.equal, answers(), plain))


def test_a_mask_without_its_name_is_read_too() -> None:
    backend, sae = HFCausalLM(model(), tokenizer()), made_sae()
    id_BT, mask_BT = batch()
    with torch.no_grad(), steering(backend, 1, sae, set_or_scale_latent(3, set_to=20.0)):
        assert torch.equal(backend.model(id_BT, mask_BT).logits, backend.model(id_BT, attention_mask=mask_BT).logits)


def test_generation_goes_on_from_the_prompt() -> None:
    backend = HFCausalLM(model(), tokenizer())
    tokens = backend.tokenize(["w0 w1 w2"], 8)
    text_BT = backend.generate(**tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert text_BT.shape == (1, 7)
    assert torch.equal(text_BT[:, :3], tokens["input_ids"])


@pytest.mark.parametrize("config", ["LlamaConfig", "GPT2Config"])
def test_texts_read_together_have_the_activations_of_each_read_alone(config: str, tmp_path: Path) -> None:
    backend = HFCausalLM(model(config), tokenizer())
    texts = [" ".join(f"w{place}" for place in range(length)) for length in (3, 1, 12, 7, 7, 2)]
    frame = pd.DataFrame({"title": texts, "topic": range(6)})
    cfg = DumpConfig(layer=2, dtype="fp32", batch_size=4, drop_sinks=False)
    dump_layer_activations(frame, "title", "topic", backend, cfg, tmp_path)
    dump = ActivationDump(tmp_path)
    acts_ND = torch.cat(list(stream_shards(dump.paths)))
    for document, text in enumerate(texts):
        alone = backend.forward_hidden(**backend.tokenize([text], 32), layer=2)[0]
        torch.testing.assert_close(acts_ND[dump.column("titleidx") == document], alone)


def test_the_first_position_is_left_out_of_a_dump_unless_sinks_are_wanted(tmp_path: Path) -> None:
    backend = HFCausalLM(model("GPT2Config"), tokenizer())
    frame = pd.DataFrame({"title": ["w0 w1 w2", "w5", "w7 w8", ""], "topic": [0, 1, 0, 1]})
    for drop_sinks in (True, False):
        folder = tmp_path / str(drop_sinks)
        cfg = DumpConfig(layer=1, dtype="fp32", drop_sinks=drop_sinks)
        dump_layer_activations(frame, "title", "topic", backend, cfg, folder)
        dump = ActivationDump(folder)
        assert dump.manifest.dropped.first == (3 if drop_sinks else 0)
        assert dump.manifest.empty_documents == 1
        assert len(dump) == (3 if drop_sinks else 6)
        assert (0 in dump.column("position")) != drop_sinks
