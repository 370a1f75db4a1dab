"""What a signal handler may set, and everybody else waits for."""

import threading


class Stop(threading.Event):
    """An Event whose lock its own thread may take twice.

    A handler runs in the main thread, wherever that is: also in the middle of `set` or `wait` of this very event, as at
    a second SIGTERM. With an Event's own lock it would wait there for itself, for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cond = threading.Condition(threading.RLock())
