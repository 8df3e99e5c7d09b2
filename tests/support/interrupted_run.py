"""Run `trix` and send this process a SIGINT, as Ctrl-C does: python interrupted_run.py STEP MOMENT COMMAND OPTIONS

MOMENT: as in killed_run.py.
"""

import os
import signal
import sys

import killed_run

from lightning_modules.cli import main


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    killed_run.die = interrupt
    {"step": killed_run.die_at_step, "checkpoint": killed_run.die_in_checkpoint}[sys.argv[2]](int(sys.argv[1]))
    sys.exit(main(sys.argv[3:]))
