"""Autoencoders that read what a feed-forward layer reads and write what it writes (arXiv:2406.11944)."""

from typing import Any

from trix.superposition.sae.batch_topk import BatchTopKSAE


class Transcoder(BatchTopKSAE):
    """z = f(x W_enc + b_enc), y_hat = z W_dec + b_dec: latents of a whole layer, between its input x and its output y.

    The number of active latents is held as in :class:`BatchTopKSAE`; nothing is subtracted from what is read.

    Args:
        d_out: width of the layer's output, by default d_model.
    """

    architecture = "transcoder"
    centres_input = False

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "d_out": self.d_out}
