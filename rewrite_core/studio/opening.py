"""How a studio is opened: from the command line, from Python, from a notebook."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import RewriteCoreError
from ..layers.binding import bind
from ..layers.listing import list_layers
from ..progress import in_notebook
from ..session import Session
from ..statistics.collection import collect_second_moment
from .workshop import Workshop, moment_file, stored_moment


def open_page(address: str) -> None:
    """Open a browser, where there is one."""
    threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()


def prepare(
    generator: nn.Module,
    latents: Tensor,
    layer: str | None,
    folder: Path,
    span: tuple[float, float],
    name: str,
    progress: bool,
) -> Workshop:
    """A workshop on a generator. Without `layer`, the one in the middle of those that have a map to draw on. The second
    moment is read from the folder, where it fits, else collected."""
    if layer is None:
        drawable = [info.name for info in list_layers(generator, latents[:2]) if len(info.value_size) == 2]
        if not drawable:
            raise RewriteCoreError("No layer of this generator has a map [H, W] to draw on; name one with `layer`.")
        layer = drawable[len(drawable) // 2]
    bound = bind(generator, layer)
    folder.mkdir(parents=True, exist_ok=True)
    moment = stored_moment(folder, bound, latents)
    if moment is None:
        moment = collect_second_moment(bound, latents, progress=progress)
        moment.save(moment_file(folder, layer))
    return Workshop(Session(bound, moment, latents), folder, span, name)


def open_studio(
    session: Session,
    *,
    port: int = 0,
    folder: str | Path = "studio",
    span: tuple[float, float] = (-1.0, 1.0),
    browser: bool = True,
) -> Any:
    """Open the studio's page on a session's generator, and return at once; it is served while this process lives.

    In a notebook the page is shown in the cell (an ``IPython.display.IFrame`` is returned); elsewhere a browser is
    opened and the address is returned.

    Args:
        session: the layer, moment and latents to begin with.
        port: of the address; 0 chooses a free one.
        folder: where all that is made is kept.
        span: what range the generator's images lie in.
        browser: False opens none.

    Raises OSError where the port is taken.
    """
    from .server import serve

    workshop = Workshop(session, Path(folder), span, type(session.layer.generator).__name__)
    told: list[str] = []
    failed: list[BaseException] = []
    done = threading.Event()

    def ready(address: str) -> None:
        told.append(address)
        done.set()

    def run() -> None:
        try:
            serve(workshop, port, ready=ready)
        except BaseException as error:  # told to whoever waits
            failed.append(error)
            done.set()

    threading.Thread(target=run, daemon=True, name="rewrite studio").start()
    done.wait()
    if failed:
        raise failed[0]
    if in_notebook():
        from IPython.display import IFrame

        return IFrame(told[0], width="100%", height=760)
    if browser:
        open_page(told[0])
    return told[0]
