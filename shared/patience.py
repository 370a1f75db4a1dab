"""A connection to PostgreSQL on which nobody waits for ever: we for no answer, and others for no lock of ours.

The server's own limits (statement_timeout) help as long as it lives. One that took a question and then stopped, or
whose network went silent, is noticed by nothing that libpq has while its machine still acknowledges what it is sent.

And they hold only while it runs a statement or waits for the next one, which it does not within a pipeline: a process
that is stopped there keeps its locks for as long as it is. So there are no pipelines.
"""

import time
from collections.abc import Generator, Iterable
from typing import Any

import psycopg


class _OneByOne(psycopg.Cursor[Any]):
    """As psycopg's, but that `executemany` is no pipeline."""

    def executemany(self, query: Any, params_seq: Iterable[Any], *, returning: bool = False) -> None:
        for params in params_seq:
            self.execute(query, params)


class PatientConnection(psycopg.Connection[Any]):
    """As psycopg's, but that a statement without its whole answer in `answer_seconds` ends the connection."""

    #: Longer than the server's own limit on a statement, which says more about what was wrong.
    answer_seconds: float | None = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cursor_factory = _OneByOne

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        if self.answer_seconds is None:
            return super().wait(gen, *args, **kwargs)
        try:
            return super().wait(_bounded(gen, self.answer_seconds), *args, **kwargs)
        except _NoAnswer:
            self.pgconn.finish()  # what it would still say would be taken for the answer to the next question
            raise


class _NoAnswer(psycopg.OperationalError):
    pass


def _bounded(gen: Generator[Any, Any, Any], seconds: float) -> Generator[Any, Any, Any]:
    """As `gen`, which psycopg resumes ten times a second while nothing comes."""
    deadline = time.monotonic() + seconds
    try:
        awaited = next(gen)
        while True:
            ready = yield awaited
            if time.monotonic() > deadline:
                raise _NoAnswer(f"the server has not answered within {seconds:g} seconds")
            awaited = gen.send(ready)
    except StopIteration as done:
        return done.value
