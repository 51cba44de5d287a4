"""kvpress's SnapKV on the layers of `stack`: ``kvpress_worker.py THREADS SHARE``, then a line ``CONTEXT TOKENS`` for each measurement.

Runs in an environment of its own, since kvpress needs older versions of transformers than this package.
"""

import json
import os
import sys

import stack
import torch
from kvpress import SnapKVPress
from transformers import DynamicCache


def main() -> None:
    """Prints one line of JSON for each line read."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not land among the results
    torch.set_num_threads(int(sys.argv[1]))
    model, press = stack.build(), SnapKVPress(compression_ratio=1 - float(sys.argv[2]), window_size=16)
    for line in sys.stdin:
        context, tokens = map(int, line.split())
        print(json.dumps(stack.measure(model, DynamicCache(), context, tokens, press)), file=results, flush=True)


if __name__ == "__main__":
    main()
