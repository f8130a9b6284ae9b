"""Lazy datasets: a plan of steps over Arrow blocks, run by the kernel, streaming."""
