"""The task: ask the vendor, write the picture to disk."""

import json
from pathlib import Path
from typing import Any

import requests
from celery import Celery

CONFIG: dict[str, Any] = json.loads(Path("baseline.json").read_text())

app = Celery("baseline", broker=CONFIG["redis_url"], backend=CONFIG["redis_url"])
# What the documentation says for tasks that must not be lost, and for tasks that take seconds.
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True, worker_prefetch_multiplier=1)
# Empty, as the documentation leaves it, unless a drill is generous: when does Redis give out again what was not acked?
app.conf.update(broker_transport_options=CONFIG["transport"], result_backend_transport_options=CONFIG["transport"])


@app.task(bind=True)
def generate(self: Any, prompt: str, width: int, height: int) -> str:
    """Make one picture; the name of its file."""
    answer = requests.post(
        CONFIG["vendor_url"],
        headers={"Authorization": f"Bearer {CONFIG['vendor_key']}"},
        json={
            "model": "stabilityai/stable-diffusion-xl-base-1.0",
            "data": {"prompt": prompt, "width": width, "height": height},
        },
        timeout=120,
    )
    answer.raise_for_status()
    name = f"{self.request.id}.png"
    (Path(CONFIG["pictures"]) / name).write_bytes(answer.content)
    return name
