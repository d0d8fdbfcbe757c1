"""The ``rewrite`` command line, one file per command.

To add a command, write one file with what it takes and what it does, and register it in ``entry.COMMANDS``::

    def add_arguments(parser): ...   # with the types and the shared groups of options.py
    def run(options): ...            # imports the library, works, and says what came of it
    COMMAND = Command("count", "count the layers", "rewrite count --generator mine:make", add_arguments, run)

At the top of these files nothing is imported that needs torch: ``rewrite --help`` and ``rewrite edit --help`` answer at
once, and ``run`` imports what it works with.
"""
