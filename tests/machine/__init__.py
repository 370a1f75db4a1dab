"""The life of jobs as a state machine: the real code, whose every step may be the last, in any order.

stepping.py    threads that stop before each step with an effect and go on as they are told
house.py       the databases with a clock that is turned by hand, the vendor who counts, worker processes, sweeps
promises.py    what must hold after every commit, after every rule, and in the end
test_life_machine.py   the rules; Hypothesis chooses their order, and shrinks what breaks a promise
test_shrunk_cases.py   what it found, kept
"""
