"""Runs llama.cpp's own server, from PyPI's xllamacpp, until its standard input ends.

    .venv-bench/bin/python bench/peer_server.py MODEL N_SLOTS N_CTX N_THREADS

Prints its address as the first line of standard output. Runs in its own environment and imports none of our modules.
"""

import sys

import xllamacpp


def main(model: str, n_slots: int, n_ctx: int, n_threads: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = n_slots
    params.n_ctx = n_ctx * n_slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    params.verbosity = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
