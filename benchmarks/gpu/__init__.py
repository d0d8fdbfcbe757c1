"""``make gpu-check``: what a machine with an NVIDIA GPU can tell in a few minutes, in stages (stages.py).

``__main__.py``  the command, and what it prints
``host.py``      the machine: is there a GPU, the compiled library, what processes are given
``stages.py``    the stages and their cases, from the most to the least informative
``schedule.py``  runs stages within their time, whatever fails, hangs or crashes in them
``worker.py``    the process that runs cases and writes a line after each

These import nothing but the standard library: what holds the results together cannot be brought down by a GPU. The
worker imports the stage's own module:

``rates.py``      S0: environment, copy bandwidth, matrix rates
``modes.py``      S1: every kernel and mode against float64, with what the compiler made of it
``targets.py``    S2: the targets, timed
``tests.py``      S3: the tests that are marked `gpu`
``sanitiser.py``  S4: compute-sanitizer
"""
