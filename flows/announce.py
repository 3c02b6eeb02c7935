"""A data version that landed, told to the Prefect server: what `prefloop serve` waits for."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.paths import Var
from steps.ui import answers, prefect_environment, running

if TYPE_CHECKING:
    from prefect.events import Event

LANDED = "prefloop.data.landed"
PATIENCE = 10.0  # seconds a server that answers may take to listen


def resource_of(dataset: str) -> str:
    """The id under which Prefect knows a dataset."""
    return f"prefloop.dataset.{dataset}"


def landed(dataset: str, root: Path, payload: dict[str, Any]) -> str:
    """Tell the Prefect server that a version of a dataset landed; its address, or nothing while there is none.

    Never raises, and costs nothing without a server.
    """
    var = Var(root)
    api = os.environ.get("PREFECT_API_URL") or f"{running(var).get('prefect', '')}/api"
    if not answers(f"{api}/health", 2.0):
        return ""
    os.environ.update(prefect_environment(var))
    os.environ["PREFECT_API_URL"] = api
    from prefect.events import Event, Resource

    resource = Resource({"prefect.resource.id": resource_of(dataset), "prefect.resource.name": dataset})
    event = Event(event=LANDED, resource=resource, payload=payload)
    try:
        asyncio.run(asyncio.wait_for(_emit(event), PATIENCE))
    except Exception:  # the data are safe, and a schedule or `prefloop retrain` finds them all the same
        return ""
    return api.removesuffix("/api")


async def _emit(event: Event) -> None:
    from prefect.events.clients import get_events_client

    async with get_events_client(reconnection_attempts=0) as client:
        await client.emit(event)
