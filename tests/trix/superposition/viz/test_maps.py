import io
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from trix.superposition.analysis import create_reducer, trim_outliers
from trix.superposition.viz import activation_heatmap, latents_labels_map, titles_map

RNG = np.random.default_rng(0)
Z_PK = np.abs(RNG.normal(size=(40, 6))).astype(np.float32)
CLASSES = np.arange(40) % 3


class FirstTwo:
    """A reducer that keeps the first two columns."""

    def fit(self, X: Any) -> "FirstTwo":
        return self

    def transform(self, X: Any) -> Any:
        return np.asarray(X)[:, :2]

    def fit_transform(self, X: Any) -> Any:
        return self.transform(X)


class Broken(FirstTwo):
    def __init__(self, points: Any) -> None:
        self.points = points

    def transform(self, X: Any) -> Any:
        return self.points


def scattered(figure: Figure) -> dict[str, PathCollection]:
    return {str(artist.get_label()): artist for artist in figure.axes[0].collections if isinstance(artist, PathCollection)}


def points(artist: PathCollection) -> Any:
    return np.asarray(artist.get_offsets())


def colour(artist: PathCollection) -> str:
    return to_hex(artist.get_facecolor()[0])


def draw(figure: Figure) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png", dpi=40)


def test_documents_are_points_coloured_by_class() -> None:
    figure = titles_map(Z_PK, CLASSES, FirstTwo(), trim_p=100.0, figsize=(5.0, 4.0))
    found = scattered(figure)
    assert list(found) == ["0", "1", "2"]
    for name, artist in found.items():
        np.testing.assert_array_equal(points(artist), Z_PK[int(name) == CLASSES, :2])
    assert len({colour(artist) for artist in found.values()}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1", "2"]
    assert figure.axes[0].get_title() == "40 of 40 documents"
    assert figure.get_size_inches().tolist() == [5.0, 4.0]
    draw(figure)


def test_outliers_are_left_out_but_keep_their_colour() -> None:
    Z = Z_PK.copy()
    Z[CLASSES == 0] += 100
    Z[0] += 1e6
    is_kept = trim_outliers(Z[:, :2], 60.0)
    figure = titles_map(Z, CLASSES, FirstTwo(), trim_p=60.0)
    found = scattered(figure)
    assert sum(len(points(artist)) for artist in found.values()) == is_kept.sum() < 40
    for name, artist in found.items():
        np.testing.assert_array_equal(points(artist), Z[is_kept & (int(name) == CLASSES), :2])
    whole = scattered(titles_map(Z, CLASSES, FirstTwo(), trim_p=100.0))
    assert colour(found["1"]) == colour(whole["1"])
    assert figure.axes[0].get_title() == f"{is_kept.sum()} of 40 documents, without outliers"


def test_classes_may_be_names_or_many_and_rows_a_tensor() -> None:
    names = np.array(["world", "$port"])[CLASSES % 2]
    figure = titles_map(torch.as_tensor(Z_PK, dtype=torch.bfloat16), names.tolist(), create_reducer())
    assert list(scattered(figure)) == [r"\$port", "world"]
    draw(figure)
    many = titles_map(Z_PK, torch.arange(40), FirstTwo(), trim_p=100.0)
    assert len({colour(artist) for artist in scattered(many).values()}) == 40
    draw(many)


def test_the_reducer_that_a_map_has_fitted_serves_the_next() -> None:
    reducer = create_reducer()
    figure = titles_map(Z_PK, np.zeros(40, dtype=int), reducer, trim_p=100.0)
    latents = latents_labels_map(reducer, Z_PK, [0], ["a"])
    np.testing.assert_allclose(points(scattered(figure)["0"]), points(scattered(latents)["documents"]), atol=1e-5)
    with pytest.raises(ValueError, match="not fitted"):
        latents_labels_map(create_reducer(), Z_PK, [0], ["a"])


@pytest.mark.parametrize("medoids", [[4, 1], range(6), torch.tensor([5])])
def test_a_latent_stands_at_the_weighted_mean_of_its_documents(medoids: Any) -> None:
    """Fewer latents than columns, or as many."""
    labels = [f"latent {latent}" for latent in medoids]
    figure = latents_labels_map(FirstTwo(), Z_PK, medoids, labels, alpha_bg=0.3)
    found = scattered(figure)
    assert list(found) == ["documents", "latents"]
    np.testing.assert_array_equal(points(found["documents"]), Z_PK[:, :2])
    assert found["documents"].get_alpha() == 0.3
    means = [np.average(Z_PK[:, :2], axis=0, weights=Z_PK[:, latent]) for latent in np.asarray(medoids)]
    np.testing.assert_allclose(points(found["latents"]), means, rtol=1e-6)
    notes: Any = figure.axes[0].texts
    assert [note.get_text() for note in notes] == labels
    np.testing.assert_allclose([note.xy for note in notes], means, rtol=1e-6)
    draw(figure)


def test_the_place_of_a_latent_does_not_depend_on_the_unit_of_its_activations() -> None:
    reducer = create_reducer().fit(Z_PK)
    scaled = Z_PK.copy()
    scaled[:, 3] *= 1000

    class Unscaled(FirstTwo):
        def transform(self, X: Any) -> Any:
            return reducer.transform(Z_PK)

    first, second = (points(scattered(latents_labels_map(Unscaled(), Z, [3], ["a"]))["latents"]) for Z in (Z_PK, scaled))
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_sport_has_its_colour_and_latents_without_documents_are_counted() -> None:
    Z = Z_PK.copy()
    Z[:, 2] = 0
    figure = latents_labels_map(FirstTwo(), Z, [0, 2, 5, 1], ["a ", "b", "$c\n", "d"], is_sport=[True, True, False, False])
    found = scattered(figure)
    assert [len(points(found[name])) for name in ("sport", "other")] == [1, 2]
    assert (colour(found["sport"]), colour(found["other"])) == ("#e08214", "#2166ac")
    assert [text.get_text() for text in figure.axes[0].texts] == ["a ", r"\$c⏎", "d"]
    assert figure.axes[0].get_title() == "3 latents, 40 documents; 1 more are active in no document"
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["documents", "sport", "other"]
    draw(figure)


def test_the_heat_map_shows_the_latents_with_the_largest_activations() -> None:
    z_NK = np.array([[0.0, 3.0, 0.0, 1.0], [2.0, 0.0, 0.0, 3.0], [0.0, 0.0, 0.5, 0.0]])
    figure = activation_heatmap(z_NK, ["a ", "\n", "$"], ["p", "q", "r", "s"], top_k=3)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), z_NK[:, [1, 3, 0]].T)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "s", "p"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a␣", "⏎", r"\$"]
    assert axes.images[0].get_clim() == (0.0, 3.0)
    draw(figure)


def test_the_heat_map_labels_as_many_tokens_as_there_is_room_for() -> None:
    figure = activation_heatmap(torch.zeros(950, 2), range(950), range(2))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [str(token) for token in range(0, 950, 10)]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "1"]
    draw(figure)


def test_errors_of_documents() -> None:
    with pytest.raises(ValueError, match=r"Z_titles \(0, 6\) must be \[P, K\], each >= 1"):
        titles_map(Z_PK[:0], CLASSES[:0], FirstTwo())
    with pytest.raises(ValueError, match=r"y \(39,\) must be a class of each of the documents of Z_titles \(40, 6\)"):
        titles_map(Z_PK, CLASSES[1:], FirstTwo())
    with pytest.raises(ValueError, match=r"y \(1 are NaN\) must be a class of each of 40 documents"):
        titles_map(Z_PK, [np.nan, *[1.0] * 39], FirstTwo())
    with pytest.raises(ValueError, match=r"Z_titles \(240 values that are not\) must be finite"):
        titles_map(Z_PK * np.nan, CLASSES, FirstTwo())
    with pytest.raises(ValueError, match=r"p \(0\) must be > 0 and <= 100"):
        titles_map(Z_PK, CLASSES, FirstTwo(), trim_p=0)
    with pytest.raises(ValueError, match=r"points of the reducer \(40, 3\) must be \(40, 2\): two components"):
        titles_map(Z_PK, CLASSES, create_reducer(n_components=3))
    with pytest.raises(ValueError, match=r"points of the reducer \(1 values that are not\) must be finite"):
        titles_map(Z_PK[:2], CLASSES[:2], Broken([[0.0, 0.0], [0.0, np.inf]]))


def test_errors_of_latents() -> None:
    with pytest.raises(ValueError, match=r"medoids \(0 to 6\) must be >= 0 and < columns of Z_titles \(6\); .*range\(6\)"):
        latents_labels_map(FirstTwo(), Z_PK, [0, 6], ["a", "b"])
    with pytest.raises(ValueError, match=r"medoids \(-1 to -1\) must be >= 0"):
        latents_labels_map(FirstTwo(), Z_PK, [-1], ["a"])
    with pytest.raises(ValueError, match=r"medoids \(float64 \(0,\)\) must be int \[M\] with M >= 1"):
        latents_labels_map(FirstTwo(), Z_PK, [], [])
    with pytest.raises(ValueError, match=r"medoids \(float64 \(1, 2\)\) must be int \[M\]"):
        latents_labels_map(FirstTwo(), Z_PK, [[0.5, 1.0]], ["a"])
    with pytest.raises(ValueError, match=r"labels_text \(1\) must be as many as the latents in medoids \(2\)"):
        latents_labels_map(FirstTwo(), Z_PK, [0, 1], ["a"])
    with pytest.raises(ValueError, match=r"is_sport \(bool \(1,\)\) must be bool \[M\], M = 2 latents in medoids"):
        latents_labels_map(FirstTwo(), Z_PK, [0, 1], ["a", "b"], is_sport=[True])
    with pytest.raises(ValueError, match=r"alpha_bg \(2\) must be >= 0 and <= 1"):
        latents_labels_map(FirstTwo(), Z_PK, [0], ["a"], alpha_bg=2)
    with pytest.raises(ValueError, match=r"Z_titles \(smallest: -1\) must be >= 0"):
        latents_labels_map(FirstTwo(), -np.ones((3, 2)), [0], ["a"])


def test_errors_of_heat_maps() -> None:
    with pytest.raises(ValueError, match=r"activations \(0,\) must be \[N, K\], each >= 1"):
        activation_heatmap([], [], [])
    with pytest.raises(ValueError, match=r"token_labels \(2\) must be as many as those of activations \(3, 2\): 3"):
        activation_heatmap(np.zeros((3, 2)), ["a", "b"], ["c", "d"])
    with pytest.raises(ValueError, match=r"latent_labels \(3\) must be as many as those of activations \(3, 2\): 2"):
        activation_heatmap(np.zeros((3, 2)), list("abc"), list("abc"))
    with pytest.raises(ValueError, match=r"top_k \(0\) must be >= 1"):
        activation_heatmap(np.zeros((1, 1)), ["a"], ["b"], top_k=0)
    with pytest.raises(ValueError, match=r"activations \(1 values that are not\) must be finite"):
        activation_heatmap([[np.nan, 1.0]], ["a"], ["b", "c"])


def test_the_package_loads_no_matplotlib_and_drawing_no_pyplot_and_no_ipython() -> None:
    code = (
        "import sys, numpy as np; from trix.superposition import viz;"
        "loaded = {'matplotlib', 'pydantic', 'sklearn'} & {*sys.modules};"
        "viz.activation_heatmap(np.ones((2, 2)), 'ab', 'cd');"
        "print(loaded, {'matplotlib.pyplot', 'IPython'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.returncode) == ("set() set()", 0), result.stderr
