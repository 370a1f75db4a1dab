"""Every drill, in the order in which they are held."""

from tests.drills import (
    bad_pictures,
    doubled_tickets,
    emptied_redis,
    frozen_redis,
    full_disk,
    full_redis,
    full_spool,
    killed_api,
    killed_database,
    killed_mid_call,
    killed_workers,
    paused_worker,
    poison_job,
    restarted_redis,
    rolling_restarts,
    skewed_clocks,
    spooled_pictures,
)
from tests.drills.drill import Drill

DRILLS: dict[str, Drill] = {
    drill.name: drill
    for drill in (
        killed_api.DRILL,
        killed_workers.DRILL,
        rolling_restarts.DRILL,
        emptied_redis.DRILL,
        restarted_redis.DRILL,
        frozen_redis.DRILL,
        full_redis.DRILL,
        doubled_tickets.DRILL,
        paused_worker.DRILL,
        killed_database.DRILL,
        spooled_pictures.DRILL,
        killed_mid_call.DRILL,
        poison_job.DRILL,
        skewed_clocks.DRILL,
        full_disk.DRILL,
        full_spool.DRILL,
        bad_pictures.DRILL,
    )
}
