"""llama.cpp: the one module that imports it. One model, one context, a sequence id a slot.

Does what a plan says and decides nothing. Used by the engine child's main thread alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import llama_chat_format

from llamalith_app.engine.child import CannotLoad
from llamalith_app.engine.messages import ChatMessage, Load, Sampling
from llamalith_app.engine.steps import Refusal, Sampled, Work

PENALTY_LAST_N = 64
"""Tokens that the penalties look back; llama.cpp's own default."""
LOG_LEVEL_ERROR = 3
"""GGML_LOG_LEVEL_ERROR of ggml.h."""
HASH_CHUNK_BYTES = 1 << 20
DEFAULT_FORMAT = "chatml"
"""Of a GGUF that brings no chat template."""


class LlamaRunner:
    """Opens the model that `load` names. Raises CannotLoad; a damaged file may end the process instead."""

    def __init__(self, load: Load, tell: Callable[[float], None]) -> None:
        self.n_slots = load.n_slots
        self._samplers: dict[int, Any] = {}
        _judge_file(load)
        _quiet_logs()
        llama_cpp.llama_backend_init()
        self._model = _load_model(load, tell)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        n_train = llama_cpp.llama_model_n_ctx_train(self._model)
        n_batch = load.n_chunk + load.n_slots
        self._context = self._open_context(load, min(load.n_ctx, n_train) if n_train > 0 else load.n_ctx, n_batch)
        self.n_ctx: int = llama_cpp.llama_n_ctx_seq(self._context)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
        self._formatter, self.extra_stop = self._chat_format(load.chat_format)

    def _open_context(self, load: Load, n_ctx: int, n_batch: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * load.n_slots
        params.n_seq_max = load.n_slots
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = load.n_threads or len(os.sched_getaffinity(0))
        # A stream of its own for each sequence: a little faster in decode, and a full slot takes no other's room.
        params.kv_unified = False
        # Sliding windows keep all their cells, so that cutting a slot back never finds some gone.
        params.swa_full = True
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise CannotLoad(
                f"There is not enough memory for model {load.model} ({load.path}) with {load.n_slots} slots of"
                f" {n_ctx} tokens."
            )
        return context

    def close(self) -> None:
        for chain, _ in self._samplers.values():
            llama_cpp.llama_sampler_free(chain)
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        told = [{"role": message.role, "content": message.content} for message in messages]
        prompt: str = self._formatter(messages=told).prompt
        return prompt

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        # A template that writes the first token itself must not get it twice.
        add_special = not (self._bos and text.startswith(self._bos))
        size = len(data) + 2
        tokens = (llama_cpp.llama_token * size)()
        n_tokens = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, size, add_special, True)
        if n_tokens < 0:
            raise RuntimeError(f"llama_tokenize wants {-n_tokens} tokens for {len(data)} bytes")
        return tokens[:n_tokens]

    def piece(self, token: int) -> bytes:
        return self._piece(token, special=False)

    def is_end(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def begin(self, sequence_id: int, sampling: Sampling, grammar: str, prompt: Sequence[int]) -> None:
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            llama_cpp.llama_sampler_chain_add(chain, sampler)

        if grammar:
            constraint = llama_cpp.llama_sampler_init_grammar(self._vocab, grammar.encode(), b"root")
            if not constraint:
                llama_cpp.llama_sampler_free(chain)
                raise Refusal("grammar", "llama.cpp cannot read this grammar; it needs a rule named root.")
            add(constraint)
        penalties = llama_cpp.llama_sampler_init_penalties(
            self._n_vocab,
            PENALTY_LAST_N,
            sampling.repeat_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        for token in prompt[-PENALTY_LAST_N:]:
            llama_cpp.llama_sampler_accept(penalties, token)
        add(penalties)
        if sampling.temperature <= 0:
            add(llama_cpp.llama_sampler_init_greedy())
        else:
            add(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
            add(llama_cpp.llama_sampler_init_typical(sampling.typical_p, 1))
            add(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
            add(llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
            add(llama_cpp.llama_sampler_init_temp(sampling.temperature))
            seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
            add(llama_cpp.llama_sampler_init_dist(seed))
        self._samplers[sequence_id] = chain

    def end(self, sequence_id: int) -> None:
        chain = self._samplers.pop(sequence_id, None)
        if chain is not None:
            llama_cpp.llama_sampler_free(chain)

    def keep(self, slot: int, n_tokens: int) -> int:
        if llama_cpp.llama_memory_seq_rm(self._memory, slot, n_tokens, -1):
            return n_tokens
        # A recurrent model's state cannot be cut, only dropped.
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return 0

    def evaluate(self, plan: Sequence[Work]) -> list[Sampled]:
        batch, index = self._batch, 0
        wanted = []
        for work in plan:
            for offset, token in enumerate(work.tokens):
                batch.token[index] = token
                batch.pos[index] = work.position + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = work.slot
                batch.logits[index] = 0
                index += 1
            if work.wanted:
                batch.logits[index - 1] = 1
                wanted.append((work.sequence_id, index - 1))
        batch.n_tokens = index
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode answered {code} for {index} tokens")
        return [
            Sampled(
                sequence_id,
                llama_cpp.llama_sampler_sample(self._samplers[sequence_id], self._context, at),
            )
            for sequence_id, at in wanted
        ]

    def _piece(self, token: int, *, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n_bytes = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n_bytes >= 0:
                return buffer.raw[:n_bytes]
            size = -n_bytes

    def _chat_format(self, name: str) -> tuple[Callable[..., Any], Sequence[str]]:
        """How messages are written for this model, and the stop strings that come with it."""
        bos, eos = (
            "" if token < 0 else self._piece(token, special=True).decode(errors="replace")
            for token in (
                llama_cpp.llama_vocab_bos(self._vocab),
                llama_cpp.llama_vocab_eos(self._vocab),
            )
        )
        self._bos = bos
        template = llama_cpp.llama_model_chat_template(self._model, None) if name == "auto" else None
        if template:
            try:
                own = llama_chat_format.Jinja2ChatFormatter(
                    template.decode(errors="replace"), eos_token=eos, bos_token=bos
                )
            except Exception as error:  # noqa: BLE001 - Jinja's compiler meets a program of the model's maker
                return _refuse_always(f"it cannot be compiled: {error}"), ()
            return own, ()
        formatter = named_format(DEFAULT_FORMAT if name == "auto" else name)
        stop = formatter(messages=[{"role": "user", "content": ""}]).stop
        return formatter, [stop] if isinstance(stop, str) else stop or ()


def named_format(name: str) -> Callable[..., Any]:
    """One of llama-cpp-python's plain formatters, which it keeps inside the handlers that it registers."""
    registry = llama_chat_format.LlamaChatCompletionHandlerRegistry()
    handler = registry.get_chat_completion_handler_by_name(name)
    formatter: Callable[..., Any] = inspect.getclosurevars(handler).nonlocals["chat_formatter"]
    return formatter


def _refuse_always(reason: str) -> Callable[..., Any]:
    def refuse(**_: object) -> Any:
        raise ValueError(reason)

    return refuse


def _judge_file(load: Load) -> None:
    """What can be said without llama.cpp, which may abort on a file that is none."""
    path = Path(load.path)
    named = f"The file of model {load.model} ({load.path})"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CannotLoad(f"{named} is not a file.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CannotLoad(f"{named} is not a GGUF file.")
            if load.sha256 is None:
                return
            file.seek(0)
            digest = hashlib.sha256()
            while chunk := file.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise CannotLoad(f"{named} cannot be read: {error.strerror}.") from None
    if digest.hexdigest() != load.sha256:
        raise CannotLoad(f"{named} is not the one that was pinned: its SHA-256 is {digest.hexdigest()}.")


def _load_model(load: Load, tell: Callable[[float], None]) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = load.n_gpu_layers

    @llama_cpp.llama_progress_callback
    def on_progress(progress: float, _: object) -> bool:
        tell(progress)
        return True

    params.progress_callback = on_progress
    model = llama_cpp.llama_model_load_from_file(os.fsencode(load.path), params)
    if not model:
        raise CannotLoad(
            f"llama.cpp cannot load the file of model {load.model} ({load.path}): it is damaged, or of a kind that"
            " this version does not know."
        )
    return model


@llama_cpp.llama_log_callback
def _log_errors(level: int, text: bytes, _: object) -> None:
    if level == LOG_LEVEL_ERROR:
        os.write(2, text)


def _quiet_logs() -> None:
    llama_cpp.llama_log_set(_log_errors, None)
