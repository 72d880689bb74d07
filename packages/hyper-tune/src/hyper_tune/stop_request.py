"""SIGTERM, as a wish that the training loop looks at when it can."""

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Notes that the process was asked to end, from `__enter__` to `__exit__`, and does no more.

    Schedulers send SIGTERM and wait before they kill. The handler sets a flag: a save from within
    it could find any state half-changed, and one rank's would leave the others waiting. Outside
    the main thread no handler can be set, and SIGTERM ends the process as ever.

    >>> import os, signal
    >>> with StopRequest() as stop:
    ...     before = stop.requested
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     (before, stop.requested)
    (False, True)
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._sets = threading.current_thread() is threading.main_thread()
        if self._sets:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._sets:
            signal.signal(signal.SIGTERM, self._before)
