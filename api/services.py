"""What the routes work with: made once by create_app() and passed down."""

from dataclasses import dataclass

from redis import Redis

from api.auth import Keys
from api.depth import Depth
from api.forecast import Forecast
from api.routing import Router
from api.waiting import Waiting
from shared.announcements import Announcer
from shared.breaker import BreakerBoard
from shared.database import Database
from shared.image_store import ImageStore
from shared.inspector import Inspector
from shared.progress import ProgressBoard
from shared.settings import Settings
from shared.tickets import Bell


@dataclass(frozen=True)
class Services:
    settings: Settings
    database: Database
    images: ImageStore
    inspector: Inspector
    bell: Bell
    announcer: Announcer
    waiting: Waiting
    forecast: Forecast
    depth: Depth
    router: Router
    keys: Keys
    progress: ProgressBoard
    breakers: BreakerBoard
    #: For the readiness check, progress and breakers; the bell and the announcements have their own ways to Redis.
    redis: Redis

    def close(self) -> None:
        """Let go of threads and connections."""
        self.waiting.close()
        self.waiting.join()
        self.inspector.close()
        self.bell.close()
        self.announcer.close()
        self.router.close()
        self.redis.close()
        self.database.close()
