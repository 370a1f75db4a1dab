"""The project's own secret, which signs what goes to the URLs that its jobs name."""

import logging

from flask import Response, g
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from api.errors import Refused
from api.jobs import refuse_body
from api.openapi import KEY, answers
from api.schemas import NoQuery
from api.services import Services
from api.webhook_shapes import NewSecret, WebhookSecret
from shared import webhook_secrets
from shared.webhook_secrets import Vault

log = logging.getLogger(__name__)

_UNREADABLE = (
    "It was sealed under another DARKROOM_SECRET_KEY, and nothing is sent that would need it. Replace it "
    "(POST /v1/webhook-secret/rotate), or let the operator bring that key back."
)


def routes(services: Services) -> APIBlueprint:
    database, vault = services.database, Vault(services.settings.secret_key)
    blueprint = APIBlueprint(
        "webhook_secret", __name__, url_prefix="/v1", abp_tags=[Tag(name="webhooks")], abp_security=KEY
    )

    @blueprint.get(
        "/webhook-secret",
        operation_id="getWebhookSecret",
        summary="Read the secret of the project's webhooks",
        description="The URLs that jobs name verify signatures with it (Standard Webhooks). Endpoints have their own.",
        responses=answers({200: WebhookSecret}, refusals=(401, 406, 409, 422)),
    )
    def get_webhook_secret(query: NoQuery) -> Response:
        try:
            with database.read() as connection:
                known = webhook_secrets.live(connection, vault, g.project_id)
            if not known:
                with database.write() as tx:
                    known = [webhook_secrets.of_project(tx, vault, g.project_id)]
        except webhook_secrets.Unreadable as error:
            log.error("%s: %s", g.project_id, error)
            raise Refused("unreadable_secret", _UNREADABLE) from None
        return Response(WebhookSecret(secret=known[0]).model_dump_json(), content_type="application/json")

    @blueprint.post(
        "/webhook-secret/rotate",
        operation_id="rotateWebhookSecret",
        summary="Replace the secret of the project's webhooks",
        description="The one before signs for 24 hours more, beside the new one; older ones end at once.",
        responses=answers({200: NewSecret}, refusals=(401, 406, 413, 422)),
    )
    def rotate_webhook_secret(query: NoQuery) -> Response:
        refuse_body()
        with database.write() as tx:
            webhook_secrets.hold_project(tx, g.project_id)
            secret = webhook_secrets.rotate(tx, vault, g.project_id)
            previous = webhook_secrets.previous_expires_at(tx, g.project_id)
        body = NewSecret(secret=secret, previous_expires_at=previous)
        return Response(body.model_dump_json(), content_type="application/json")

    return blueprint
