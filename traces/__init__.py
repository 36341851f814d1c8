"""Traces in, rows out: what was asked, what happened, and the database that keeps both."""

__version__ = "0.1.0"
