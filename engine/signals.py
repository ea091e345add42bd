"""Being told to stop: SIGTERM, SIGINT and SIGUSR1 let the running step end, the same one in all processes."""

import signal
import threading

import torch

from engine.distributed import all_reduce
from engine.errors import RunError, StoppedError

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Within this context the first of SIGNALS is remembered instead of ending the process; a second SIGINT ends it."""

    def __init__(self):
        self.signal, self.before = 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number, frame):
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, step):
        """The signal that any process has got, the same in all of them, or 0; called by all after every step.

        Raises RunError if the processes are not at the same step.
        """
        highest = all_reduce(torch.tensor([self.signal, step, -step]), "max").tolist()
        if highest[1] != -highest[2]:
            raise RunError(f"processes are at steps {-highest[2]} to {highest[1]}; repeat the command to continue")
        return highest[0]


def stopped(number, step):
    """The error that ends a run after a signal."""
    name = signal.Signals(number).name
    return StoppedError(f"stopped by {name} after step {step}, which is saved; the same command continues", number)
