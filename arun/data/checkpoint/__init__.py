"""Checkpoints: a killed job goes on where it was, without a column of ids.

A row is known by where it was read: a fragment of the source, and its offset there. What a row becomes is appended to
a journal when it reaches the sink; from the journal the parts of the output are made. Hence, after ``kill -9``, what is
in the journal is finished, and nothing else is.
"""
