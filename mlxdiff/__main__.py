"""``mlxdiff`` and ``python -m mlxdiff``: handle signals first, then import the rest.

``_signal`` is what ``signal`` is made of. It is there at once, ``signal`` takes milliseconds.
"""

import _signal
import os

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, lambda number, frame: os._exit(128 + number))

from mlxdiff.machine import stopping

stopping.own_process()

from mlxdiff.cli import main  # noqa: E402 - signals come first

if __name__ == "__main__":
    main(prog_name="mlxdiff")
