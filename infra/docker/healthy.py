"""The health check of the image: `python healthy.py URL` exits 0 if the URL answers 200."""

import http.client
import sys
from urllib.parse import urlsplit

PATIENCE_S = 4.0


def healthy(url: str) -> bool:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=PATIENCE_S)
    try:
        connection.request("GET", place.path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if healthy(sys.argv[1]) else 1)
