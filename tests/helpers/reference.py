"""``rc.rewrite`` with the reference implementation's settings, for tests of what solves by values: any of them may be
given otherwise."""

import rewrite_core as rc

SETTINGS = {name: value for name, value in rc.REFERENCE.items() if name not in ("preserve", "solver")}


def rewrite(*given, **options):
    return rc.rewrite(*given, **SETTINGS | options)


def rewrite_many(*given, **options):
    return rc.rewrite_many(*given, **SETTINGS | options)
