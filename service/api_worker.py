"""One API process: `python -m service.api_worker FD`. Settings come from the environment, the listening socket (bound
by the supervisor, shared by all API processes) as a file descriptor. SIGTERM: accept no more, finish what runs, end."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import socket
from types import FrameType

GRACE_S = 20
"""What running requests get to finish once the process is told to end."""
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
    from service.app import create_app
    from service.http_protocol import protocol_class, tune_listener
    from service.settings import Settings

    settings = Settings.load()
    log.configure(settings)
    listener = socket.socket(fileno=arguments.fd)
    tune_listener(listener, settings)
    config = uvicorn.Config(
        create_app(settings),
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

    gc.freeze()
    gc.enable()
    Server(config).run(sockets=[listener])


# Worker processes of this one import this module again, under another name.
if __name__ == "__main__":
    main()
