"""What kind of file system a folder is on: a disk of this machine, its memory, or somebody else's over a network."""

import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
#: `root mount-point options … - type source`, blanks in paths written as \040.
_LINE = re.compile(r"^\S+ \S+ \S+ \S+ (\S+) .*? - (\S+) ", re.MULTILINE)

MEMORY = frozenset({"tmpfs", "ramfs"})
#: Several machines may write there, or its locks and shared memory are not those of one kernel.
NETWORK = frozenset(
    {
        *(
            "nfs",
            "nfs4",
            "cifs",
            "smb3",
            "smbfs",
            "9p",
            "afs",
            "ceph",
            "glusterfs",
            "lustre",
            "beegfs",
            "gpfs",
            "ocfs2",
        ),
        *("gfs2", "virtiofs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone", "fuse.juicefs"),
    }
)


def kind(folder: Path, mounts: str | None = None) -> str | None:
    """The type of the file system of a folder, which need not exist yet; None where nobody can tell (macOS).

    `mounts`: in place of /proc/self/mountinfo.
    """
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text()
        except OSError:
            return None
    place, found, depth = existing(folder), None, -1
    for point, type_ in _LINE.findall(mounts):
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))
        if place.is_relative_to(mounted) and len(mounted.parts) >= depth:  # of two at one point the later one counts
            found, depth = type_, len(mounted.parts)
    return found


def existing(folder: Path) -> Path:
    """The folder, or what is there of the way to it."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return place
