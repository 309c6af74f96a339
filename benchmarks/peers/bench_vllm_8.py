"""P2: throughput of 8 requests on 8 distinct adapters, against vLLM with LoRA exports of the same adapters."""

from __future__ import annotations

from benchmarks.peers.beside_vllm import distinct_adapters

if __name__ == "__main__":
    distinct_adapters("P2", "benchmarks.peers.bench_vllm_8", __doc__, rows=8)
