"""`python -m serving.api` prints the specification that docs/openapi.json keeps. Starts no server."""

from __future__ import annotations

from importlib.metadata import version

from serving.api.application import specification

if __name__ == "__main__":
    print(specification(version("vblora")), end="")
