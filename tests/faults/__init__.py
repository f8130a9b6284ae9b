"""Fault tests: a pool of real processes, 64 requests in flight, and faults at seeded moments; docs/how-to/faults.md.

What happens is written down by both ends while it happens (``history``), and judged afterwards (``checker``).
``python -m tests.faults`` does so for as many seeds as it is told.
"""
