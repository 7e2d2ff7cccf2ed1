"""The real runner: one model of llama.cpp with one context, and a sequence id of llama.cpp for each slot.

Owns the context, the tokenizer and the samplers. Evaluates what a plan says and decides nothing. The engine's main
thread uses it; the threads that prepare sequences call `render`, `tokenize` and `begin`. Together with `loader.py` and
`sampler.py` it is all that imports llama.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import itertools
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import llama_cpp
import msgspec
import numpy as np
from llama_cpp import llama_chat_format
from llguidance import LLTokenizer

from llamalith_app.engine import fallback, forms, reasoning, typed
from llamalith_app.engine.constraint import Constraint, GrammarFailed, Vocabulary
from llamalith_app.engine.loader import file_digest, gpu_offload, load_model, redirect_logs, validate_model_file
from llamalith_app.engine.messages import (
    NO_ARGUMENTS,
    ChatMessage,
    LoadModel,
    PromptFormat,
    Sampling,
    TemplateArguments,
)
from llamalith_app.engine.runner_protocol import CannotLoad, Sampled, SampleFailed, Thoughts, Work
from llamalith_app.engine.sampler import GreedySampler, Sampler, follow, make_sampler
from llamalith_app.engine.sequence import anonymous_memory
from llamalith_app.engine.template import Template, TemplateFailed
from llamalith_app.engine.thinking import Thinking

MAX_FILLERS = 3
"""Idle slots in a row that are worth evaluating one token for each."""
SPECIAL = b"\xff"
"""Marks a control token for llguidance: the name of the token follows, and no grammar allows it."""
UNWRITTEN = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
"""Attributes of tokens that add nothing to a text."""
ATOMIC = UNWRITTEN | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
"""Attributes of tokens whose text llama.cpp tokenizes as that one token, wherever it is."""
MAX_RUN_CHARS = 4096
"""Longest run of characters without white space, or of white space alone, that llama.cpp gets in one piece. For many
BPE models it splits text by a `std::regex`, which recurses once for each character of a match. At about 24,000
characters (measured, with a stack of 8 MiB) the process dies."""
Formatter = Callable[[Sequence[ChatMessage], TemplateArguments], str]
"""Renders messages, with arguments for the chat template."""
F16, BF16 = 1, 30
"""Values of ggml_type."""


class _Begun(NamedTuple):
    """How a sequence draws its tokens."""

    sampling: Sampling
    thoughts: Thoughts | None
    thinking: Thinking | None
    """None: nothing follows it."""
    prompt: Sequence[int]


class LlamaRunner:
    """Loads the model that `load` names, and reports the progress, from 0 to 1. Raises CannotLoad. A damaged file may
    make llama.cpp abort the process instead."""

    _template: Template | None = None

    def __init__(self, load: LoadModel, report: Callable[[float], None]) -> None:
        self.n_slots = load.n_slots
        self._model_name = load.model
        self._samplers: dict[int, Sampler | GreedySampler] = {}
        self._begun: dict[int, _Begun] = {}
        self._specials: list[str] = []
        """The texts of all ATOMIC tokens."""
        self._markers: dict[int, bytes] = {}
        """The ATOMIC tokens around thinking -> their texts. In some vocabularies they are control tokens, for which
        llama.cpp writes no text."""
        validate_model_file(load)
        redirect_logs()
        llama_cpp.llama_backend_init()
        self._model = load_model(load, report)
        self.gpu = gpu_offload(load.n_gpu_layers)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._splits_by_regex = llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_BPE
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
        # llama.cpp refuses a state of another number of slots. It may accept one of another context size and compute
        # wrong results: some models rotate positions by other factors in a long context.
        form = (
            f"n_ctx={self.n_ctx} n_slots={load.n_slots} swa_full=False kv_unified=False"
            f" cache={cache_type(load.n_gpu_layers)}"
        )
        self.fingerprint = f"{llama_cpp.__version__} {file_digest(load)} {form}"
        self.can_share = not (
            llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(self._model)
        )
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
        bos = llama_cpp.llama_vocab_bos(self._vocab)
        adds_bos = bos >= 0 and llama_cpp.llama_vocab_get_add_bos(self._vocab)
        self._first_token = bos if adds_bos else None
        """The token in front of each prompt; None: there is none."""
        self.family = load.reasoning if load.reasoning in reasoning.FAMILIES else ""
        self._template_source = ""
        self.controls: typed.Controls = {}
        self._parses_typed = load.parse_special_in_content
        self.format = PromptFormat(source="file")
        self._formatter, self.extra_stop = self._choose_chat_format(load.chat_format)
        self._vocabulary = self._read_vocabulary()
        if self._template is not None:
            self.format = msgspec.structs.replace(self.format, system=self._template.system_position())
        self.family = self.family or reasoning.find(self._template_source, self._specials)
        family = reasoning.FAMILIES.get(self.family)
        wanted = family.markers if family else ()
        self._markers = {token: piece for token, piece in self._markers.items() if piece.decode() in wanted}
        self.marker_tokens = frozenset(piece.decode() for piece in self._markers.values())

    def _open_context(self, load: LoadModel, n_ctx: int, n_batch: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * load.n_slots
        params.n_seq_max = load.n_slots
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = load.n_threads or len(os.sched_getaffinity(0))
        # Each slot has a stream of its own: a step does not pay for the tokens of idle slots, and a full slot takes no
        # room from another. A prefix is copied as a whole stream and then cut.
        params.kv_unified = False
        # A sliding window keeps only the tokens that it can still see. That takes a fraction of the memory, but a slot
        # that is cut far back must be computed again.
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

    def render(self, messages: Sequence[ChatMessage], arguments: TemplateArguments = NO_ARGUMENTS) -> str:
        return self._formatter(messages, arguments)

    def tokenize(self, text: str, mark: str = "") -> list[int]:
        parts = split_long_runs(text, self._specials) if self._splits_by_regex else [text]
        tokens = [token for part in parts for token in self._tokenize(part)]
        if mark:
            tokens, n_removed = typed.remove(tokens, mark, partial(self._piece, special=False))
            if n_removed != text.count(mark):
                # Some vocabulary joins a part of the mark with its neighbours. Cut there, text may get other tokens.
                tokens = [token for part in text.split(mark) for token in self._tokenize(part)]
        # llama.cpp's own way would also add the end token if the vocabulary asks for it, as embeddings need it. And a
        # template that writes the first token itself must not get it twice.
        if self._first_token is not None and tokens[:1] != [self._first_token]:
            return [self._first_token, *tokens]
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
        return self._markers.get(token) or self._piece(token, special=False)

    def is_marker(self, token: int) -> bool:
        return token in self._markers

    def is_end(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def begin(
        self,
        sequence_id: int,
        sampling: Sampling,
        grammar: str,
        thoughts: Thoughts | None,
        prompt: Sequence[int],
        written: Sequence[int],
    ) -> bool:
        constraint = Constraint(self._vocabulary, grammar) if grammar else None
        thinking = None if thoughts is None else self._thinking(thoughts, constraint)
        if written and not self._accepts(constraint, thinking, written):
            self.begin(sequence_id, sampling, grammar, thoughts, prompt, ())
            return False
        self._samplers[sequence_id] = make_sampler(sampling, constraint, thinking, self._n_vocab, prompt, written)
        self._begun[sequence_id] = _Begun(sampling, thoughts, thinking, prompt)
        return True

    def answer_now(self, sequence_id: int, written: Sequence[int]) -> None:
        begun = self._begun.get(sequence_id)
        if begun is None or begun.thoughts is None:
            return
        thinking = begun.thinking
        if thinking is None:
            # Nothing followed it so far.
            thinking = self._followed(begun.thoughts)
            for token in written:
                thinking.accept(token)
            self._samplers[sequence_id].free()
            self._samplers[sequence_id] = make_sampler(
                begun.sampling, None, thinking, self._n_vocab, begun.prompt, written
            )
            self._begun[sequence_id] = begun._replace(thinking=thinking)
        thinking.close()

    def _thinking(self, thoughts: Thoughts, constraint: Constraint | None) -> Thinking | None:
        """None: nothing depends on where the thinking ends."""
        return None if thoughts.budget is None and constraint is None else self._followed(thoughts)

    def _followed(self, thoughts: Thoughts) -> Thinking:
        return Thinking(
            reasoning.FAMILIES[self.family],
            self,
            self._tokenize,
            marker_tokens=self.marker_tokens,
            is_opened=thoughts.is_opened,
            budget=thoughts.budget,
        )

    def _accepts(self, constraint: Constraint | None, thinking: Thinking | None, written: Sequence[int]) -> bool:
        """Whether the sequence can resume behind these tokens. Constraint and thinking have consumed them then. Another
        model may have written them: llama.cpp aborts at a token that this model does not have."""
        if not all(0 <= token < self._n_vocab for token in written):
            return False
        try:
            for token in written:
                if thinking is not None and thinking.forced not in (None, token):
                    return False
                follow(token, constraint, thinking)
        except GrammarFailed:
            return False
        return True

    def _read_vocabulary(self) -> Vocabulary:
        """The vocabulary for grammars. Also collects the special texts, the controls and the markers around thinking.
        Takes a few microseconds and about 200 bytes of memory for each token."""
        pieces, ends = [], []
        controls: list[str] = []
        for token in range(self._n_vocab):
            piece = self._piece(token, special=True)
            attributes = llama_cpp.llama_vocab_get_attr(self._vocab, token)
            if attributes & ATOMIC:
                text = piece.decode(errors="replace")
                self._specials.append(text)
                if text in reasoning.MARKERS:
                    self._markers[token] = piece
                # Makers of files declare some tokens that their template writes as a user's own.
                if attributes & UNWRITTEN or (text.strip() and text in self._template_source):
                    controls.append(text)
            if attributes & UNWRITTEN:
                piece = SPECIAL + piece
            if self.is_end(token):
                ends.append(token)
            pieces.append(piece)
        if not self._parses_typed:
            self.controls = typed.controls_of(controls)
        tokenizer = LLTokenizer.from_llamacpp(  # type: ignore[attr-defined]
            tokens=pieces,
            vocab_ptr=self._vocab,
            tokenize_fptr=ctypes.cast(llama_cpp.llama_tokenize, ctypes.c_void_p).value,
            eos_token=ends or [self._n_vocab - 1],
            # Slices speed up the masks of a few grammars only, and cost memory.
            slices=[],
        )
        return Vocabulary(tokenizer, frozenset(ends), self._n_vocab)

    def end(self, sequence_id: int) -> None:
        self._begun.pop(sequence_id, None)
        sampler = self._samplers.pop(sequence_id, None)
        if sampler is not None:
            sampler.free()

    def least_cut(self, slot: int) -> int:
        if not self.can_share:
            # A recurrent state sums up all tokens it has read: it cannot be cut, only dropped.
            return self.n_ctx + 1
        first = int(llama_cpp.llama_memory_seq_pos_min(self._memory, slot))
        return first + self._n_swa if first > 0 else 0

    def least_cut_restored(self, n_tokens: int) -> int:
        if not self.can_share:
            return self.n_ctx + 1
        # Of a sliding window, llama.cpp saves only the cells that the next token sees.
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
            data = anonymous_memory(size)
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
        """One token for each idle slot between two slots of a step. It is removed after the step.

        llama.cpp evaluates neighbouring slots together, and a gap splits a step into parts. One more token costs a
        fraction of one more part (measured: 4 ms against 15 ms). There are no fillers for a model with a sliding window
        or a recurrent state, which would lose tokens by them."""
        if self._n_swa or not self.can_share:
            return []
        fillers: list[Work] = []
        for before, after in itertools.pairwise(sorted(slots)):
            gap = range(before + 1, after)
            ends = [llama_cpp.llama_memory_seq_pos_max(self._memory, slot) + 1 for slot in gap]
            if len(gap) <= MAX_FILLERS and all(end < self.n_ctx for end in ends):
                fillers += [Work(0, slot, [0], end, wanted=False) for slot, end in zip(gap, ends, strict=True)]
        return fillers

    def _sample(self, sequence_id: int, at: int) -> Sampled | SampleFailed:
        try:
            token = self._samplers[sequence_id].sample(self._context, at)
        except GrammarFailed as error:
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

    def _choose_chat_format(self, name: str) -> tuple[Formatter, Sequence[str]]:
        """The function that renders messages for this model, and the stop strings of its format."""
        bos, eos = (
            "" if token < 0 else self._piece(token, special=True).decode(errors="replace")
            for token in (
                llama_cpp.llama_vocab_bos(self._vocab),
                llama_cpp.llama_vocab_eos(self._vocab),
            )
        )
        source = llama_cpp.llama_model_chat_template(self._model, None) if name == "auto" else None
        if source:
            self._template_source = source.decode(errors="replace")
            self._template = Template(self._template_source, bos=bos, eos=eos)
            return self._template.render, ()
        self.format = PromptFormat(source="setting", name=name)
        if name == "auto":
            self.format = fallback.choose(lambda text: len(self._tokenize(text)) == 1, self._architecture())
        if name == "auto" and self.format.source != "guess":
            write, stop = partial(_builtin_prompt, self.format.name), None
        else:
            formatter = named_format(self.format.name)
            if formatter is None:
                raise CannotLoad(f"Model {self._model_name} has the chat format {name!r}, which there is not.")
            write = partial(_named_prompt, formatter)
            stop = formatter(messages=[{"role": "user", "content": ""}]).stop
        form = forms.detect(write)
        self.format = msgspec.structs.replace(self.format, system=form.system or "none")

        def render(messages: Sequence[ChatMessage], _: TemplateArguments) -> str:
            try:
                return write(form.apply(messages))
            except forms.ContentDropped as error:
                raise TemplateFailed(str(error)) from None

        with contextlib.suppress(TemplateFailed):
            # Shows which tokens the format writes.
            self._template_source = render([*forms.TRIAL], NO_ARGUMENTS)
        return render, [stop] if isinstance(stop, str) else stop or ()

    def _architecture(self) -> str:
        buffer = ctypes.create_string_buffer(100)
        n_bytes = llama_cpp.llama_model_meta_val_str(self._model, b"general.architecture", buffer, len(buffer))
        return buffer.value.decode(errors="replace") if n_bytes > 0 else ""


def split_long_runs(text: str, specials: Sequence[str]) -> list[str]:
    """The text in parts without a run of more than MAX_RUN_CHARS, give or take one special. A special is never cut. A
    cut may change the tokens next to it, and no others."""
    parts, start = [], 0
    for run in _RUN.finditer(text):
        if run.end() - run.start() < MAX_RUN_CHARS:
            continue
        cut = run.end()
        for special in specials:
            at = text.find(special, max(start, cut - len(special) + 1), cut + len(special) - 1)
            cut = at if start < at < cut else cut
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


_RUN = re.compile(rf"\S{{1,{MAX_RUN_CHARS}}}|\s{{1,{MAX_RUN_CHARS}}}")


def cache_type(n_gpu_layers: int) -> int:
    """The ggml_type of the numbers in the KV cache. Both take two bytes each.

    BF16 if the model runs on a CPU that multiplies bf16 itself, and F16 otherwise. Most models were trained in bf16,
    and with it llama.cpp's attention takes about half as long for up to 63 tokens (measured: 8 tokens behind 440 in
    50 ms against 73 ms, 30 in 128 ms against 230 ms). A GPU is fast with f16.
    """
    knows_bf16 = b"AVX512_BF16 = 1" in llama_cpp.llama_print_system_info()
    return BF16 if knows_bf16 and not n_gpu_layers else F16


def _named_prompt(formatter: Callable[..., Any], messages: list[forms.Message]) -> str:
    prompt: str = formatter(messages=messages).prompt
    return prompt


def _builtin_prompt(name: str, messages: list[forms.Message]) -> str:
    """As llama.cpp's own format of this name writes these messages, whose contents are texts."""
    chat = (llama_cpp.llama_chat_message * len(messages))()
    texts = [(message["role"].encode(), str(message["content"]).encode()) for message in messages]
    for at, (role, content) in enumerate(texts):
        chat[at].role, chat[at].content = role, content
    size = 1024 + 2 * sum(len(role) + len(content) for role, content in texts)
    while True:
        buffer = ctypes.create_string_buffer(size)
        n_bytes = llama_cpp.llama_chat_apply_template(name.encode(), chat, len(messages), True, buffer, size)
        if n_bytes < 0:
            raise RuntimeError(f"llama.cpp has no chat format {name}")
        if n_bytes <= size:
            return buffer.raw[:n_bytes].decode(errors="replace")
        size = n_bytes


def named_format(name: str) -> Callable[..., Any] | None:
    """The formatter of one of llama-cpp-python's chat formats; None: there is none. The library keeps each formatter
    inside the handler that it registers."""
    try:
        handler = llama_chat_format.get_chat_completion_handler(name)
    except llama_chat_format.LlamaChatCompletionHandlerNotFoundException:
        return None
    formatter: Callable[..., Any] | None = inspect.getclosurevars(handler).nonlocals.get("chat_formatter")
    return formatter
