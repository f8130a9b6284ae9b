"""The local executor: runs the stages of a plan, streaming."""
