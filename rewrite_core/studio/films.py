"""Films of a walk through latents: GIF, and MP4 where ffmpeg is there."""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import RewriteCoreError

KINDS = ("gif", "mp4")
_MOST_FRAMES = 120
_MILLISECONDS = 80  # of a frame


def kinds() -> list[str]:
    """The kinds of film that can be made here."""
    return [kind for kind in KINDS if kind != "mp4" or shutil.which("ffmpeg")]


def walk(stops: Tensor, frames: int) -> Tensor:
    """Latents [frames, ...] in equal steps from each of `stops` [n, ...] to the next, and back to the first."""
    frames = max(2, min(frames, _MOST_FRAMES))
    stops = torch.cat([stops, stops[:1]])
    places = torch.linspace(0, len(stops) - 1, frames + 1)[:-1]
    first = places.long()
    share = (places - first).reshape(-1, *[1] * (stops.ndim - 1))
    return torch.lerp(stops[first], stops[first + 1], share.to(stops.dtype))


def film(frames: Sequence[Image.Image], kind: str) -> bytes:
    """RGB frames of one size as a film, which a GIF plays again and again. Raises RewriteCoreError where ffmpeg is
    missing or fails."""
    if kind == "gif":
        buffer = io.BytesIO()
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=_MILLISECONDS, loop=0)
        return buffer.getvalue()
    if kind not in kinds():
        raise RewriteCoreError("An MP4 is made by ffmpeg, which is not installed here; save a GIF.")
    width, height = frames[0].size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"  # a file: the player's index at its front is written last
        taken = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{1000 / _MILLISECONDS}"]
        even = "pad=ceil(iw/2)*2:ceil(ih/2)*2"  # H.264 in the colours that every player knows
        made = ["-vf", even, "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
        command = ["ffmpeg", "-loglevel", "error", *taken, "-i", "-", *made]
        done = subprocess.run(command, input=b"".join(frame.tobytes() for frame in frames), capture_output=True)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise RewriteCoreError(f"ffmpeg could not make the film ({said[-1][:200]}).")
        return path.read_bytes()
