"""Stand-ins for the stages of a dry run: cases that do what goes wrong on a GPU, on any machine."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from .worker import Setting, Skipped


def run(name: str, arguments: dict[str, Any], setting: Setting) -> dict[str, Any]:
    does = arguments["does"]
    if does == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if does == "refuse":
        raise Skipped("this machine lacks what it needs")
    if does == "hang":
        if os.fork() == 0:  # a process of its own, which must not be left behind
            time.sleep(600)
            os._exit(0)
        time.sleep(600)
    if does == "wait":
        time.sleep(600)
    if does == "abort":
        os.abort()
    if does == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if does == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "exit":
        os._exit(3)
    if does == "garbage":
        os.write(1, b'\xff\xfe{"end": "nothing"}\n' * 100)
        setting.say(end="another case", state="ok")
        setting.say(begin=7)
        with open(setting.lines, "ab") as file:
            file.write(b'{"stage": "D1", "case": "cut off')
    if does == "close":
        os.close(setting.events)
        time.sleep(600)
    print(f"{name} does {does}", file=sys.stderr, flush=True)
    return {"value": 1.5}


def sound() -> bool:
    return False
