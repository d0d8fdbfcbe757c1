"""The ``rewrite`` command line."""
