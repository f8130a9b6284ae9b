"""For tests of programs that use arun: a pytest plugin, ``arun.testing.plugin``, that is there once arun is
installed and makes the guard-rails strict.
"""
