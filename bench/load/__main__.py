"""`python -m bench.load PROGRAM '{"port": ..., "dialect": ..., ...}'`: run one program, print its result as JSON."""

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from bench.load.jobs import batch, pickup
from bench.load.rates import rate
from bench.load.streams import streams
from bench.load.waits import waits

PROGRAMS: dict[str, Callable[..., Coroutine[Any, Any, dict[str, Any]]]] = {
    "batch": batch,
    "pickup": pickup,
    "rate": rate,
    "streams": streams,
    "waits": waits,
}


def main() -> None:
    _, program, arguments = sys.argv
    try:
        found = asyncio.run(PROGRAMS[program](**json.loads(arguments)))
    except Exception as error:  # noqa: BLE001  whatever it was, the bench shows it in one line
        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        found = {"error": f"{type(cause).__name__}: {cause}"}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
