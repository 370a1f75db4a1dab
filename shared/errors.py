"""The closed list of what can be wrong with a job: the `error.code` that ended it.

docs/errors.md lists them for clients; a test holds the two together.
"""

from enum import StrEnum


class JobErrorCode(StrEnum):
    """Why a job ended without a picture."""

    rejected = "rejected"  # the backend refuses this input; the same input will be refused again
    content_filtered = "content_filtered"  # a safety filter refused the prompt or the picture
    bad_output = "bad_output"  # what the backend sent was not one whole, acceptable picture
    backend_unavailable = "backend_unavailable"  # the backend answered with failures until MAX_ATTEMPTS was reached
    out_of_memory = "out_of_memory"  # the picture does not fit into the backend's memory
    worker_crashed = "worker_crashed"  # MAX_CRASHES workers died while they worked at it
    gave_up = "gave_up"  # tried, and then waited in the queue longer than MAX_WAIT_SECONDS
    expired = "expired"  # never tried: its deadline_seconds, or MAX_WAIT_SECONDS, passed first
    internal_error = "internal_error"  # a fault of ours, again and again until MAX_ATTEMPTS was reached
