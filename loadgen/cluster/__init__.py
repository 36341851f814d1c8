"""One model of a PD cluster, two clocks: laws from a profile, a kernel, a simulator and a reference endpoint."""

from loadgen.cluster.kernel import Cluster, Job, Switch, Worker
from loadgen.cluster.laws import Profile, shipped_profiles
from loadgen.cluster.simulate import SimResult, simulate, simulate_batches, stage_times

__all__ = [
    "Cluster",
    "Job",
    "Profile",
    "SimResult",
    "Switch",
    "Worker",
    "shipped_profiles",
    "simulate",
    "simulate_batches",
    "stage_times",
]
