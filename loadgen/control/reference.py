"""The reference endpoint, and whatever else takes ``PUT /fleet``: workers change roles, their number stays."""

from __future__ import annotations

from typing import Any

from loadgen.control import Bounds, Connect, Endpoint, LostError, Standing, members
from traces.errors import EndpointError, InputError
from traces.records import Fleet


class Reference:
    """See :class:`loadgen.control.Control`."""

    kind = "reference"

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.name = endpoint.shown
        self.spec = f"reference:{endpoint.shown}"
        self.bounds = Bounds()

    def get(self) -> Standing:
        """See :class:`loadgen.control.Control`."""
        state = self._endpoint.fleet_state()
        if state is None:
            raise EndpointError(f"{self.name}: its fleet cannot be read (no /fleet). Choose another --control.")
        fleet, settled, target, changing = state
        # What drains or flips keeps the change open, also where the server does not count it.
        return Standing(fleet, target, changing if settled or changing else 1)

    def steps(self, fleet: Fleet) -> list[str]:
        """See :class:`loadgen.control.Control`."""
        standing = self.get()
        if standing.settled(fleet):
            return []
        now = standing.aimed
        if now is not None and now.workers != fleet.workers:
            raise InputError(
                f"{self.name}: the fleet {fleet} is impossible: it has {fleet.workers} workers, the endpoint has {now.workers}."
            )
        return [f"PUT {self.name}/fleet: {now} -> {fleet}"]

    def ask(self, fleet: Fleet) -> None:
        """See :class:`loadgen.control.Control`."""
        try:
            self._endpoint.ask_fleet(fleet, 5.0)
        except EndpointError as error:
            raise LostError(str(error)) from None


def from_text(text: str, spec: str, connect: Connect) -> Reference:
    """``reference:URL``."""
    if not text:
        raise InputError("--control reference:URL needs the endpoint's URL.")
    return Reference(connect.endpoint(text))


def from_table(table: dict[str, Any], path: str, connect: Connect) -> Reference:
    """``url``."""
    made = Reference(connect.endpoint(members(table, path, url=(str, ...))["url"]))
    made.spec = path
    return made
