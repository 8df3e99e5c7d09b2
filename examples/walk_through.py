"""One page about one model: trained, explained, steered, edited and exported; each step beside what chance does.

It needs `make demo`, takes about a minute, and writes walk_through.html.
"""

import base64
import io
from collections import Counter
from contextlib import redirect_stdout
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from shared import LAYER, arguments
from torch import Tensor

from lightning_modules.cli import main
from lightning_modules.explained_model import read_model
from trix.superposition import DumpConfig, SAEConfig, analysis, dump, evaluation, sae, steering, viz
from trix.superposition.backends import TriXBackend
from trix.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
pre { background: #8882; padding: .7rem; overflow-x: auto; white-space: pre-wrap } img { max-width: 100% }
iframe { width: 100%; height: 24rem; border: 1px solid #8888 } :root { color-scheme: light dark }"""
PROMPT, NEW, NUM_TOKENS = "The function returns ", 60, 60_000
WANTED, WINDOW = 8, 64

folder, checkpoint = arguments(__doc__)
folder.root.mkdir(parents=True, exist_ok=True)
sections: list[str] = []


def add(title: str, *parts: str) -> None:
    print(title)
    sections.append(f"<h2>{escape(title)}</h2>" + "".join(parts))


def text(said: str) -> str:
    return f"<p>{escape(said)}</p>"


def shown(said: str) -> str:
    return f"<pre>{escape(said)}</pre>"


def drawn(figure: "Figure", alt: str) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80)
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">'


def trix(*words: str | Path) -> str:
    """What a command prints."""
    said = io.StringIO()
    with redirect_stdout(said):
        code = main([str(word) for word in words])
    assert code == 0, said.getvalue()
    return f"trix {' '.join(map(str, words))}\n{said.getvalue()}"


# Trained
model = read_model(str(checkpoint), "walk_through")
backend = model.backend
assert isinstance(backend, TriXBackend)
vocabulary = backend.vocabulary
prompt = backend.tokenize([PROMPT], WINDOW)


def written() -> str:
    ids = backend.generate(**prompt, max_new_tokens=NEW)
    return "".join(vocabulary[index] for index in ids[0].tolist())


add("Trained", text(f"{checkpoint}, as it continues a prompt:"), shown(written()))

# Explained
frame = pd.DataFrame({"text": model.training_texts(NUM_TOKENS, WINDOW), "label": 0})
dump.dump_layer_activations(frame, "text", "label", backend, DumpConfig(layer=LAYER, max_len=WINDOW), folder.root / "stream")
acts = dump.ActivationDump(folder.root / "stream")
cfg = SAEConfig(k=512, active=16, lr=2e-3, epochs=10, batch_size=1024, architecture="batch_topk")


def trained(restraint: str | None) -> sae.SAE:
    torch.manual_seed(0)
    made = sae.make_sae(acts.manifest.d_model, cfg)
    if restraint is not None:
        made.restrain(restraint)
    sae.train_sae(made, lambda: dump.stream_shards(acts.paths), cfg)
    return made


coder, control = trained(None), trained("frozen_decoder")
held_out = [backend.tokenize([window], WINDOW) for window in model.held_out_texts(8000, WINDOW)]
fit, of_control = (evaluation.model_fit(backend, LAYER, each, lambda: held_out) for each in (coder, control))
add(
    "Explained",
    text(
        f"{cfg.k} directions, {cfg.active} of them for each token of what enters block {LAYER}. With their sum in place of the "
        f"stream the loss on held-out text is {fit.loss_sae:.3f} nats. The model itself has {fit.loss:.3f}, with the mean of "
        f"the stream {fit.loss_mean:.3f}, so they recover {fit.recovered_mean:.1%}. Random directions, of which only the "
        f"encoder was trained, recover {of_control.recovered_mean:.1%}."
    ),
)

# What each latent is active on: the character that is read, and the one before it.
top = analysis.topk_sets_per_latent(coder, acts.paths, "cpu", k=200)
tokens, position = acts.column("tokids").tolist(), acts.column("position").tolist()


def pairs(latent: int) -> Counter[str]:
    places = [place for place in top[latent] if position[place] > 0]
    return Counter(vocabulary[tokens[place - 1]] + vocabulary[tokens[place]] for place in places)


found = {latent: pairs(latent) for latent in range(coder.k) if len(top[latent]) == 200}


def most_common(latent: int) -> list[str]:
    return [pair for pair, _ in found[latent].most_common(WANTED)]


def purity(latent: int) -> float:
    return sum(found[latent][pair] for pair in most_common(latent)) / max(found[latent].total(), 1)


def is_clear(latent: int) -> bool:
    return len(found[latent]) > 1 and purity(latent) > 0.9 and all(pair.isalpha() for pair in most_common(latent))


# Of those that stand for a few pairs of letters, the one whose activations are largest.
chosen = max(filter(is_clear, found), key=lambda latent: float(top.value_KA[latent].mean()), default=-1)
if chosen < 0:
    raise SystemExit("no latent stands for a few pairs of letters: has the model been trained?")
wanted = most_common(chosen)
x = torch.cat(list(dump.stream_shards(acts.paths)))
z = sae.latents_from_shard(coder, x, "cpu")
strength = float(z[:, chosen].max())
page = viz.top_activations_panel(chosen, acts.paths, acts.paths, coder, vocabulary, "cpu")
alike = z[:, chosen].argsort(descending=True)[:30]
often = z[alike].sum(0).argsort(descending=True)[:20].tolist()
busiest = [chosen, *(latent for latent in often if latent != chosen)]
said = [vocabulary[tokens[place]] for place in alike.tolist()]
add(
    f"Latent {chosen}",
    text(f"It is active on {' '.join(map(repr, wanted))}, with which {purity(chosen):.0%} of its 200 strongest tokens end."),
    f'<iframe title="texts of latent {chosen}" srcdoc="{escape(page)}"></iframe>',
    text("Its 30 strongest tokens, and the latents that are active on them most:"),
    drawn(viz.activation_heatmap(z[alike][:, busiest], said, busiest), "latents of the tokens on which it is strongest"),
)

# Steered
add_to = steering.set_or_scale_latent(chosen, set_to=strength)


def next_character() -> Tensor:
    with torch.no_grad():
        return backend.run(prompt["input_ids"], None)[0, -1].log_softmax(-1)


plain = next_character()
with steering.steering(backend, LAYER, coder, add_to):
    steered, continued = next_character(), written()
others = np.delete(np.arange(coder.k), chosen)
distances = []
for latent in np.random.default_rng(0).choice(others, 20, replace=False).tolist():
    with steering.steering(backend, LAYER, coder, steering.set_or_scale_latent(latent, set_to=strength)):
        distances.append(F.kl_div(next_character(), plain, reduction="sum", log_target=True).item())
distance = F.kl_div(steered, plain, reduction="sum", log_target=True).item()
most = (steered.exp() - plain.exp()).topk(4).indices.tolist()
add(
    "Steered",
    text(
        f"With the latent at {strength:.1f}, its largest, the next character moves by {distance:.3f} nats (KL divergence). "
        f"20 random others at the same value move it by {np.median(distances):.3f} in the median. More likely become "
        f"{', '.join(f'{vocabulary[index]!r} ({plain[index].exp():.3f} to {steered[index].exp():.3f})' for index in most)}."
    ),
    shown(continued),
)

# Edited and exported
edited, exported = folder.root / "edited.ckpt", folder.root / "edited.onnx"
for path in (edited, exported):
    path.unlink(missing_ok=True)
place = ["--layer", str(LAYER), "--tile", "3", "--tag", f"latent {chosen}"]
surgery = trix("surgery", checkpoint, "insert", "--ngrams", ",".join(wanted), *place, "--output", edited)
add(
    "Edited",
    text("A tile of that block gets a signature designed for what the latent is active on. What it will claim is said before."),
    shown(surgery),
)
add(
    "Exported",
    text("The edited model as one ONNX file, compared with torch on held-out text, and what it writes in onnxruntime."),
    shown(trix("export", "--ckpt", edited, "--output", exported)),
    shown(trix("generate", exported, "--prompt", PROMPT, "--num-tokens", str(NEW), "--temperature", "0")),
)

head = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
title = "A model, read and edited"
whole = f"{head}<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{''.join(sections)}"
write_whole(whole.encode(), folder.root / "walk_through.html")
print(f"{folder.root / 'walk_through.html'}: {len(whole) / 1000:,.0f} kB")
