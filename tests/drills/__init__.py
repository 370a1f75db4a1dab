"""The drills: the real processes are started and broken, waited for to their end, and counted.

`./dev drill` runs them long, `./dev test` runs them short (`test_drills.py`), and `./dev drill --compare` runs the
same ones against a plain Flask and Celery app (`bench/baseline`).

To add one: a file of its own here, with a function that takes a `Run` (`run.py`: it submits, waits, and knows what
happened) and breaks something, and a `DRILL` that says what is promised (`drill.py` has the fields); then its line in
`all_drills.py`. What every drill promises (no job lost, no picture paid for in vain) is judged in `count.py`; what
this one alone promises it says itself, by `run.expect(...)`. What both systems can do stands in `systems.py`;
`tests/fault_proxy.py` breaks what a signal can't.
"""
