"""What is wrong with a checkpoint, in one line."""


class CheckpointError(ValueError):
    """The checkpoint is missing or damaged, or of a kind that is not read. Names the file or the tensor, and the rule."""
