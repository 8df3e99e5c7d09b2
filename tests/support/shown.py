"""What a test shows at the end of the run, whatever process it ran in: ``record_property(SHOWN, text)``."""

SHOWN = "shown"
