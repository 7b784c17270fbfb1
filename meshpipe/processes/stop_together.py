"""Makes all processes of a run stop after the same step."""

import contextlib
import signal
import time

from meshpipe.processes.coordination import process_count, set_key, try_get_key
from meshpipe.processes.stop import StopRequest

STOP = "meshpipe/stop"


class StopTogether:
    """Makes all processes of a run stop after the same step when one receives a signal, without a barrier.

    It relies on a loop that dispatches step k + `ahead`, by default 2, only after it has read the result of step k,
    which requires that all processes have dispatched step k. So a process that gets a signal after dispatching step k
    can ask all to stop after step k + `ahead`: no process has dispatched more by then, and every process checks before
    it dispatches the next.
    """

    def __init__(self, request: StopRequest, ahead: int = 2) -> None:
        self._request, self._ahead = request, ahead
        self._has_set_key = False

    def after(self, step: int) -> bool:
        """Whether `step`, the last one dispatched, is the last of the run."""
        if process_count() == 1:
            return bool(self._request)
        if self._request.signal is not None and not self._has_set_key:
            self._has_set_key = True
            with contextlib.suppress(RuntimeError):  # another process got a signal first
                set_key(STOP, f"{step + self._ahead} {int(self._request.signal)}")
        agreed = try_get_key(STOP)
        if agreed is None:
            return False
        last, number = map(int, agreed.split())
        if self._request.signal is None:
            self._request.at = time.monotonic()
        self._request.signal = signal.Signals(number)
        return step >= last
