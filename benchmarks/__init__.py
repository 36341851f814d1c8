"""Benchmarks: what is claimed in docs/, measured on this machine. Run by make bench."""
