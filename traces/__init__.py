"""Traces in, rows out: what was asked, what happened, and the database that keeps both.

``open_store`` gives the database, ``ingest`` puts a recorded trace into it, ``store.schedule(name)`` gives the trace back;
``head``, ``to_rate`` and the other shapes change it. What a replay measured is ``store.observations(run.id)``: numpy
columns, with ``to_arrow()`` and ``to_pandas()``.
"""

from typing import TYPE_CHECKING

from traces._public import publish

if TYPE_CHECKING:
    from traces.errors import EndpointError as EndpointError
    from traces.errors import InputError as InputError
    from traces.errors import NoFleetError as NoFleetError
    from traces.errors import NotEnoughDataError as NotEnoughDataError
    from traces.errors import SteelyardError as SteelyardError
    from traces.errors import StoreError as StoreError
    from traces.export import export as export
    from traces.fit import Fit as Fit
    from traces.fit import fit as fit
    from traces.frames import to_arrow as to_arrow
    from traces.frames import to_numpy as to_numpy
    from traces.frames import to_pandas as to_pandas
    from traces.ingest import IngestReport as IngestReport
    from traces.ingest import ingest as ingest
    from traces.ingest import store_schedule as store_schedule
    from traces.measures import Slo as Slo
    from traces.measures import Summary as Summary
    from traces.measures import goodput_per_s as goodput_per_s
    from traces.measures import met as met
    from traces.measures import summarise as summarise
    from traces.records import Fleet as Fleet
    from traces.records import FleetChange as FleetChange
    from traces.records import Observations as Observations
    from traces.records import Run as Run
    from traces.records import Sample as Sample
    from traces.records import Schedule as Schedule
    from traces.shape import LogNormal as LogNormal
    from traces.shape import clip_tokens as clip_tokens
    from traces.shape import head as head
    from traces.shape import scale_rate as scale_rate
    from traces.shape import synthesize as synthesize
    from traces.shape import thin as thin
    from traces.shape import to_rate as to_rate
    from traces.shape import window as window
    from traces.shipped import shipped as shipped
    from traces.store import Store as Store
    from traces.store import migrate as migrate
    from traces.store import open_store as open_store

__version__ = "0.1.0"

__all__ = publish(
    __name__,
    {
        "traces.errors": (
            "EndpointError",
            "InputError",
            "NoFleetError",
            "NotEnoughDataError",
            "SteelyardError",
            "StoreError",
        ),
        "traces.export": ("export",),
        "traces.fit": ("Fit", "fit"),
        "traces.frames": ("to_arrow", "to_numpy", "to_pandas"),
        "traces.ingest": ("IngestReport", "ingest", "store_schedule"),
        "traces.measures": ("Slo", "Summary", "goodput_per_s", "met", "summarise"),
        "traces.records": ("Fleet", "FleetChange", "Observations", "Run", "Sample", "Schedule"),
        "traces.shape": (
            "LogNormal",
            "clip_tokens",
            "head",
            "scale_rate",
            "synthesize",
            "thin",
            "to_rate",
            "window",
        ),
        "traces.shipped": ("shipped",),
        "traces.store": ("Store", "migrate", "open_store"),
    },
)
