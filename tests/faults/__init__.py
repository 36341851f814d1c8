"""Faults on purpose: real processes are killed, stopped, cut off, starved, and every row is counted afterwards.

``python -m tests.faults`` (``make test-faults``) prints a table: fault, times tried, rows lost, rows twice, what the user saw.
"""
