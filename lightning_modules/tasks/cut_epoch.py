"""The place in an epoch at which a training ended, as at trainer.max_steps, for a run that goes on with more steps."""

from typing import Any


def settle_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a resumed run go on where training ended; changes the content of the checkpoint in place.

    Lightning counts the epoch as done before the checkpoint at the end of a training is written, and keeps the number of its
    batches. A resumed run would leave out the rest of that epoch, or after a whole one all but the first batch of the next.
    """
    try:
        loop = checkpoint["loops"]["fit_loop"]
        batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
        if batches["current"]["ready"] == 0 or epochs["current"]["processed"] != epochs["current"]["started"]:
            return
        num_done = int(batches["is_last_batch"])
        for counts in (epochs["total"], epochs["current"]):
            counts["processed"] = counts["completed"] = counts["started"] - 1 + num_done
        if batches["is_last_batch"]:
            batches["current"] = dict.fromkeys(batches["current"], 0)
            batches["is_last_batch"] = False
    except (KeyError, TypeError):  # no state of loops: it is Lightning that reads it, and says so
        return
