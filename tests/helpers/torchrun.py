"""Programs in several processes, as a user starts them."""

import os
import subprocess
import sys


def torchrun(folder, processes, *command, program=("-m", "rewrite_core"), restarts=0):
    """(exit status, stdout, stderr) of ``rewrite``, or of another program, in so many processes of torchrun's."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    started = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    started += [f"--max-restarts={restarts}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [*map(str, (*started, *program, *command))],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def said(err):
    """The lines that commands say of errors and warnings, without torchrun's own."""
    return [line for line in err.splitlines() if line.startswith(("rewrite ", "rewrite:"))]
