"""Makes a worker stand still on purpose, inside: on PYTHONPATH, `sitecustomize.py` here waits for signals.

The signals are real-time ones, which neither Celery nor Python uses.
"""

import signal

#: No thread gets a claim any more: one holds the turn for ever.
CLAIMS = signal.SIGRTMIN + 1
#: Celery's consumer, the main thread, waits for ever.
CONSUMER = signal.SIGRTMIN + 2
#: Nothing is written any more, the heartbeat included: somebody holds SQLite's turn for ever.
WRITER = signal.SIGRTMIN + 3
#: The consumer's connection to Redis is half-open: nothing comes, and nobody hangs up.
HALF_OPEN = signal.SIGRTMIN + 4
