"""Labelled texts, and texts as batches of token ids."""

from trix.superposition.data import datasets, tokenize
from trix.superposition.data.datasets import load_dataset_auto, load_kaggle_dataset, load_text, load_titles_csv, split_df
from trix.superposition.data.tokenize import collate_texts

__all__ = [
    "collate_texts",
    "datasets",
    "load_dataset_auto",
    "load_kaggle_dataset",
    "load_text",
    "load_titles_csv",
    "split_df",
    "tokenize",
]
