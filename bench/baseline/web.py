"""The web side: submit, ask for the status, get the picture."""

from pathlib import Path

from celery.result import AsyncResult
from flask import Flask, Response, jsonify, request, send_from_directory, url_for

from bench.baseline.tasks import CONFIG, generate
from bench.baseline.tasks import app as celery

app = Flask(__name__)
PICTURES = Path(CONFIG["pictures"]).resolve()


@app.post("/jobs")
def submit() -> tuple[Response, int]:
    wanted = request.get_json()
    result = generate.delay(str(wanted["prompt"]), int(wanted["width"]), int(wanted["height"]))
    return jsonify(id=result.id, status_url=url_for("status", job_id=result.id)), 202


@app.get("/jobs/<job_id>")
def status(job_id: str) -> Response:
    result = AsyncResult[str](job_id, app=celery)
    state = result.state
    if state == "FAILURE":
        return jsonify(id=job_id, status=state, error=str(result.result))
    if state != "SUCCESS":  # PENDING is also what Celery says of an id that it never heard of
        return jsonify(id=job_id, status=state)
    done = result.date_done
    return jsonify(
        id=job_id,
        status=state,
        completed_at=str(done),
        image_url=url_for("image", job_id=job_id),
    )


@app.get("/jobs/<job_id>/image")
def image(job_id: str) -> Response:
    result = AsyncResult[str](job_id, app=celery)
    return send_from_directory(PICTURES, result.get(timeout=1), mimetype="image/png")
