#!/opt/loraplex/bin/python
"""Exit code 0 if /health of the service in this container answers 200: Docker's HEALTHCHECK, without curl."""

import os
import sys
import urllib.error
import urllib.request


def main() -> int:
    host = os.environ.get("LORAPLEX_HOST") or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    authority = f"[{host}]" if ":" in host else host
    url = f"http://{authority}:{os.environ.get('LORAPLEX_PORT') or '8000'}/health"
    # No proxy of the environment stands between a container and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except (urllib.error.URLError, OSError, ValueError) as exc:
        sys.stderr.write(f"{url}: {exc}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
