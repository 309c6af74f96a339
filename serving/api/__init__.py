"""The HTTP surface. Knows the engine and the catalog only through the Protocols of `serving.types`."""
