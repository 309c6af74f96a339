"""P3: throughput of 1 request on 1 adapter, against vLLM with LoRA exports of the same adapters."""

from __future__ import annotations

from benchmarks.peers.beside_vllm import distinct_adapters

if __name__ == "__main__":
    distinct_adapters("P3", "benchmarks.peers.bench_vllm_1", __doc__, rows=1)
