"""One API process: `python -m service.api_worker FD`. Settings come from the environment, the listening socket (bound
by the supervisor, shared by all API processes) as a file descriptor. SIGTERM: accept no more, finish what runs, end."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import socket
from types import FrameType

GRACE_S = 20
"""What running requests get to finish once the process is told to end; then they are cut off."""
TOLD_S = 2
"""So much earlier generations and loads that still run are ended, so that each client is told why."""
LAST_S = 3
"""And what closing everything gets after that. Then the process says where it hangs, and ends."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m service.api_worker", description="One API process of loraplex.")
    parser.add_argument("fd", type=int, help="the bound TCP socket to serve on")
    arguments = parser.parse_args()

    # The modules are a hundred thousand objects that stay. To look through them while they come costs a tenth of the
    # start, and each time later a fifth of a second in which nobody is answered.
    gc.disable()

    import uvicorn

    from service import log
    from service.app import create_app, end_requests
    from service.http_protocol import protocol_class, tune_listener
    from service.settings import Settings

    settings = Settings.load()
    log.configure(settings)
    app = create_app(settings)
    listener = socket.socket(fileno=arguments.fd)
    tune_listener(listener, settings)
    config = uvicorn.Config(
        app,
        http=protocol_class(settings),
        ws="none",
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=GRACE_S,
        backlog=2048,
        **log.uvicorn_options(settings),
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            faulthandler.dump_traceback_later(GRACE_S + LAST_S, exit=True)
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(GRACE_S - TOLD_S, end_requests, app)
            await super().shutdown(sockets)

    gc.freeze()
    gc.enable()
    Server(config).run(sockets=[listener])


# Worker processes of this one import this module again, under another name.
if __name__ == "__main__":
    main()
