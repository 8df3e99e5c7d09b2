"""Cut the feed-forward layers of a trained model into tiles that signatures choose."""

from trix.upcycling.controls import best_choice, held_out_loss, prune
from trix.upcycling.groups import coactive_groups, random_groups
from trix.upcycling.signatures import Signatures, best_tiles, fit_signatures
from trix.upcycling.upcycled import GROUPINGS, Grouping, Upcycled, check_upcycling, cut, upcycle

__all__ = [
    "GROUPINGS",
    "Grouping",
    "Signatures",
    "Upcycled",
    "best_choice",
    "best_tiles",
    "check_upcycling",
    "coactive_groups",
    "cut",
    "fit_signatures",
    "held_out_loss",
    "prune",
    "random_groups",
    "upcycle",
]
