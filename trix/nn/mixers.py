"""The mixers that a configuration can name."""

from trix.nn.attention import RotaryAttention
from trix.nn.mixer import Mixer
from trix.nn.resolvent_mixer import ResolventMixer
from trix.nn.ssd_mixer import SSDMixer
from trix.registry import Registry

MIXERS: Registry[Mixer] = Registry("mixer", Mixer)  # type: ignore[type-abstract]
MIXERS.register("attention", RotaryAttention)
MIXERS.register("resolvent", ResolventMixer)
MIXERS.register("ssd", SSDMixer)
