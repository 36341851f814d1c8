"""A notebook-shaped tour of the Python API: each "# %%" is a cell, for VS Code, Spyder, or Jupyter with jupytext.

As a script: python docs/examples/tour.py
"""

# %% [markdown]
# Steelyard's three packages are three steps: `traces` holds what was asked and what happened, `loadgen` asks it of an
# endpoint, `advisor` says which split of prefill and decode to run.

# %%
import advisor
import loadgen
import traces

store = traces.open_store("sqlite:///tour.db")

# %% [markdown]
# A trace goes into the database once. Without an argument of yours this is a slice of the Azure trace that ships with us.

# %%
report = traces.ingest(store, [traces.shipped("azure-2023-conv")], name="conv")
print(report.rows_kept, "requests,", report.sum_prompt_tokens, "prompt tokens")

# %% [markdown]
# Shapes are functions from schedule to schedule. What they change stands in `schedule.changes` and in every run.

# %%
recorded = store.schedule("conv")
low = traces.to_rate(traces.head(recorded, 12), 6.0)
heavy = traces.to_rate(traces.head(recorded, 30), 40.0)
print(low.changes, heavy.changes)

# %% [markdown]
# `embedded` is the reference endpoint; put your own URL in its place. Every request becomes a row.

# %%
slo = traces.Slo.parse("ttft<0.5s tpot<50ms")
with loadgen.embedded("demo", traces.Fleet(4, 4)) as url, loadgen.Swarm(workers=1) as swarm:
    for fleet, schedule in ((traces.Fleet(4, 4), low), (traces.Fleet(1, 7), heavy), (traces.Fleet(7, 1), low)):
        run = loadgen.replay(store, swarm, schedule, url, fleet=fleet, slo=slo, group="tour")
        print(run.id, run.fleet, run.counts, run.verdict)

# %% [markdown]
# Rows are numpy columns; latencies are derived, counted from when a request was due. Arrow and pandas are one call away.

# %%
rows = store.observations(run.id)
print(traces.summarise(rows, slo).ttft_p99_s)
print(rows.to_arrow().select(["due_s", "ttft_s", "tpot_s"]).slice(0, 3))
print(rows.to_pandas().groupby("status")["e2e_s"].describe())

# %% [markdown]
# The same cluster in virtual time: any fleet, in milliseconds.

# %%
profile = loadgen.Profile.load("demo")
for fleet in traces.Fleet.splits(8):
    done = loadgen.simulate(traces.to_rate(traces.head(recorded, 60), 8.0), fleet, profile)
    print(fleet, round(traces.summarise(done.observations, slo).goodput_per_s, 2))

# %% [markdown]
# Advice from the rows; what is missing is an exception that names the next measurement.

# %%
try:
    answer = advisor.advise(store, gpus=8, group="tour", requests=60, rate_per_s=8.0)
    print(answer.recommendation.sentence)
    for candidate in answer.recommendation.candidates:
        print(candidate.fleet, candidate.figures["goodput_per_s"])
except traces.NotEnoughDataError as missing:
    print(missing)

store.close()
