"""Posts a body to a URL and prints what comes back, as JSON: `python chat.py URL BODY`."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request


def main() -> None:
    """Print status, headers and body."""
    url, body = sys.argv[1:]
    request = urllib.request.Request(url, body.encode(), {"content-type": "application/json"})
    try:
        response = urllib.request.urlopen(request, timeout=120)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        headers = {name.lower(): value for name, value in response.headers.items()}
        found = {"status": response.status, "headers": headers, "body": response.read().decode()}
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
