"""`python -m sandbox [--host 127.0.0.1] [--port 0]`: the sandbox as a process of its own."""

import argparse
import os
import signal
import sys
import threading

from sandbox.box import PACE
from sandbox.server import Sandbox


def main() -> None:
    what = "A stand-in for the vendor Dataoorts, and for a machine with a GPU."
    parser = argparse.ArgumentParser(prog="python -m sandbox", description=what)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", default=0, type=int, help="port to listen on (default: a free one)")
    arguments = parser.parse_args()

    asked_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_end.set())
    try:
        sandbox = Sandbox(arguments.host, arguments.port).start()
        sandbox.box.pace = PACE
    except OSError as error:
        sys.exit(f"sandbox: can't listen on {arguments.host}:{arguments.port}: {error.strerror}")
    print(f"sandbox: listening on {sandbox.url}", flush=True)
    asked_to_end.wait()
    os._exit(0)  # at once: connections and half-painted pictures are not worth waiting for


if __name__ == "__main__":
    main()
