"""Adapters: names → revisions (`catalog`), bytes on disk (`storage`), content in memory (`residency`).

The folder knows no HTTP and no engine.
"""
