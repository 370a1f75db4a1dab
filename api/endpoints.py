"""Endpoints: the URLs that a project registers to be told of its events."""

from collections.abc import Callable
from typing import Any

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from sqlalchemy import Connection, Row, select

from api.deliveries import read_delivery
from api.errors import Refused, not_found
from api.jobs import refuse_body
from api.openapi import KEY, answers
from api.schemas import NoQuery
from api.services import Services
from api.webhook_shapes import (
    ChangeEndpoint,
    Delivery,
    Endpoint,
    EndpointList,
    EndpointPath,
    NewEndpoint,
    NewSecret,
    PageQuery,
    Redelivered,
    RedeliverSince,
    RegisterEndpoint,
    since_of,
)
from shared import endpoints as life
from shared import webhook_secrets
from shared.ids import is_id
from shared.tables import Disabled, endpoints
from shared.webhook_secrets import Vault


def routes(services: Services) -> APIBlueprint:
    database, vault = services.database, Vault(services.settings.secret_key)
    blueprint = APIBlueprint(
        "endpoints", __name__, url_prefix="/v1/endpoints", abp_tags=[Tag(name="webhooks")], abp_security=KEY
    )

    @blueprint.post(
        "",
        operation_id="registerEndpoint",
        summary="Register an endpoint",
        description="It is told of what happens from now on. Its secret is shown in this answer and never again.",
        responses=answers({201: NewEndpoint}, refusals=(400, 401, 406, 409, 413, 415, 422), headers=("Location",)),
    )
    def register_endpoint(query: NoQuery, body: RegisterEndpoint) -> Response:
        try:
            with database.write() as tx:
                row, secret = life.register(tx, vault, project_id=g.project_id, **body.model_dump())
        except life.TooMany:
            most = f"A project may have {life.MOST_ENDPOINTS}: remove one that is not needed."
            raise Refused("too_many_endpoints", most) from None
        made = NewEndpoint(**life.as_stored(row), secret=secret)
        base_url = services.settings.public_url or request.host_url
        where = {"Location": f"{base_url.rstrip('/')}/v1/endpoints/{row.id}"}
        return Response(made.model_dump_json(), 201, where, content_type="application/json")

    @blueprint.get(
        "",
        operation_id="listEndpoints",
        summary="List endpoints, newest first",
        responses=answers({200: EndpointList}, refusals=(401, 406, 422)),
    )
    def list_endpoints(query: PageQuery) -> Response:
        statement = select(endpoints).where(endpoints.c.project_id == g.project_id)
        if query.cursor is not None:
            statement = statement.where(endpoints.c.id < f"end_{query.cursor}")
        with database.read() as connection:
            rows = connection.execute(statement.order_by(endpoints.c.id.desc()).limit(query.limit + 1)).all()
        page, has_more = rows[: query.limit], len(rows) > query.limit
        body = EndpointList(
            data=[_show(row) for row in page],
            has_more=has_more,
            next_cursor=page[-1].id.removeprefix("end_") if has_more else None,
        )
        return Response(body.model_dump_json(), content_type="application/json")

    @blueprint.get(
        "/<id>",
        operation_id="getEndpoint",
        summary="Read an endpoint",
        responses=answers({200: Endpoint}, refusals=(401, 404, 406, 422)),
    )
    def get_endpoint(path: EndpointPath, query: NoQuery) -> Response:
        if not is_id("end", path.id):
            raise not_found()
        its = (endpoints.c.id == path.id, endpoints.c.project_id == g.project_id)
        with database.read() as connection:
            row = connection.execute(select(endpoints).where(*its)).one_or_none()
        if row is None:
            raise not_found()
        return Response(_show(row).model_dump_json(), content_type="application/json")

    @blueprint.patch(
        "/<id>",
        operation_id="changeEndpoint",
        summary="Change, disable or enable an endpoint",
        description="What waits for it goes to its new URL. While it is disabled it is told nothing, and what waited "
        "for it has failed; `redeliver` sends that later.",
        responses=answers({200: Endpoint}, refusals=(400, 401, 404, 406, 413, 415, 422)),
    )
    def change_endpoint(path: EndpointPath, query: NoQuery, body: ChangeEndpoint) -> Response:
        with database.write() as tx:
            row = _change(tx, _hold(tx, path.id, life.hold_to_change), body.model_dump(exclude_unset=True))
        return Response(_show(row).model_dump_json(), content_type="application/json")

    @blueprint.delete(
        "/<id>",
        operation_id="removeEndpoint",
        summary="Remove an endpoint",
        description="What waited for it fails: at once, or as its time comes. What was sent to it stays in the list of "
        "deliveries.",
        responses=answers({204: None}, refusals=(401, 404, 413, 422)),
    )
    def remove_endpoint(path: EndpointPath, query: NoQuery) -> Response:
        refuse_body()
        with database.write() as tx:
            life.remove(tx, _hold(tx, path.id).id)
        return Response(status=204)

    _add_deeds(blueprint, services, vault)
    return blueprint


def _add_deeds(blueprint: APIBlueprint, services: Services, vault: Vault) -> None:
    """The routes that do something with an endpoint."""
    database = services.database

    @blueprint.post(
        "/<id>/test",
        operation_id="testEndpoint",
        summary="Send an endpoint a test",
        description="An event of type `endpoint.test`, for this endpoint alone, whatever events it chose.",
        responses=answers({202: Delivery}, refusals=(401, 404, 406, 409, 413, 422)),
    )
    def test_endpoint(path: EndpointPath, query: NoQuery) -> Response:
        refuse_body()
        with database.write() as tx:
            delivery = read_delivery(tx, life.send_test(tx, _hold_enabled(tx, path.id)))
        return Response(delivery.model_dump_json(), 202, content_type="application/json")

    @blueprint.post(
        "/<id>/rotate-secret",
        operation_id="rotateSecret",
        summary="Replace the secret of an endpoint",
        description="The one before signs for 24 hours more, beside the new one; older ones end at once.",
        responses=answers({200: NewSecret}, refusals=(401, 404, 406, 413, 422)),
    )
    def rotate_secret(path: EndpointPath, query: NoQuery) -> Response:
        refuse_body()
        with database.write() as tx:
            row = _hold(tx, path.id)
            secret = webhook_secrets.rotate(tx, vault, row.id)
            previous = webhook_secrets.previous_expires_at(tx, row.id)
        body = NewSecret(secret=secret, previous_expires_at=previous)
        return Response(body.model_dump_json(), content_type="application/json")

    @blueprint.post(
        "/<id>/redeliver",
        operation_id="redeliverSince",
        summary="Send an endpoint again what it missed",
        description="Each delivery to it that failed since then, and each event of the types it chose that it was not "
        "told of since it was made, such as those while it was disabled. At most 1,000 at once: `has_more` says "
        "whether to ask again.",
        responses=answers({202: Redelivered}, refusals=(400, 401, 404, 406, 409, 413, 415, 422)),
    )
    def redeliver_since(path: EndpointPath, query: NoQuery, body: RedeliverSince) -> Response:
        with database.write() as tx:
            count, has_more = life.redeliver_since(tx, _hold_enabled(tx, path.id), since_of(body))
        answer = Redelivered(redelivered=count, has_more=has_more)
        return Response(answer.model_dump_json(), 202, content_type="application/json")


def _hold(
    tx: Connection, endpoint_id: str, hold: Callable[[Connection, str, str], Row[Any] | None] = life.hold
) -> Row[Any]:
    """The caller's endpoint, locked. Refused as not found if it is not there, or another project's."""
    row = hold(tx, g.project_id, endpoint_id) if is_id("end", endpoint_id) else None
    if row is None:
        raise not_found()
    return row


def _hold_enabled(tx: Connection, endpoint_id: str) -> Row[Any]:
    row = _hold(tx, endpoint_id)
    if row.disabled_at is not None:
        raise Refused("endpoint_disabled", f"The endpoint is disabled ({row.disabled_reason}): enable it first.")
    return row


def _change(tx: Connection, row: Row[Any], changes: dict[str, Any]) -> Row[Any]:
    disabled = changes.pop("disabled", None)
    changes = {name: value for name, value in changes.items() if getattr(row, name) != value}
    if changes:
        row = life.change(tx, row.id, **changes)
    if disabled is True:
        life.disable(tx, row.id, Disabled.by_hand)
    elif disabled is False and row.disabled_at is not None:
        life.enable(tx, row.id)
    return _hold(tx, row.id)


def _show(row: Row[Any]) -> Endpoint:
    return Endpoint.model_validate(life.as_stored(row))
