"""Adapters: names → revisions (`catalog`, over `registry`), bytes (`storage`), content in memory (`residency`).

The folder knows no HTTP and no engine.
"""
