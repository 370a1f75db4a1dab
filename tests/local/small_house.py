"""A program for the tests: `./dev up` and `./dev demo` with a house of few rooms.

    python -m tests.local.small_house up|demo ROOT MIGRATIONS PATIENCE [arguments of up or demo]

The processes are those of ROOT/Procfile, MIGRATIONS is a shell command, and the sandbox is a stub. PATIENCE is for each
part, Redis too: so many seconds it may take to answer.
"""

import sys
from pathlib import Path

from local import demo, up
from local.service import House

if __name__ == "__main__":
    habit, root, migrations, patience, *arguments = sys.argv[1:]
    stub = Path(__file__).with_name("stub_server.py")
    house = House(Path(root), migrations, f"python {stub} {{port}}", patience=float(patience))
    sys.exit({"up": up.main, "demo": demo.main}[habit](arguments, house))
