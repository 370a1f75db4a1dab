"""Deliveries verified by libraries that know nothing of us: those of Standard Webhooks for Python and JavaScript."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from sqlalchemy import update
from standardwebhooks.webhooks import Webhook

from shared import receivers, webhook_secrets
from shared.database import Database, now
from shared.tables import deliveries
from tests.receiver import Letter, Receiver, says
from tests.worker.conftest import VAULT
from tests.worker.test_sender import an_endpoint, happen
from worker.sender import Sender

NPM = Path(sys.prefix) / "npm"  # `./dev test` makes it, where there is npm
VERIFY = Path(__file__).parent.parent / "npm" / "verify.mjs"

Verify = Callable[[Sequence[tuple[str, Letter]]], None]


def by_python(given: Sequence[tuple[str, Letter]]) -> None:
    for secret, letter in given:
        assert Webhook(secret).verify(letter.body, letter.headers) == letter.told


def by_javascript(given: Sequence[tuple[str, Letter]]) -> None:
    assert INSTALLED, "npm is there, and has not installed tests/npm"
    lines = [json.dumps({"secret": s, "headers": one.headers, "body": one.body.decode()}) for s, one in given]
    # As a text, so that it finds the library where that is installed.
    command = ["node", "--input-type=module", "-e", VERIFY.read_text()]
    said = subprocess.run(command, cwd=NPM, input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in said.splitlines()] == [True] * len(given)


INSTALLED = (NPM / "installed").exists() and shutil.which("node") is not None
#: Nobody reads in CI what was skipped: there an install that failed fails.
MUST = os.environ.get("CI") == "true" and shutil.which("npm") is not None
needs_npm = pytest.mark.skipif(not INSTALLED and not MUST, reason="npm has not installed tests/npm")


@pytest.mark.parametrize("verify", [by_python, pytest.param(by_javascript, marks=needs_npm)])
def test_every_delivery_verifies_also_after_a_retry_and_in_the_middle_of_a_rotation(
    verify: Verify, database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    def again() -> None:
        with database.write() as tx:
            receivers.pardon(tx, endpoint)
            tx.execute(update(deliveries).values(due_at=now(-1)))
            receivers.find_next_due(tx, endpoint)

    endpoint, old = an_endpoint(database, receiver.url)
    receiver.behaviour = says(500)
    happen(database, 5, input={"prompt": "f\u00fcchse \U0001f98a \u2028"})
    sender = a_sender()
    sender.work()
    first = list(receiver.letters)
    with database.write() as tx:
        new = webhook_secrets.rotate(tx, VAULT, endpoint)
    again()
    sender.work()
    second = receiver.letters[len(first) :]
    with database.write() as tx:
        newest = webhook_secrets.rotate(tx, VAULT, endpoint)
    receiver.behaviour = says(200)
    again()
    sender.work()
    third = receiver.letters[len(first) + len(second) :]
    assert first and second and third
    given = [(old, letter) for letter in (*first, *second)]
    given += [(new, letter) for letter in (*second, *third)]
    given += [(newest, letter) for letter in third]
    verify(given)


@needs_npm
def test_the_library_for_javascript_refuses_what_was_changed(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    _, secret = an_endpoint(database, receiver.url)
    happen(database)
    a_sender().work()
    [letter] = receiver.letters
    by_javascript([(secret, letter)])
    with pytest.raises(AssertionError):
        by_javascript([(secret, Letter(letter.path, letter.headers, letter.body + b" ", letter.at))])
