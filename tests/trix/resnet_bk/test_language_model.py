"""The language model of the interface: a face of trix.nn.LanguageModel."""

import inspect
import json
import pickle
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trix.nn import RotaryAttention, TriXBlock
from trix.resnet_bk import BirmanSchwingerMixer, LanguageModel, ResNetBKConfig
from trix.resnet_bk.language_model import GENERATE_ARGUMENTS
from trix.routing import ScatteringRouter

SMALL: dict[str, Any] = {"vocab_size": 23, "d_model": 32, "n_layers": 2, "n_seq": 32}


def make(seed: int = 0, **settings: Any) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(**{**SMALL, **settings}).eval()


def tokens(length: int = 20, batch: int = 2) -> Tensor:
    return torch.randint(0, 23, (batch, length), generator=torch.Generator().manual_seed(1))


def test_the_defaults_are_those_of_the_interface() -> None:
    config = ResNetBKConfig()
    assert (config.vocab_size, config.d_model, config.n_layers, config.n_seq) == (30000, 256, 6, 512)
    assert (config.epsilon, config.use_prime_bump, config.num_experts, config.top_k) == (1.0, True, 4, 2)
    assert (config.use_scattering_router, config.use_act, config.act_halt_threshold) == (True, False, 0.2)


def test_the_output_has_the_shape_of_the_logits_and_the_loss_of_the_next_token() -> None:
    model, ids = make(), tokens()
    output = model(ids, labels=ids)
    assert output.shape == (2, 20, 23)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output["loss"] is output.loss
    assert "logits" in output
    assert "state" not in output
    assert torch.equal(model(ids, return_dict=False), output.logits)
    with pytest.raises(KeyError, match="state must be one of logits, aux_loss"):
        model(ids)["state"]


@pytest.mark.parametrize("use_act", [False, True])
def test_hidden_states_lead_from_the_embeddings_to_the_logits(use_act: bool) -> None:
    model, ids = make(use_act=use_act), tokens()
    output = model(ids)
    hidden = output["hidden_states"]
    assert [state.shape for state in hidden] == [(2, 20, 32)] * 3
    assert torch.equal(hidden[0], model.model.embedding(ids))
    assert torch.equal(hidden[1], model.model.stack.blocks[0](hidden[0]))
    assert torch.equal(model.model.head(hidden[2]), output.logits)
    stepwise = model(ids, state=model.empty_state(2)).hidden_states
    torch.testing.assert_close(stepwise, hidden)


CHANGED: dict[str, Any] = {
    "epsilon": 0.5,
    "use_prime_bump": False,
    "num_experts": 8,
    "top_k": 1,
    "use_scattering_router": False,
    "use_act": True,
    "prime_bump_scale": 0.5,
    "k_max": 1,
    "use_lap": False,
    "schatten_threshold": 0.5,
    "use_semiseparable": False,
    "low_rank": 3,
    "n_heads": 4,
    "hopping": "one_way",
    "ternary_mixer": True,
}


@pytest.mark.parametrize("key", CHANGED)
def test_each_key_changes_the_answer(key: str) -> None:
    ids = tokens()
    assert getattr(ResNetBKConfig(), key) != CHANGED[key]
    assert not torch.equal(
        make(prime_bump_scale=0.3)(ids).logits, make(**{"prime_bump_scale": 0.3, key: CHANGED[key]})(ids).logits
    )


def test_each_size_is_the_models_own() -> None:
    model = make(vocab_size=31, d_model=48, n_layers=3, n_seq=24)
    hidden = model(tokens()).hidden_states
    assert model(tokens()).shape == (2, 20, 31)
    assert (len(hidden), hidden[0].shape[-1]) == (4, 48)
    with pytest.raises(ValueError, match=r"sequence of input_ids \(25\) must be >= 1 and <= n_seq \(24\)"):
        model(tokens(25))


def test_the_halting_threshold_and_the_mourre_check_count_where_they_are_in_use() -> None:
    ids = tokens()
    early, late = (make(use_act=True, act_halt_threshold=threshold, n_layers=3)(ids).logits for threshold in (0.7, 0.05))
    assert not torch.equal(early, late)
    assert make().diagnostics()["mourre"] is True
    assert "mourre" not in make(use_mourre=False).diagnostics()


def test_it_is_made_of_the_parts_that_stand() -> None:
    model = make(attention_at=(1,), use_scattering_router=False)
    assert [type(mixer) for mixer in model.model.stack.mixers] == [BirmanSchwingerMixer, RotaryAttention]
    routed = make().model.stack.blocks[0].ffn
    assert isinstance(routed.router, ScatteringRouter)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_token(side: str) -> None:
    model, ids = make(prime_bump_scale=0.3), tokens()
    noise = torch.zeros(2, 6, dtype=torch.int64)
    padded = torch.cat([noise, ids] if side == "left" else [ids, noise], dim=1)
    mask = torch.ones_like(padded)
    mask[:, slice(0, 6) if side == "left" else slice(20, 26)] = 0
    torch.testing.assert_close(model(padded, mask).logits[mask.bool()].reshape(2, 20, -1), model(ids).logits)


@pytest.mark.parametrize("places", [slice(0, 6), slice(20, 26), slice(3, 9)], ids=["left", "right", "within"])
def test_padding_has_no_part_in_the_loss(places: slice) -> None:
    """On a side it changes nothing; within a text it parts it into two."""
    model, ids = make(use_prime_bump=False), tokens(26, batch=1)  # the potential would count on
    mask = torch.ones_like(ids)
    mask[:, places] = 0
    texts = [text for text in (ids[:, : places.start], ids[:, places.stop :]) if text.shape[1]]
    sums = [model(text, labels=text).loss.item() * (text.shape[1] - 1) for text in texts]
    expected = sum(sums) / sum(text.shape[1] - 1 for text in texts)
    assert model(ids, mask, labels=ids).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_act": True}, {"hopping": "one_way", "use_semiseparable": False}], ids=str)
def test_generating_is_reading_the_whole_text_each_time(settings: dict[str, Any]) -> None:
    model, ids = make(prime_bump_scale=0.3, **settings), tokens(5)
    expected = ids
    for _ in range(15):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, 20, do_sample=False), expected)


def test_no_label_gives_no_loss_and_no_text_no_answer() -> None:
    model = make()
    assert model(tokens(), labels=torch.full((2, 20), -100)).loss == 0
    assert model(tokens(1), labels=tokens(1)).loss == 0
    assert model(tokens(5, batch=0)).shape == (0, 5, 23)
    assert model.generate(tokens(5)).shape == (2, 32)


def test_what_is_read_is_for_evaluation(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    assert not LanguageModel.from_pretrained(tmp_path).training


def test_sampling_keeps_to_the_likeliest_tokens_and_repeats_with_its_generator() -> None:
    model, ids = make(), tokens(5, batch=4)
    first, again = (model.generate(ids, 25, top_k=3, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (4, 25)
    for place in range(5, 25):
        likeliest = model(first[:, :place]).logits[:, -1].topk(3).indices
        assert (likeliest == first[:, place, None]).any(-1).all()
    assert torch.equal(model.generate(ids, 25, top_p=1e-9), model.generate(ids, 25, do_sample=False))


@pytest.mark.parametrize(
    "change", [{"temperature": 3.0}, {"top_p": 0.2}, {"top_k": 2}, {"do_sample": False}, {"max_length": 28}], ids=str
)
def test_each_setting_changes_what_is_generated(change: dict[str, Any]) -> None:
    model, ids = make(), tokens(5, batch=4)
    plain, other = (
        model.generate(ids, **({"max_length": 30} | settings), generator=torch.Generator().manual_seed(3))
        for settings in ({}, change)
    )
    assert not torch.equal(plain, other)


def test_it_trains_with_its_ponder_cost() -> None:
    model, ids = make(use_act=True).train(), tokens()
    output = model(ids, labels=ids)
    assert output.aux_loss > 0
    (output.loss + output.aux_loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    model, ids = make(top_k=1, attention_at=(0,), use_scattering_router=False), tokens()
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    again = LanguageModel.from_pretrained(tmp_path / "model").eval()
    assert again.config == model.config
    assert torch.equal(again(ids).logits, model(ids).logits)


def _edit(folder: Path, **values: Any) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, **values}))


def test_what_does_not_fit_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    _edit(tmp_path, n_layers=10**9)
    with pytest.raises(ValueError, match=r"n_layers in .* \(1000000000\) must be <= the number of its tensors \(\d+\)"):
        LanguageModel.from_pretrained(tmp_path)
    _edit(tmp_path, n_layers=2, d_model=2**20)
    with pytest.raises(ValueError, match=r"shape of .* must be"):
        LanguageModel.from_pretrained(tmp_path)
    _edit(tmp_path, d_model=32, n_seq=2**40)
    with pytest.raises(ValueError, match=r"n_seq \(1099511627776\) must be <= 65536"):
        LanguageModel.from_pretrained(tmp_path)
    _edit(tmp_path, n_seq=32, model_type="gpt2")
    with pytest.raises(ValueError, match=r"model_type in .* \('gpt2'\) must be 'resnet_bk'"):
        LanguageModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"must be a safetensors file"):
        LanguageModel.from_pretrained(tmp_path)


def test_a_file_of_before_the_balance_bias_came_to_rest_is_read(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith(".balance_age_E")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    state = LanguageModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class _Ran:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make().save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must hold config.json and model.safetensors; pickles \(.bin, .pt\) are not read"):
        LanguageModel.from_pretrained(folder)
    (tmp_path / "model.pt").write_bytes(pickle.dumps(_Ran()))
    with pytest.raises(ValueError, match=r"must be a folder with config.json and model.safetensors, it is a file"):
        LanguageModel.from_pretrained(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"must hold tensors and plain values only$"):
        LanguageModel.from_checkpoint(tmp_path / "model.pt")


def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> str:
        raise OSError("\nthe hub cannot be reached\nCheck your connection.")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=no_network))
    torch.save(_Ran(), tmp_path / "object.pt")
    torch.save({"weight": torch.zeros(100)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-300])
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(_Ran()))
    (tmp_path / "folder").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "folder" / name).write_text("{\n]")
    readings = [lambda name=name: LanguageModel.from_checkpoint(tmp_path / name) for name in ("object.pt", "cut.pt", "bare.pt")]
    readings += [lambda name=name: LanguageModel.from_pretrained(name) for name in ("nobody/none", tmp_path / "folder")]
    for read in readings:
        with pytest.raises(ValueError, match="must") as caught:
            read()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^model \(nobody/none\) must be .* of the hub: the hub cannot be reached$"):
        LanguageModel.from_pretrained("nobody/none")


def test_a_weight_that_is_not_finite_leaves_no_folder(tmp_path: Path) -> None:
    model = make()
    next(model.parameters()).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weight \S+ \(1 values that are not\) must be finite"):
        model.save_pretrained(tmp_path / "new" / "model")
    assert not [*tmp_path.iterdir()]


def test_a_checkpoint_is_its_configuration_and_weights(tmp_path: Path) -> None:
    model, ids = make(), tokens()
    torch.save({"config": asdict(model.config), "state_dict": model.state_dict()}, tmp_path / "model.pt")
    assert torch.equal(LanguageModel.from_checkpoint(tmp_path / "model.pt").eval()(ids).logits, model(ids).logits)


def test_the_number_of_new_tokens_is_another_way_to_say_the_length() -> None:
    model, ids = make(), tokens(5)
    assert torch.equal(model.generate(ids, max_new_tokens=7, do_sample=False), model.generate(ids, 12, do_sample=False))
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    assert model.generate(ids, max_new_tokens=27).shape == (2, 32)
    for settings, message in [
        ({"max_new_tokens": 28}, r"^max_new_tokens \(28\) must be >= 0 and <= n_seq less the prompt \(27\)$"),
        ({"max_new_tokens": -1}, r"^max_new_tokens \(-1\) must be >= 0 and <= n_seq less"),
        ({"max_new_tokens": 3, "max_length": 8}, r"^max_length \(8\) and max_new_tokens \(3\) say the same: give one$"),
        ({"max_new_token": 3}, r"^argument \(max_new_token\) must be one of .*; the nearest is max_new_tokens$"),
        ({"temprature": 1.0}, r"^argument \(temprature\) must be one of .*; the nearest is temperature$"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(ids, **settings)


def test_every_argument_of_generate_is_known() -> None:
    named = [name for name in inspect.signature(LanguageModel.generate).parameters if name not in ("self", "unknown")]
    assert sorted(named) == sorted(GENERATE_ARGUMENTS)


def test_a_causal_model_takes_no_two_sided_resolvent() -> None:
    rule = r"mode \('two_sided'\) must be 'causal': a causal model takes no two-sided resolvent, which sees later tokens$"
    with pytest.raises(ValueError, match=f"^{rule}"):
        make(mode="two_sided")
    for mixer in ("resolvent", f"{BirmanSchwingerMixer.__module__}.BirmanSchwingerMixer"):
        with pytest.raises(ValueError, match=f"^{rule}"):
            TriXBlock(32, 4, mixer=mixer, mixer_args={"mode": "two_sided"})
        TriXBlock(32, 4, mixer=mixer, mixer_args={"mode": "causal"})
    assert make(mode="causal").config == make().config


def test_a_history_of_surgery_may_be_of_any_length(tmp_path: Path) -> None:
    model = make(use_scattering_router=False)
    model.model.stack.blocks[0].ffn.freeze_signature(1, tag="held")
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path).model.stack.blocks[0].ffn
    assert [entry["tag"] for entry in again.surgery_log.history()] == ["held"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path, weights = tmp_path / "model.pt", make().state_dict()
    rule = r"must hold state_dict, and config or hyper_parameters.network of a LanguageModel$"
    for content in ([weights], weights, {"state_dict": weights}, {"state_dict": weights, "hyper_parameters": {"lr": 1.0}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rule):
            LanguageModel.from_checkpoint(path)
    torch.save({"state_dict": {}, "config": asdict(make().config)}, path)
    with pytest.raises(ValueError, match=r"n_layers in .* \(2\) must be <= the number of its tensors \(0\)"):
        LanguageModel.from_checkpoint(path)
    renamed = {f"other.{name}": value for name, value in weights.items()}
    torch.save({"state_dict": renamed, "config": asdict(make().config)}, path)
    with pytest.raises(ValueError, match=r"weights in .* must hold model.embedding.weight"):
        LanguageModel.from_checkpoint(path)


def test_it_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"key \(num_expert\) must be one of the configuration's; the nearest is num_experts"):
        make(num_expert=4)
    with pytest.raises(ValueError, match=r"top_k \(5\) must be <= num_experts \(4\)"):
        make(top_k=5)
    with pytest.raises(ValueError, match=r"epsilon \(0.0\) must be > 0"):
        make(epsilon=0.0)
    for settings, message in [
        ({"d_model": "64"}, r"d_model \('64'\) must be int"),
        ({"attention_at": None}, r"attention_at \(None\) must be tuple"),
        ({"use_act": 1}, r"use_act \(1\) must be bool"),
        ({"epsilon": None}, r"epsilon \(None\) must be float"),
        ({"low_rank": 33}, r"low_rank \(33\) must be <= n_seq \(32\)"),
        ({"attention_at": (2,), "use_scattering_router": False}, r"attention_at \(\[2\]\) must be >= 0 and < n_layers \(2\)"),
        ({"attention_at": (1,)}, r"attention_at \(\[1\]\) must be empty with use_scattering_router \(True\)"),
        ({"schatten_threshold": 0.0}, r"schatten_threshold \(0.0\) must be > 0 and finite, or None for no limit"),
        ({"schatten_threshold": float("inf")}, r"schatten_threshold \(inf\) must be > 0 and finite, or None for no limit"),
        ({"k_max": 65}, r"k_max \(65\) must be <= 64"),
        ({"prime_bump_scale": float("nan")}, r"prime_bump_scale \(nan\) must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**settings)
    model = make()
    for ids, message in [
        (tokens(33), r"sequence of input_ids \(33\) must be >= 1 and <= n_seq \(32\)"),
        (tokens(0), r"sequence of input_ids \(0\) must be >= 1 and <= n_seq \(32\)"),
        (tokens().int(), r"input_ids \(2, 20\) torch.int32 must be int64"),
        (tokens() + 23, r"token \(\d+\) must be >= 0 and < vocab_size \(23\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(ids)
    for settings, message in [
        ({"max_length": 33}, r"max_length \(33\) must be >= the prompt's \(20\) and <= n_seq \(32\)"),
        ({"max_length": 30, "temperature": 0.0}, r"temperature \(0.0\) must be > 0"),
        ({"max_length": 30, "top_p": 0.0}, r"top_p \(0.0\) must be > 0 and <= 1"),
        ({"max_length": 30, "top_k": -1}, r"top_k \(-1\) must be >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(tokens(), **settings)
    with pytest.raises(ValueError, match=r"labels \(2, 3\) torch.int64 must be int64 \(2, 20\)"):
        model(tokens(), labels=tokens(3))
    mask = torch.arange(20).expand(2, 20) > 0
    with pytest.raises(ValueError, match=r"attention_mask \(0 at 2 tokens\) must be 1 at all of them where a state is given"):
        model(tokens(), mask, state=model.empty_state(2))
    with pytest.raises(ValueError, match=r"attention_mask \(0 at 2 tokens\) must be 1 at all"):
        model.generate(tokens(), attention_mask=mask)
    state = model(tokens(), state=model.empty_state(2)).state
    with pytest.raises(ValueError, match=r"sequence length \(40\) must be <= context_length \(32\)"):
        model(tokens(), state=state)
    with pytest.raises(ValueError, match=r"attention_mask \(2, 3\) must have the shape of input_ids \(2, 20\)"):
        model(tokens(), torch.ones(2, 3))


def test_transformers_knows_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import trix.resnet_bk.hugging_face

    model, ids = make(), tokens()
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).num_experts == 4
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(theirs, trix.resnet_bk.hugging_face.ResNetBKForCausalLM)
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    assert theirs(ids).hidden_states is None
    assert len(theirs(ids, output_hidden_states=True).hidden_states) == 3
    expected = model.generate(ids, 25, do_sample=False)
    for prompt in ({"inputs": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        assert torch.equal(theirs.generate(**prompt, max_new_tokens=5, do_sample=False), expected)
    assert torch.equal(theirs.generate(ids, max_length=25, do_sample=False), expected)
    with pytest.raises(ValueError, match=r"prompts \(2: inputs, input_ids\) must be given once"):
        theirs.generate(ids, input_ids=ids)
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(LanguageModel.from_pretrained(tmp_path / "again").eval()(ids).logits, model(ids).logits)
