"""Deliveries: what was told to whom, with every try; and telling it again."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from flask import Response, g
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from sqlalchemy import ColumnElement, Connection, Row, select

from api.auth import own_job
from api.errors import Refused, not_found
from api.jobs import refuse_body
from api.openapi import KEY, answers
from api.schemas import JobPath, NoQuery
from api.services import Services
from api.webhook_shapes import (
    DeliveriesQuery,
    Delivery,
    DeliveryList,
    DeliveryPath,
    PageQuery,
    Try,
    TryError,
)
from shared import endpoints, redelivery
from shared.ids import is_id
from shared.tables import DeliveryStatus, deliveries, jobs
from shared.tables import delivery_tries as tries


def routes(services: Services) -> APIBlueprint:
    database = services.database
    blueprint = APIBlueprint(
        "deliveries", __name__, url_prefix="/v1", abp_tags=[Tag(name="webhooks")], abp_security=KEY
    )

    @blueprint.get(
        "/deliveries",
        operation_id="listDeliveries",
        summary="List deliveries, newest first",
        responses=answers({200: DeliveryList}, refusals=(401, 406, 422)),
    )
    def list_deliveries(query: DeliveriesQuery) -> Response:
        conditions = []
        if query.status is not None:
            conditions.append(deliveries.c.status == query.status)
        if query.endpoint is not None:
            conditions.append(deliveries.c.endpoint_id == query.endpoint)
        if query.event_type is not None:
            conditions.append(deliveries.c.type == query.event_type)
        with database.read() as connection:
            page = _page(connection, query, *conditions)
        return Response(page.model_dump_json(), content_type="application/json")

    @blueprint.get(
        "/jobs/<id>/deliveries",
        operation_id="listJobDeliveries",
        summary="List the deliveries of a job's events, newest first",
        responses=answers({200: DeliveryList}, refusals=(401, 404, 406, 422)),
    )
    def list_job_deliveries(path: JobPath, query: PageQuery) -> Response:
        with database.read() as connection:
            if connection.scalar(select(jobs.c.id).where(own_job(path.id))) is None:
                raise not_found()
            page = _page(connection, query, deliveries.c.subject_id == path.id)
        return Response(page.model_dump_json(), content_type="application/json")

    @blueprint.get(
        "/deliveries/<id>",
        operation_id="getDelivery",
        summary="Read a delivery",
        responses=answers({200: Delivery}, refusals=(401, 404, 406, 422)),
    )
    def get_delivery(path: DeliveryPath, query: NoQuery) -> Response:
        with database.read() as connection:
            delivery = read_delivery(connection, path.id)
        return Response(delivery.model_dump_json(), content_type="application/json")

    @blueprint.post(
        "/deliveries/<id>/redeliver",
        operation_id="redeliver",
        summary="Send a delivery again",
        description="One that has ended, as often as is wanted, or one that waits for its next try: with the same "
        "`webhook-id`, at once, and with as many tries as the first time. It goes to the URL that its endpoint has "
        "now. A receiver that is left alone after failures, or asked for that by `Retry-After`, is sent it after its "
        "rest: ten minutes at most.",
        responses=answers({202: Delivery}, refusals=(401, 404, 406, 409, 413, 422)),
    )
    def redeliver(path: DeliveryPath, query: NoQuery) -> Response:
        refuse_body()
        with database.write() as tx:
            row = _own(tx, path.id)
            if row.endpoint_id is not None:
                _readdress(tx, row)
            if not redelivery.redeliver(tx, row):
                raise Refused("not_ended", "The delivery is being sent in this moment.")
            delivery = read_delivery(tx, path.id)
        return Response(delivery.model_dump_json(), 202, content_type="application/json")

    return blueprint


def read_delivery(connection: Connection, delivery_id: str) -> Delivery:
    """The caller's delivery, as it is shown. Refused as not found if it is not there, or another project's."""
    [delivery] = _show(connection, [_own(connection, delivery_id)])
    return delivery


def _own(connection: Connection, delivery_id: str) -> Row[Any]:
    if not is_id("dlv", delivery_id):
        raise not_found()
    its = (deliveries.c.id == delivery_id, deliveries.c.project_id == g.project_id)
    row = connection.execute(select(deliveries).where(*its)).one_or_none()
    if row is None:
        raise not_found()
    return row


def _readdress(tx: Connection, row: Row[Any]) -> None:
    """It goes to the URL that its endpoint has now, unless it is on its way. Locks the endpoint."""
    endpoint = endpoints.hold(tx, g.project_id, row.endpoint_id)
    if endpoint is None or endpoint.disabled_at is not None:
        raise Refused("endpoint_disabled", "The endpoint of this delivery is disabled or removed.")
    redelivery.readdress(tx, endpoint, deliveries.c.id == row.id, deliveries.c.status != DeliveryStatus.sending)


def _page(connection: Connection, query: PageQuery, *conditions: ColumnElement[bool]) -> DeliveryList:
    statement = select(deliveries).where(deliveries.c.project_id == g.project_id, *conditions)
    if query.cursor is not None:
        statement = statement.where(deliveries.c.id < f"dlv_{query.cursor}")
    rows = connection.execute(statement.order_by(deliveries.c.id.desc()).limit(query.limit + 1)).all()
    page, has_more = rows[: query.limit], len(rows) > query.limit
    return DeliveryList(
        data=_show(connection, page),
        has_more=has_more,
        next_cursor=page[-1].id.removeprefix("dlv_") if has_more else None,
    )


def _show(connection: Connection, rows: Sequence[Row[Any]]) -> list[Delivery]:
    made: dict[str, list[Try]] = defaultdict(list)
    theirs = select(tries).where(tries.c.delivery_id.in_([row.id for row in rows]))
    for row in connection.execute(theirs.order_by(tries.c.delivery_id, tries.c.number)) if rows else ():
        made[row.delivery_id].append(_show_try(row))
    return [_show_delivery(row, made[row.id]) for row in rows]


def _show_try(row: Row[Any]) -> Try:
    return Try(
        number=row.number,
        started_at=row.started_at,
        outcome=row.outcome,
        seconds=row.seconds,
        status=row.status,
        error=None if row.error is None else TryError.model_validate(row.error),
        answer=row.answer,
    )


def _show_delivery(row: Row[Any], its_tries: list[Try]) -> Delivery:
    return Delivery(
        id=row.id,
        object="delivery",
        event_id=row.event_id,
        type=row.type,
        job_id=row.subject_id if row.subject_id.startswith("job_") else None,
        endpoint_id=row.endpoint_id,
        url=row.url,
        status=row.status,
        next_try_at=row.due_at if row.status == DeliveryStatus.pending else None,
        created_at=row.created_at,
        completed_at=row.completed_at,
        tries=its_tries,
    )
