"""Benchmarks: `make bench`, or `python -m tests.benchmarks [names...] [--quick]`. They print what they measure."""
