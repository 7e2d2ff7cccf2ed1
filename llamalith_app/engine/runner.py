"""llama.cpp: the one module that imports it. One model, one context, a sequence id a slot.

Does what a plan says and decides nothing. Used by the engine child's main thread; what
prepares a sequence (`render`, `tokenize`, `begin`), by the thread for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import inspect
import itertools
import math
import os
import re
import secrets
import stat
import struct
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_chat_format
from llguidance import LLTokenizer

from llamalith_app.engine import forms
from llamalith_app.engine.chat import CLOSE, OPEN
from llamalith_app.engine.child import CannotLoad
from llamalith_app.engine.constraint import Constraint, TooSlow, Vocabulary
from llamalith_app.engine.messages import ChatMessage, GpuOffload, LoadModel, Sampling
from llamalith_app.engine.runner_protocol import Sampled, SampleFailed, Work
from llamalith_app.engine.sequence import own_memory
from llamalith_app.engine.template import Template, TemplateFailed

PENALTY_LAST_N = 64
"""Tokens that the penalties look back; llama.cpp's own default."""
LOG_LEVEL_ERROR = 4
LOG_LEVELS_SHOWN = (3, LOG_LEVEL_ERROR)
"""Warnings and errors, as ggml.h counts; llama-cpp-python's own names for the levels are one off."""
MAX_FILLED = 3
"""Idle slots in a row that are worth a token each."""
HASH_CHUNK_BYTES = 1 << 20
DEFAULT_FORMAT = "chatml"
"""Of a GGUF that brings no chat template."""
SPECIAL = b"\xff"
"""To llguidance, what follows is a control token's name: no grammar allows it."""
UNWRITTEN = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
"""Of tokens that add nothing to a text."""
ATOMIC = UNWRITTEN | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
LONGEST_RUN = 4096
"""Characters without a blank among them, or blanks alone, that are tokenized in one. For many BPE models llama.cpp
splits text by a `std::regex`, which recurses with each character of a match: from some 24,000 on (measured, with a
stack of 8 MiB) the process dies."""
LEAST_TEMPERATURE = 1e-5
"""Below, it is the likeliest token: logits divided by less leave what a float can hold."""
LEAST_PENALTY = 0.01
"""Of repetition; for the same reason."""
THINKING_TAGS = (OPEN.encode(), CLOSE.encode())
F16, BF16 = 1, 30
"""ggml_type."""
CANDIDATE = np.dtype([("id", np.intc), ("logit", np.single), ("p", np.single)])
"""llama_token_data."""


class LlamaRunner:
    """Opens the model that `load` names. Raises CannotLoad; a damaged file may end the process instead."""

    _template: Template | None = None

    def __init__(self, load: LoadModel, tell: Callable[[float], None]) -> None:
        self.n_slots = load.n_slots
        self._model_name = load.model
        self._samplers: dict[int, Sampler | Likeliest] = {}
        self._specials: list[str] = []
        """Texts that llama.cpp takes for one token wherever they stand."""
        self._tags: dict[int, bytes] = {}
        """Tokens around thinking. In some vocabularies they are control tokens, of which llama.cpp writes nothing."""
        _judge_file(load)
        _quiet_logs()
        llama_cpp.llama_backend_init()
        self._model = _load_model(load, tell)
        self.gpu = gpu_offload(load.n_gpu_layers)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._recurses = llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_BPE
        self.n_ctx = min(load.n_ctx, llama_cpp.llama_model_n_ctx_train(self._model) or load.n_ctx)
        n_batch = load.n_chunk + load.n_slots
        self._context = self._open_context(load, self.n_ctx, n_batch)
        self._memory = llama_cpp.llama_get_memory(self._context)
        if not self._memory or llama_cpp.llama_model_has_encoder(self._model):
            raise CannotLoad(
                f"The file of model {load.model} ({load.path}) is of a kind that cannot chat: it reads text and writes"
                " none (an embedding model), or translates one text at a time (an encoder with a decoder)."
            )
        self._n_swa = llama_cpp.llama_model_n_swa(self._model)
        # A state of another number of slots is refused; one of another context may be taken and be wrong: some models
        # turn positions by other factors in a long one.
        form = (
            f"n_ctx={self.n_ctx} n_slots={load.n_slots} swa_full=False kv_unified=False"
            f" cache={cache_type(load.n_gpu_layers)}"
        )
        self.fingerprint = f"{llama_cpp.__version__} {_digest(load)} {form}"
        self.can_share = not (
            llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(self._model)
        )
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
        bos = llama_cpp.llama_vocab_bos(self._vocab)
        adds_bos = bos >= 0 and llama_cpp.llama_vocab_get_add_bos(self._vocab)
        self._begins_with = bos if adds_bos else None
        """The token in front of each prompt."""
        self.can_think = False
        self._formatter, self.extra_stop = self._chat_format(load.chat_format)
        self._vocabulary = self._read_vocabulary()
        self.can_think |= bool(self._tags)

    def _open_context(self, load: LoadModel, n_ctx: int, n_batch: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * load.n_slots
        params.n_seq_max = load.n_slots
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = load.n_threads or len(os.sched_getaffinity(0))
        # A stream of its own for each slot: a step does not pay for the tokens that idle slots keep, and a
        # full slot takes no other's room. A prefix is copied as a whole stream and cut.
        params.kv_unified = False
        # A sliding window keeps what it can still see: a fraction of the memory, and a cut far back means to compute
        # again.
        params.swa_full = False
        params.type_k = params.type_v = cache_type(load.n_gpu_layers)
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise CannotLoad(
                f"There is not enough memory for model {load.model} ({load.path}) with {load.n_slots} slots"
                f" of {n_ctx} tokens."
            )
        return context

    def close(self) -> None:
        if self._template is not None:
            self._template.close()
        for sampler in self._samplers.values():
            sampler.free()
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        return self._formatter(messages)

    def tokenize(self, text: str) -> list[int]:
        parts = parts_of_runs(text, self._specials) if self._recurses else [text]
        tokens = [token for part in parts for token in self._tokenize(part)]
        # llama.cpp would put an end behind it too where the vocabulary asks for that, as embeddings need it; and a
        # template that writes the first token itself must not get it twice.
        if self._begins_with is not None and tokens[:1] != [self._begins_with]:
            return [self._begins_with, *tokens]
        return tokens

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode()
        size = len(data) + 2
        tokens = (llama_cpp.llama_token * size)()
        n_tokens = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, size, False, True)
        if n_tokens < 0:
            raise RuntimeError(f"llama_tokenize wants {-n_tokens} tokens for {len(data)} bytes")
        return tokens[:n_tokens]

    def piece(self, token: int) -> bytes:
        return self._tags.get(token) or self._piece(token, special=False)

    def is_end(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def begin(
        self, sequence_id: int, sampling: Sampling, grammar: str, prompt: Sequence[int], written: Sequence[int]
    ) -> bool:
        constraint = Constraint(self._vocabulary, grammar) if grammar else None
        if written and not self._allows(constraint, written):
            self.begin(sequence_id, sampling, grammar, prompt, ())
            return False
        if constraint is None and _takes_the_likeliest(sampling):
            self._samplers[sequence_id] = Likeliest(self._n_vocab)
            return True
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            llama_cpp.llama_sampler_chain_add(chain, sampler)

        penalties = llama_cpp.llama_sampler_init_penalties(
            self._n_vocab,
            PENALTY_LAST_N,
            max(sampling.repeat_penalty, LEAST_PENALTY),
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        for token in [*prompt[-PENALTY_LAST_N:], *written][-PENALTY_LAST_N:]:
            llama_cpp.llama_sampler_accept(penalties, token)
        add(penalties)
        dice = None
        if sampling.temperature < LEAST_TEMPERATURE:
            add(llama_cpp.llama_sampler_init_greedy())
        else:
            add(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
            add(llama_cpp.llama_sampler_init_typical(sampling.typical_p, 1))
            add(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
            add(llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
            add(llama_cpp.llama_sampler_init_temp(sampling.temperature))
            dice = Dice(chain, secrets.randbits(32) if sampling.seed is None else sampling.seed, len(written))
        self._samplers[sequence_id] = Sampler(chain, dice, constraint, self._n_vocab)
        return True

    def _allows(self, constraint: Constraint | None, written: Sequence[int]) -> bool:
        """And the constraint stands behind it then. Written with another model, it may have tokens that this one has
        not, of which llama.cpp dies."""
        if not all(0 <= token < self._n_vocab for token in written):
            return False
        try:
            if constraint is not None:
                for token in written:
                    constraint.accept(token)
        except TooSlow:
            return False
        return True

    def _read_vocabulary(self) -> Vocabulary:
        """Takes a few microseconds a token, and some 200 bytes of memory."""
        pieces, ends = [], []
        for token in range(self._n_vocab):
            piece = self._piece(token, special=True)
            if piece in THINKING_TAGS:
                self._tags[token] = piece
            attributes = llama_cpp.llama_vocab_get_attr(self._vocab, token)
            if attributes & ATOMIC:
                self._specials.append(piece.decode(errors="replace"))
            if attributes & UNWRITTEN:
                piece = SPECIAL + piece
            if self.is_end(token):
                ends.append(token)
            pieces.append(piece)
        tokenizer = LLTokenizer.from_llamacpp(  # type: ignore[attr-defined]
            tokens=pieces,
            vocab_ptr=self._vocab,
            tokenize_fptr=ctypes.cast(llama_cpp.llama_tokenize, ctypes.c_void_p).value,
            eos_token=ends or [self._n_vocab - 1],
            # They would speed up the masks of few grammars, and cost memory.
            slices=[],
        )
        return Vocabulary(tokenizer, frozenset(ends), self._n_vocab)

    def end(self, sequence_id: int) -> None:
        sampler = self._samplers.pop(sequence_id, None)
        if sampler is not None:
            sampler.free()

    def least_cut(self, slot: int) -> int:
        if not self.can_share:
            # A recurrent state is the sum of all it has read: it cannot be cut, only dropped.
            return self.n_ctx + 1
        first = int(llama_cpp.llama_memory_seq_pos_min(self._memory, slot))
        return first + self._n_swa if first > 0 else 0

    def least_cut_restored(self, n_tokens: int) -> int:
        if not self.can_share:
            return self.n_ctx + 1
        # Of a sliding window's cells only those are saved that the next token sees.
        return n_tokens if self._n_swa and n_tokens > self._n_swa else 0

    def keep(self, slot: int, n_tokens: int) -> int:
        last = llama_cpp.llama_memory_seq_pos_max(self._memory, slot)
        if n_tokens and last == n_tokens - 1:
            return n_tokens
        cut = n_tokens and last >= n_tokens >= self.least_cut(slot)
        if cut and llama_cpp.llama_memory_seq_rm(self._memory, slot, n_tokens, -1):
            return n_tokens
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return 0

    def copy(self, source: int, target: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, target, -1, -1)
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def save(self, slot: int, max_bytes: int) -> memoryview | None:
        size = llama_cpp.llama_state_seq_get_size_ext(self._context, slot, 0)
        if size > max_bytes:
            return None
        try:
            data = own_memory(size)
        except OSError:
            return None
        buffer = (ctypes.c_uint8 * size).from_buffer(data)
        n_bytes = llama_cpp.llama_state_seq_get_data_ext(self._context, buffer, size, slot, 0)
        return data if n_bytes == size else None

    def restore(self, slot: int, data: bytes | memoryview) -> bool:
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        start = ctypes.cast(np.frombuffer(data, np.uint8).ctypes.data, ctypes.POINTER(ctypes.c_uint8))
        if llama_cpp.llama_state_seq_set_data_ext(self._context, start, len(data), slot, 0) == len(data):
            return True
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return False

    def evaluate(self, plan: Sequence[Work]) -> list[Sampled | SampleFailed]:
        batch, index = self._batch, 0
        wanted = []
        fillers = self._fillers({work.slot for work in plan})
        for work in sorted([*plan, *fillers], key=lambda work: work.slot):
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
        for work in fillers:
            llama_cpp.llama_memory_seq_rm(self._memory, work.slot, work.position, -1)
        return [self._sample(sequence_id, at) for sequence_id, at in wanted]

    def _fillers(self, slots: set[int]) -> list[Work]:
        """One token, to be forgotten at once, for each slot that would part those of a step: llama.cpp evaluates
        together only what stands side by side. One more token costs a fraction of one more part (here 4 ms against
        15 ms); a window or a recurrent state would lose by it what it cannot get back."""
        if self._n_swa or not self.can_share:
            return []
        fillers: list[Work] = []
        for before, after in itertools.pairwise(sorted(slots)):
            gap = range(before + 1, after)
            ends = [llama_cpp.llama_memory_seq_pos_max(self._memory, slot) + 1 for slot in gap]
            if len(gap) <= MAX_FILLED and all(end < self.n_ctx for end in ends):
                fillers += [Work(0, slot, [0], end, wanted=False) for slot, end in zip(gap, ends, strict=True)]
        return fillers

    def _sample(self, sequence_id: int, at: int) -> Sampled | SampleFailed:
        try:
            token = self._samplers[sequence_id].sample(self._context, at)
        except TooSlow as error:
            return SampleFailed(sequence_id, str(error))
        if token is None:
            return SampleFailed(sequence_id, "The grammar leaves the model no token to go on with.")
        return Sampled(sequence_id, token)

    def _piece(self, token: int, *, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n_bytes = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n_bytes >= 0:
                return buffer.raw[:n_bytes]
            size = -n_bytes

    def _chat_format(self, name: str) -> tuple[Callable[[Sequence[ChatMessage]], str], Sequence[str]]:
        """How messages are written for this model, and the stop strings that come with it."""
        bos, eos = (
            "" if token < 0 else self._piece(token, special=True).decode(errors="replace")
            for token in (
                llama_cpp.llama_vocab_bos(self._vocab),
                llama_cpp.llama_vocab_eos(self._vocab),
            )
        )
        source = llama_cpp.llama_model_chat_template(self._model, None) if name == "auto" else None
        if source:
            self.can_think = any(tag in source for tag in THINKING_TAGS)
            self._template = Template(source.decode(errors="replace"), bos=bos, eos=eos)
            return self._template.render, ()
        formatter = named_format(DEFAULT_FORMAT if name == "auto" else name)
        if formatter is None:
            raise CannotLoad(f"Model {self._model_name} has the chat format {name!r}, which there is not.")

        def write(messages: list[forms.Message]) -> str:
            prompt: str = formatter(messages=messages).prompt
            return prompt

        form = forms.find(write)

        def render(messages: Sequence[ChatMessage]) -> str:
            try:
                return write(form.apply(messages))
            except forms.LeftOut as error:
                raise TemplateFailed(str(error)) from None

        stop = formatter(messages=[{"role": "user", "content": ""}]).stop
        return render, [stop] if isinstance(stop, str) else stop or ()


def parts_of_runs(text: str, specials: Sequence[str]) -> list[str]:
    """The text, cut where a run would be too long, but never in one of the specials. A cut may change the token at it,
    and no other."""
    parts, start = [], 0
    for run in _RUN.finditer(text):
        if run.end() - run.start() < LONGEST_RUN:
            continue
        cut = run.end()
        for special in specials:
            at = text.find(special, max(start, cut - len(special) + 1), cut + len(special) - 1)
            cut = at if start < at < cut else cut
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


_RUN = re.compile(rf"\S{{1,{LONGEST_RUN}}}|\s{{1,{LONGEST_RUN}}}")


def _takes_the_likeliest(sampling: Sampling) -> bool:
    penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    return sampling.temperature < LEAST_TEMPERATURE and penalties == (1, 0, 0)


class Likeliest:
    """What a greedy chain without penalties and grammar draws, in a fifth of its time."""

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab

    def free(self) -> None:
        return

    def sample(self, context: Any, at: int) -> int:
        row = llama_cpp.llama_get_logits_ith(context, at)
        return int(np.ctypeslib.as_array(row, shape=(self._n_vocab,)).argmax())


class Dice:
    """The last of a chain's samplers, anew for each token: what it draws there follows from seed and place alone. Of
    llama.cpp's own, which goes on from token to token, nobody could tell later how often it drew."""

    def __init__(self, chain: Any, seed: int, n_drawn: int) -> None:
        self._chain = chain
        self._seed = seed
        self._n_drawn = n_drawn
        self._add()

    def next(self) -> None:
        """For the token behind the one that was drawn."""
        last = llama_cpp.llama_sampler_chain_n(self._chain) - 1
        llama_cpp.llama_sampler_free(llama_cpp.llama_sampler_chain_remove(self._chain, last))
        self._n_drawn += 1
        self._add()

    def _add(self) -> None:
        place = hashlib.blake2b(b"%d %d" % (self._seed, self._n_drawn), digest_size=4)
        dist = llama_cpp.llama_sampler_init_dist(int.from_bytes(place.digest(), "little"))
        llama_cpp.llama_sampler_chain_add(self._chain, dist)


class Sampler:
    """How one sequence draws its tokens: llama.cpp's chain, and what holds it to a grammar."""

    def __init__(self, chain: Any, dice: Dice | None, constraint: Constraint | None, n_vocab: int) -> None:
        self._chain = chain
        self._dice = dice
        self._constraint = constraint
        self._n_vocab = n_vocab
        self._candidates = np.zeros(n_vocab if constraint else 0, dtype=CANDIDATE)
        self._candidates["id"] = np.arange(len(self._candidates))

    def free(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)

    def sample(self, context: Any, at: int) -> int | None:
        """The token after row `at` of the last batch; None: the grammar allows none. Raises TooSlow."""
        token = self._draw(context, at)
        if self._dice is not None:
            self._dice.next()
        return token

    def _draw(self, context: Any, at: int) -> int | None:
        if self._constraint is None:
            return int(llama_cpp.llama_sampler_sample(self._chain, context, at))
        row = llama_cpp.llama_get_logits_ith(context, at)
        logits = np.ctypeslib.as_array(row, shape=(self._n_vocab,))
        # The chain's own choice is most often allowed, and to judge one token costs a hundredth of judging all.
        token = self._choose(logits, self._candidates)
        if token is None or not self._constraint.allows(token):
            allowed = self._constraint.allowed()
            token = self._choose(logits[allowed], self._candidates[allowed])
        if token is not None:
            self._constraint.accept(token)
            llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    def _choose(self, logits: Any, candidates: Any) -> int | None:
        """What the chain draws of these; None: there is nothing to draw from. All others are left out: a candidate of
        no probability would spoil what `typical_p` reckons."""
        if not np.isfinite(logits).any():
            return None
        candidates = candidates.copy()
        candidates["logit"] = logits
        array = llama_cpp.llama_token_data_array(
            data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        chosen = array.data[array.selected]
        return int(chosen.id) if math.isfinite(chosen.logit) else None


def cache_type(n_gpu_layers: int) -> int:
    """Of the numbers in the KV cache, as ggml.h counts: two bytes each, either way.

    bf16, in which most models were trained, where the CPU multiplies such by itself: for up to 63 tokens llama.cpp's
    attention takes half as long as with f16 then (measured: 8 tokens behind 440 in 50 ms against 73 ms, 30 in 128 ms
    against 230 ms). A GPU has its own ways with f16.
    """
    knows_bf16 = b"AVX512_BF16 = 1" in llama_cpp.llama_print_system_info()
    return BF16 if knows_bf16 and not n_gpu_layers else F16


def named_format(name: str) -> Callable[..., Any] | None:
    """One of llama-cpp-python's plain formatters, which it keeps inside the handlers that it registers."""
    try:
        handler = llama_chat_format.get_chat_completion_handler(name)
    except llama_chat_format.LlamaChatCompletionHandlerNotFoundException:
        return None
    formatter: Callable[..., Any] | None = inspect.getclosurevars(handler).nonlocals.get("chat_formatter")
    return formatter


def _judge_file(load: LoadModel) -> None:
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


def _digest(load: LoadModel) -> str:
    """Of the file: its pinned hash, else what tells it from another one without reading gigabytes."""
    if load.sha256 is not None:
        return load.sha256
    path = Path(load.path)
    status = path.stat()
    with path.open("rb") as file:
        head = file.read(HASH_CHUNK_BYTES)
        file.seek(max(0, status.st_size - HASH_CHUNK_BYTES))
        ends = hashlib.sha256(head + file.read(HASH_CHUNK_BYTES)).hexdigest()
    return f"{status.st_size} {status.st_mtime_ns} {ends}"


def _load_model(load: LoadModel, tell: Callable[[float], None]) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = load.n_gpu_layers

    def on_progress(progress: float, _: object) -> bool:
        tell(progress)
        return True

    params.progress_callback = llama_cpp.llama_progress_callback(on_progress)
    _errors.clear()
    _offloaded.clear()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(load.path), params)
    if not model:
        raise CannotLoad(
            f"llama.cpp cannot load the file of model {load.model} ({load.path}): {_why_not_loaded(load.path)}."
        )
    return model


def gpu_offload(requested: int) -> GpuOffload | None:
    """What the last load put onto a GPU; None where nothing was requested and nothing is there."""
    n_layers, n_layers_total = _offloaded[-1] if _offloaded else (0, 0)
    if not (requested or n_layers):
        return None
    return GpuOffload(requested=requested, n_layers=n_layers, n_layers_total=n_layers_total)


def _why_not_loaded(path: str) -> str:
    """In llama.cpp's words, as one line, unless there are better ones."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(GGUF_HEAD.size)
        if len(head) == GGUF_HEAD.size and GGUF_HEAD.unpack(head)[2] == 0 and not PART.search(path):
            return "it holds a vocabulary and no weights"
    lines = [" ".join(line.split()) for line in b"".join(_errors).decode(errors="replace").splitlines()]
    told = [line.partition(LOAD_ERROR)[2] for line in lines if LOAD_ERROR in line]
    # Of a file that it cannot even read it tells the cause first, and then only that it failed.
    reason = told[0] if told and GENERAL not in told[0] else next(iter(lines), "")
    reason = FUNCTION.sub("", reason).rstrip(". ")
    if not reason:
        return "it is damaged, or of a kind that this version does not know"
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in reason)
    return shown if len(shown) <= MAX_REASON_CHARS else f"{shown[:MAX_REASON_CHARS]}…"


LOAD_ERROR = "error loading model: "
GENERAL = "failed to load "
FUNCTION = re.compile(r"^(?:[a-z]\w*_\w+: )+")
"""In front of most of its lines."""
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
GGUF_HEAD = struct.Struct("<4sIQQ")
"""Magic, version, number of tensors, number of keys."""
MAX_REASON_CHARS = 300

_errors: deque[bytes] = deque(maxlen=100)
"""What llama.cpp told as errors, in pieces, since a load began."""
OFFLOADED = re.compile(rb"offloaded (\d+)/(\d+) layers to GPU")
"""llama.cpp has no function for it; it logs this line in each load, unless it finds no GPU."""
_offloaded: deque[tuple[int, int]] = deque(maxlen=1)
"""Layers on a GPU and layers of the model, as the last load said."""


def _log_problems(level: int, text: bytes, _: object) -> None:
    if level in LOG_LEVELS_SHOWN:
        os.write(2, text)
    if level == LOG_LEVEL_ERROR:
        _errors.append(text)
    if found := OFFLOADED.search(text):
        _offloaded.append((int(found[1]), int(found[2])))


_native_log = llama_cpp.llama_log_callback(_log_problems)
"""Held here: llama.cpp keeps only a pointer to it."""


def _quiet_logs() -> None:
    llama_cpp.llama_log_set(_native_log, ctypes.c_void_p())
