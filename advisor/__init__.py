"""Fit the rows, try every fleet, say which one to run: regressions, recommendation, report and command."""
