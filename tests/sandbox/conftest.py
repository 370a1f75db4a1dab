"""One sandbox for all tests of this folder, without rules and with clean books for each."""

from collections.abc import Iterator

import pytest

from sandbox.server import Sandbox


@pytest.fixture(scope="session")
def running_sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running_sandbox: Sandbox) -> Sandbox:
    running_sandbox.clear()
    # A client that hung up is noticed when something is next sent to it: on a slow machine, in the next test.
    running_sandbox.wait_until(lambda calls: calls["in_flight"] == 0, 60)
    running_sandbox.reset_calls()
    return running_sandbox
