"""P15: throughput of one request with an adapter, against llama.cpp without any on the same weights in bfloat16."""

from __future__ import annotations

from benchmarks.peers.beside_llama import in_turn

if __name__ == "__main__":
    in_turn("P15", "benchmarks.peers.bench_llama_one", __doc__, rows=1, adapters=0)
