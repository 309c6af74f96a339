"""P1: throughput of 32 requests on 32 distinct adapters, against vLLM with LoRA exports of the same adapters."""

from __future__ import annotations

from benchmarks.peers.beside_vllm import distinct_adapters

if __name__ == "__main__":
    distinct_adapters("P1", "benchmarks.peers.bench_vllm_32", __doc__, rows=32)
