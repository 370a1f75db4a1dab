"""A program for the tests: the supervisor with the processes of FOLDER/Procfile, each a stage of its own.

python -m tests.local.keep FOLDER [--grace SECONDS] [--first-pause SECONDS] [--good-life SECONDS]
    [--question COMMAND] [--every SECONDS] [--told-twice SECONDS]
"""

import argparse
import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import local.supervisor
from local import procfile
from local.output import show
from local.supervisor import Pauses, Question, Supervisor
from shared import settings


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--grace", type=float, default=30)
    parser.add_argument("--first-pause", type=float, default=0.02)
    parser.add_argument("--good-life", type=float, default=30)
    parser.add_argument("--question", default="")
    parser.add_argument("--every", type=float, default=0.1)
    parser.add_argument("--told-twice", type=float, default=local.supervisor._TOLD_TWICE_SECONDS)
    options = parser.parse_args()
    local.supervisor._TOLD_TWICE_SECONDS = options.told_twice
    pauses = Pauses(first=options.first_pause, longest=4 * options.first_pause, good_life=options.good_life)
    names = frozenset(command.name for command in procfile.read(options.folder / "Procfile"))
    question = Question(options.question, names, options.every) if options.question else None
    throw_away = options.folder / "throw-away"
    throw_away.mkdir()

    async def run() -> int:
        supervisor = Supervisor(
            options.folder, settings.child_environ({}), show, remove=[throw_away], pauses=pauses, question=question
        )

        async def work() -> int:
            for command in procfile.read(options.folder / "Procfile"):
                supervisor.start(replace(command, grace=options.grace))
            await asyncio.Event().wait()
            return 0

        return await supervisor.supervise(work)

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
