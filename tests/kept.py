"""What a backend hands over as received, in the place of a spool."""

from worker.backends.base import Read


class Kept(list[bytes]):
    """Everything that came, oldest first."""

    def keep(self, data: bytes) -> Read:
        self.append(data)
        return lambda: data
