"""What the guards see, all of it: a table of ok, warning and wrong, with what to do. Exit code 1 if anything is wrong.

    python -m worker.doctor

For the settings of the environment it runs in. `./dev doctor` is the same for what `./dev up` would run, and says by
`--not-yet NAME` what is not there because nothing was started so far.
"""

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing

from sqlalchemy import func, select

from shared import guards, settings
from shared.announcements import client
from shared.database import AWAY, Database
from shared.guards import Finding, Level, Place, ok, warning, wrong
from shared.present import was_seen
from shared.settings import Settings
from shared.tables import workers
from worker.backends.automatic1111 import server_backend
from worker.backends.base import CannotLoad
from worker.backends.diffusers import local_backend

#: A line: what was looked at, and what was seen.
Line = tuple[str, Finding]

#: As the Procfile starts worker-dataoorts.
SLOTS = 200
WIDTH = 118


def of_dataoorts(wanted: Settings) -> list[Line]:
    if wanted.sandbox:
        return [("dataoorts", ok(f"the sandbox at {wanted.dataoorts_url} stands in for the vendor"))]
    if not wanted.dataoorts_api_key:
        return [
            ("dataoorts", wrong("DATAOORTS_API_KEY is not set: its worker refuses to start", "set the vendor's key"))
        ]
    return [("dataoorts", ok(f"pictures come from {wanted.dataoorts_url} and cost money; its key is not tried here"))]


def of_diffusers(wanted: Settings) -> list[Line]:
    try:
        return [(name, ok(says)) for name, says in local_backend(wanted).survey()]
    except CannotLoad as error:
        return [("gpu", wrong(f"its worker refuses to start: {error}", "docs/gpu.md says what it needs"))]


def of_automatic1111(wanted: Settings) -> list[Line]:
    if wanted.automatic1111_sandbox:
        return [("automatic1111", ok(f"the sandbox at {wanted.automatic1111_url} stands in for a server"))]
    with closing(server_backend(wanted)) as backend:
        found = backend.troubles()
    if not found:
        return [("automatic1111", ok(f"the server at {wanted.automatic1111_url} answers; its pictures cost nothing"))]
    return [("automatic1111", warning(trouble, "docs/backends.md says what it needs")) for trouble in found]


#: What is to be known of each backend: as many lines as it takes.
BACKENDS: Mapping[str, Callable[[Settings], list[Line]]] = {
    "dataoorts": of_dataoorts,
    "diffusers": of_diffusers,
    "automatic1111": of_automatic1111,
}


def of_senders(wanted: Settings) -> list[Line]:
    if wanted.public_url is None:
        return [
            ("public url", wrong("DARKROOM_PUBLIC_URL is not set: the senders of webhooks refuse to start", "set it"))
        ]
    return [("public url", ok(f"links begin with {wanted.public_url}"))]


def of_workers(place: Place) -> Line:
    """Who is there, by kind."""
    query = select(workers.c.backend, func.count(), func.count(workers.c.trouble)).where(was_seen())
    try:
        with place.database.read() as connection:
            found = {
                work: (there, stuck) for work, there, stuck in connection.execute(query.group_by(workers.c.backend))
            }
    except AWAY:
        return "workers", warning("they could not be asked for", "see the database's own line")
    missing = [work for work in (*place.settings.backends, "deliver", "sweep") if work not in found]
    stuck = [work for work, (_, some) in found.items() if some]
    says = ", ".join(f"{there} for {work}" for work, (there, _) in sorted(found.items())) or "none is there"
    if missing or stuck:
        what = [f"nobody for {', '.join(missing)}"] * bool(missing) + [f"stuck: {', '.join(stuck)}"] * bool(stuck)
        return "workers", warning(f"{says}; {'; '.join(what)}", "start them; `python -m worker.health` says more")
    return "workers", ok(says)


def lines(not_yet: Mapping[str, str]) -> Iterator[Line]:
    """All of them. `not_yet`: names of lines, or their first words, that say this and ask nothing."""

    def skipped(name: str) -> str | None:
        return not_yet.get(name) or not_yet.get(name.partition(" ")[0])

    try:
        wanted = settings.load()
    except settings.SettingsError as error:
        for line in str(error).splitlines():
            yield "settings", wrong(line, "mend it; README.md has the list. What needs settings is not looked at")
        return
    yield "settings", ok("every value is a good one")
    with closing(Database(wanted.database_url, connections=1, wait_seconds=5)) as database:
        yield from _of(Place(wanted, database, client(wanted), SLOTS), skipped)


def _of(place: Place, skipped: Callable[[str], str | None]) -> Iterator[Line]:
    wanted = place.settings
    for guard in guards.GUARDS:
        if says := skipped(guard.name):
            yield guard.name, ok(says)
        else:
            [(_, finding)] = guards.look(place, [guard])
            yield guard.name, finding
    for backend in wanted.backends:
        if says := skipped(backend):
            yield backend, ok(says)
        elif backend in BACKENDS:
            yield from BACKENDS[backend](wanted)
    yield from of_senders(wanted)
    yield ("workers", ok(says)) if (says := skipped("workers")) else of_workers(place)


def table(found: Sequence[Line]) -> str:
    """With what to do under what was seen."""
    rows = []
    room = max(len(name) for name, _ in found) + 2
    for name, finding in found:
        texts = [finding.says, *([f"-> {finding.do}"] if finding.do else [])]
        wrapped = [line for text in texts for line in textwrap.wrap(text, WIDTH - 9 - room, subsequent_indent="  ")]
        first = f"{finding.level:<9}{name:<{room}}"
        rows += [f"{first if number == 0 else ' ' * len(first)}{line}" for number, line in enumerate(wrapped)]
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--not-yet", action="append", default=[], metavar="NAME=WHY", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    found = list(lines(dict(given.partition("=")[::2] for given in options.not_yet)))
    print(table(found))
    bad = sum(finding.level is Level.wrong for _, finding in found)
    doubtful = sum(finding.level is Level.warning for _, finding in found)
    print(f"\n{bad} wrong, {doubtful} warnings" if bad or doubtful else "\nall is well")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
