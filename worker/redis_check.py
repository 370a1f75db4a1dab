"""What is wrong with a Redis that answers. No job depends on it: it is no reason to stop, but it is said at start."""

from typing import Any

import redis

OLDEST = (6, 2)


def complaints(client: redis.Redis) -> list[str]:
    """A line for each; none while Redis is away. It asks INFO, which is allowed where CONFIG is not."""
    try:
        info: dict[str, Any] = client.info()
    except redis.RedisError:
        return []
    found = []
    version = str(info.get("redis_version", ""))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        found.append(f"it is version {version or 'unknown'}; Darkroom is tested with 6.2 and newer")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        found.append(f"its maxmemory-policy is {policy}: it may drop tickets, and jobs start late; set noeviction")
    if not info.get("aof_enabled", 0):
        found.append("its append-only file is off: after a restart jobs wait for the sweep; set appendonly yes")
    return found
