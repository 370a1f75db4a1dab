"""A connection to SQLite whose statements come to an end.

PostgreSQL has its `statement_timeout`. SQLite knows none, and a statement that reads a whole table, in the one writer's
transaction, would hold up everybody who writes; so it is asked now and then whether its time is over.
"""

import math
import sqlite3
import time
from typing import Any


class LimitedConnection(sqlite3.Connection):
    """As sqlite3's, but that a statement is interrupted, with an OperationalError, after `statement_seconds`.

    It is noticed late where single steps are slow. What SQLite does at an interrupted write: it takes the whole
    transaction back.
    """

    #: None: no limit.
    statement_seconds: float | None = 15.0
    #: Of SQLite's virtual machine, between two looks at the clock: 20 to 50 ms, so that most statements never look.
    #: Each look waits for Python's own lock, which takes 5 ms where other threads compute.
    STEPS = 1_000_000

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._until = math.inf
        self.set_progress_handler(self._is_over, self.STEPS)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """SQLAlchemy takes a new one for each statement."""
        self._begin()
        return super().cursor(*args, **kwargs)

    def execute(self, *args: Any) -> sqlite3.Cursor:
        self._begin()
        return super().execute(*args)

    def _begin(self) -> None:
        self._until = math.inf if self.statement_seconds is None else time.monotonic() + self.statement_seconds

    def _is_over(self) -> bool:
        return time.monotonic() > self._until
