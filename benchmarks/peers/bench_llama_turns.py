"""P16: throughput of 32 requests on 32 adapters, against llama.cpp, which answers them in turn."""

from __future__ import annotations

from benchmarks.peers.beside_llama import in_turn

if __name__ == "__main__":
    in_turn("P16", "benchmarks.peers.bench_llama_turns", __doc__, rows=32, adapters=32)
