"""A disk with little room, and somebody who fills it: a tmpfs, which only root may mount."""

import errno
import os
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

PROBE_BYTES = 1_000_000
#: What is written at once while it is filled; then less and less, until not a byte fits.
PIECE = 1024 * 1024


class SmallDisk:
    """It is there from its making to `close`."""

    def __init__(self, size: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="darkroom-disk-"))
        try:
            mount("-t", "tmpfs", "-o", f"size={size},mode=0755", "darkroom-drill", self.folder)
        except BaseException:
            self.folder.rmdir()
            raise

    def fill(self) -> None:
        """Somebody else writes until nothing more fits."""
        piece = PIECE
        with (self.folder / "filling").open("ab", buffering=0) as file:
            while piece:
                try:
                    piece = piece if file.write(b"\0" * piece) == piece else piece // 2
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    piece //= 2

    def free(self) -> None:
        """And removes it."""
        (self.folder / "filling").unlink()

    def close(self) -> None:
        """Unmount it, even from under somebody who still has a file open there. May be called twice."""
        if self.folder.exists():
            subprocess.run(["umount", "-l", str(self.folder)], check=True, capture_output=True)
            self.folder.rmdir()


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def no_small_disk() -> str | None:
    """Why there can be none on this machine."""
    if os.geteuid() != 0:
        return "only root may mount a disk with little room"
    try:
        with closing(SmallDisk(PROBE_BYTES)):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no disk with little room can be mounted here ({error})"
