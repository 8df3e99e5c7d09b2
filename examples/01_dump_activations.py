"""Write what enters a block of a language model, at every token of labelled texts."""

from shared import LAYER, arguments, documented, open_backend

from trix.superposition import DumpConfig, data, dump

folder, checkpoint = arguments(__doc__)
backend = open_backend(checkpoint)
folder.root.mkdir(parents=True, exist_ok=True)
documented(backend.vocabulary).to_csv(folder.titles, index=False)

df = data.load_titles_csv(folder.titles, text_col="title", label_col="topic")
cfg = DumpConfig(layer=LAYER, max_len=64, batch_size=64)
dump.dump_layer_activations(df, "title", "topic", backend, cfg, folder.shards)

manifest = dump.ActivationDump(folder.shards).manifest
print(f"{folder.titles}: {len(df)} texts of the classes {', '.join(df.attrs['classes'])}")
print(f"{folder.shards}: {manifest.tokens} tokens of width {manifest.d_model}")
