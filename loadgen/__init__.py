"""Ask a fleet a trace: the replay client, the swarm that runs it, and the reference cluster it is measured on.

``with embedded("demo", Fleet(4, 4)) as url, Swarm(workers=2) as swarm: run = replay(store, swarm, schedule, url)`` is one
measured run; ``simulate`` is the same cluster in virtual time, ``sweep`` and ``saturate`` are many runs.
"""

from typing import TYPE_CHECKING

from traces._public import publish

if TYPE_CHECKING:
    from loadgen.client import Target as Target
    from loadgen.client import target as target
    from loadgen.cluster import Profile as Profile
    from loadgen.cluster import SimResult as SimResult
    from loadgen.cluster import simulate as simulate
    from loadgen.cluster.embedded import embedded as embedded
    from loadgen.exposition import exposed as exposed
    from loadgen.live import Live as Live
    from loadgen.replay import Interrupted as Interrupted
    from loadgen.replay import replay as replay
    from loadgen.swarm import Swarm as Swarm
    from loadgen.sweep import saturate as saturate
    from loadgen.sweep import sweep as sweep

__all__ = publish(
    __name__,
    {
        "loadgen.client": ("Target", "target"),
        "loadgen.cluster": ("Profile", "SimResult", "simulate"),
        "loadgen.cluster.embedded": ("embedded",),
        "loadgen.exposition": ("exposed",),
        "loadgen.live": ("Live",),
        "loadgen.replay": ("Interrupted", "replay"),
        "loadgen.swarm": ("Swarm",),
        "loadgen.sweep": ("saturate", "sweep"),
    },
)
