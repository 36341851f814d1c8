"""Live engines: routers and frontends from PyPI, started on loopback and measured as a user would (``make test-engines``)."""
