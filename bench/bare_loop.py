"""A minimal batching loop over llama.cpp: several prompts in, one batch a step, greedy sampling.

    GOMP_SPINCOUNT=300 .venv/bin/python bench/bare_loop.py MODEL N_SLOTS N_CTX N_THREADS CACHE_TYPE

Each line of standard input is `{"prompts": [...], "max_tokens": N}`; the answer is `{"tokens": N, "seconds": S}`.
It has no queue, no database, no text and no other process, so it is the upper bound for any stack around llama.cpp.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

N_BATCH = 512


class Loop:
    def __init__(self, model: str, n_slots: int, n_ctx: int, n_threads: int, cache_type: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = n_ctx * n_slots, n_slots, N_BATCH
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = False
        params.type_k = params.type_v = cache_type
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)

    def _tokens(self, text: str) -> list[int]:
        data, tokens = text.encode(), (llama_cpp.llama_token * (len(text.encode()) + 2))()
        n = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), True, True)
        return list(tokens[:n])

    def _decode(self, work: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(work)
        for index, (token, position, sequence, wanted) in enumerate(work):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        if llama_cpp.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")

    def _best(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._n_vocab,)).argmax())

    def write(self, prompts: list[str], max_tokens: int) -> int:
        """Runs all prompts in parallel; returns the number of tokens written."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        reads = [self._tokens(prompt) for prompt in prompts]
        work = [
            (token, position, sequence, position == len(tokens) - 1)
            for sequence, tokens in enumerate(reads)
            for position, token in enumerate(tokens)
        ]
        last, left, n_written = {}, dict.fromkeys(range(len(prompts)), max_tokens), 0
        positions = [len(tokens) for tokens in reads]
        while work:
            for start in range(0, len(work), N_BATCH):
                part = work[start : start + N_BATCH]
                self._decode(part)
                last.update({one[2]: self._best(row) for row, one in enumerate(part) if one[3]})
            work = []
            for sequence in sorted(left):
                n_written += 1
                left[sequence] -= 1
                if not left[sequence] or llama_cpp.llama_vocab_is_eog(self._vocab, last[sequence]):
                    del left[sequence]
                    continue
                work.append((last[sequence], positions[sequence], sequence, True))
                positions[sequence] += 1
        return n_written


def main(model: str, *sizes: str) -> None:
    loop = Loop(model, *map(int, sizes))
    print("ready", flush=True)
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        started = time.perf_counter()
        n_tokens = loop.write(asked["prompts"], asked["max_tokens"])
        print(json.dumps({"tokens": n_tokens, "seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
