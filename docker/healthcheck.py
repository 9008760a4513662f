"""Container health check: exits 0 when the service answers ``/readyz`` with 200, else 1.

The image's ``HEALTHCHECK`` runs it; it needs only the standard library. It checks readiness, not
liveness, because a container that is loading its model or draining must not get requests.
"""

import http.client
import os
import sys

TIMEOUT_S = 3.0


def main() -> int:
    """Query the service in this container; returns the exit code."""
    port = int(os.environ.get("FCN_PORT", "8000"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"/readyz on port {port}: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if status != http.HTTPStatus.OK:
        print(f"/readyz on port {port}: {status}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
