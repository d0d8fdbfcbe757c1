"""The console script. It lies outside the package, whose import takes a second, so that an interrupt in that second
ends in a line as well."""

import sys


def main() -> int:
    try:
        from rewrite_core.cli.commands import main as run

        return run()
    except KeyboardInterrupt:
        print("rewrite: interrupted.", file=sys.stderr)
        return 130
