"""The fake of llama.cpp: a runner that writes what a script says, under the real child, scheduler and frames.

As a library: `FakeRunner(script)`. As a process, in place of the real engine:

    argv = fake_engine.argv(script_path)        # for LocalEngine.start, LocalEngines, local_engines

A token is one UTF-8 byte. The script, a JSON file that is read again for each prompt, is a list of rules; the first
whose `when` stands in the newest prompt decides, else the reply is the SHA-256 of the whole rendered prompt:

    {"when": "hello", "reply": "Hello to you."}
    {"when": "bad",   "refuse": "Model exploded"}          # this very reason; `kind`, else `internal`
    {"when": "die",   "signal": 9, "once": "PATH"}         # dies, but not where PATH exists, which it then makes
    {"when": "wait",  "gate": "PATH", "reply": "x"}        # reads the prompt, then waits until PATH exists
    {"when": "hard",  "prepare_gate": "PATH"}              # is not a sequence yet while PATH does not exist
    {"when": "late",  "after": 3, "signal": 9}             # that, or a gate, once it drew 3 tokens itself
    {"when": "slow",  "step_s": 0.05}                      # each step that it takes part in takes so long
    {"when": "new",   "goes_on": false}                    # cannot go on behind what was written before
    {"when": "hm",    "opens_thinking": true}              # the prompt ends inside of thinking
    {"when": "tokens", "reply": ["<think>", "hm"]}         # markers by themselves are tokens, as `marker_tokens` says
    {"model": "m",    "family": ""}                        # by the model's name; else it thinks as `think` does
    {"model": "m",    "marker_tokens": true}               # the family's markers are tokens
    {"model": "m",    "gpu": [25, 31]}                     # of its 31 layers a GPU holds 25
    {"model": "m",    "cannot_load": "It is broken."}      # at load
    {"model": "m",    "load_signal": 6}
    {"model": "m",    "load_gate": "PATH"}                 # loads for ever while PATH does not exist
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamalith_app.engine.child import serve
from llamalith_app.engine.messages import (
    NO_ARGUMENTS,
    ChatMessage,
    GpuOffload,
    LoadModel,
    PromptFormat,
    Sampling,
    TemplateArguments,
)
from llamalith_app.engine.reasoning import FAMILIES, MARKERS
from llamalith_app.engine.runner_protocol import CannotLoad, Refusal, Sampled, Thoughts, Work

END = 256
"""The token that ends a reply."""
MARKER_OF = dict(enumerate(sorted(MARKERS), END + 1))
"""Tokens that are markers around thinking -> their texts."""
TOKEN_OF = {marker: token for token, marker in MARKER_OF.items()}
GATE_LOOK_S = 0.005
Rules = list[dict[str, Any]]


def argv(script: Path) -> list[str]:
    return [sys.executable, "-m", "tests.fake_engine", "--script", str(script)]


def read_rules(script: Path) -> Rules:
    found: Rules = json.loads(script.read_text())
    return found


def rule_for(rules: Rules, newest: str) -> dict[str, Any]:
    """The first rule for this prompt; empty: none."""
    return next((rule for rule in rules if "when" in rule and rule["when"] in newest), {})


def rendered(messages: Sequence[ChatMessage], rule: dict[str, Any], family: str) -> str:
    prompt = "".join(f"<{message.role}>{message.content}</{message.role}>" for message in messages)
    return prompt + FAMILIES[family or "think"].opening if rule.get("opens_thinking", False) else prompt


def reply_tokens(prompt: str, rule: dict[str, Any]) -> list[int]:
    """With the END."""
    reply = rule.get("reply", hashlib.sha256(prompt.encode()).hexdigest())
    if isinstance(reply, str):
        return [*reply.encode(), END]
    parts = [[TOKEN_OF[part]] if part in TOKEN_OF else list(part.encode()) for part in reply]
    return [*(token for part in parts for token in part), END]


def piece(token: int) -> bytes:
    return MARKER_OF[token].encode() if token in MARKER_OF else bytes([token])


def thinking_of(rules: Rules, model: str) -> tuple[str, frozenset[str]]:
    """The family of a model, and its markers that are tokens."""
    family, has_tokens = "think", False
    for rule in rules:
        if rule.get("model") == model:
            family, has_tokens = rule.get("family", family), rule.get("marker_tokens", has_tokens)
    return family, FAMILIES[family].markers if has_tokens else frozenset()


def without_thinking(tokens: list[int]) -> list[int]:
    """What is left of a reply whose thinking is closed now."""
    pieces = [b"" if token == END else piece(token) for token in tokens]
    closes = (at for at in range(len(tokens)) if b"".join(pieces[at : at + 8]).startswith(b"</think>"))
    return tokens[next(closes, 0) :]


class FakeRunner:
    fingerprint = "fake"

    def __init__(
        self,
        rules: Callable[[], Rules],
        *,
        n_ctx: int = 2048,
        n_slots: int = 1,
        can_share: bool = True,
        family: str = "think",
        marker_tokens: frozenset[str] = frozenset(),
        gpu: GpuOffload | None = None,
    ) -> None:
        self.gpu = gpu
        self.can_share = can_share
        self.family = family
        self.marker_tokens = marker_tokens
        self.n_ctx = n_ctx
        self.n_slots = n_slots
        self.extra_stop: Sequence[str] = ()
        self.format = PromptFormat(source="file", system="own")
        self.controls: Mapping[str, Sequence[str]] = {}
        self._rules = rules
        self._rule: dict[int, dict[str, Any]] = {}
        self._left: dict[int, list[int]] = {}
        self._drawn: dict[int, int] = {}
        self.held: list[list[int]] = [[] for _ in range(n_slots)]
        """What the KV cache of each slot would hold."""

    def render(self, messages: Sequence[ChatMessage], arguments: TemplateArguments = NO_ARGUMENTS) -> str:
        return rendered(messages, self._rule_for(messages[-1].content), self.family)

    def tokenize(self, text: str, mark: str = "") -> list[int]:
        assert not mark, "nothing is a control token here"
        return list(text.encode())

    def piece(self, token: int) -> bytes:
        return piece(token)

    def is_marker(self, token: int) -> bool:
        return token in MARKER_OF

    def is_end(self, token: int) -> bool:
        return token == END

    def begin(
        self,
        sequence_id: int,
        sampling: Sampling,
        grammar: str,
        thoughts: Thoughts | None,
        prompt: Sequence[int],
        written: Sequence[int],
    ) -> bool:
        text = bytes(prompt).decode(errors="replace")
        newest = text.rpartition("<user>")[2]
        rule = self._rule_for(newest)
        if "refuse" in rule:
            raise Refusal(rule.get("kind", "internal"), rule["refuse"])
        while "prepare_gate" in rule and not Path(rule["prepare_gate"]).exists():
            time.sleep(GATE_LOOK_S)
        self._rule[sequence_id] = rule
        left = reply_tokens(text, rule)
        goes_on = rule.get("goes_on", True)
        self._left[sequence_id] = left[len(written) :] if goes_on else left
        self._drawn[sequence_id] = 0
        return bool(goes_on)

    def answer_now(self, sequence_id: int, written: Sequence[int]) -> None:
        self._left[sequence_id] = without_thinking(self._left[sequence_id])

    def end(self, sequence_id: int) -> None:
        self._rule.pop(sequence_id, None)
        self._left.pop(sequence_id, None)
        self._drawn.pop(sequence_id, None)

    def least_cut(self, slot: int) -> int:
        return 0 if self.can_share else self.n_ctx + 1

    def least_cut_restored(self, n_tokens: int) -> int:
        return self.least_cut(0)

    def keep(self, slot: int, n_tokens: int) -> int:
        if not self.can_share and n_tokens != len(self.held[slot]):
            n_tokens = 0
        del self.held[slot][n_tokens:]
        return n_tokens

    def copy(self, source: int, target: int) -> None:
        self.held[target] = list(self.held[source])

    def save(self, slot: int, max_bytes: int) -> bytes | None:
        data = json.dumps(self.held[slot]).encode()
        return data if len(data) <= max_bytes else None

    def restore(self, slot: int, data: bytes | memoryview) -> bool:
        self.held[slot] = json.loads(bytes(data))
        return True

    def evaluate(self, plan: Sequence[Work]) -> list[Sampled]:
        sampled = []
        for work in plan:
            held = self.held[work.slot]
            if len(held) != work.position:
                raise AssertionError(f"slot {work.slot} holds {len(held)} tokens, not {work.position}")
            held.extend(work.tokens)
            rule = self._rule[work.sequence_id]
            time.sleep(rule.get("step_s", 0))
            if work.wanted:
                if self._drawn[work.sequence_id] >= rule.get("after", 0):
                    self._obey(rule)
                self._drawn[work.sequence_id] += 1
                sampled.append(Sampled(work.sequence_id, self._left[work.sequence_id].pop(0)))
        return sampled

    def close(self) -> None:
        return

    def _rule_for(self, newest: str) -> dict[str, Any]:
        return rule_for(self._rules(), newest)

    def _obey(self, rule: dict[str, Any]) -> None:
        while "gate" in rule and not Path(rule["gate"]).exists():
            time.sleep(GATE_LOOK_S)
        if "signal" in rule and not ("once" in rule and Path(rule["once"]).exists()):
            if "once" in rule:
                Path(rule["once"]).touch()
            os.kill(os.getpid(), rule["signal"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    options = parser.parse_args()

    def rules() -> Rules:
        return read_rules(options.script)

    def open_runner(load: LoadModel, on_progress: Callable[[float], None]) -> FakeRunner:
        gpu = None
        for rule in rules():
            if rule.get("model") == load.model:
                if "gpu" in rule:
                    n_layers, n_layers_total = rule["gpu"]
                    gpu = GpuOffload(requested=load.n_gpu_layers, n_layers=n_layers, n_layers_total=n_layers_total)
                while "load_gate" in rule and not Path(rule["load_gate"]).exists():
                    time.sleep(GATE_LOOK_S)
                if "load_signal" in rule:
                    os.kill(os.getpid(), rule["load_signal"])
                if "cannot_load" in rule:
                    raise CannotLoad(rule["cannot_load"])
        on_progress(1.0)
        family, marker_tokens = thinking_of(rules(), load.model)
        return FakeRunner(
            rules, n_ctx=load.n_ctx, n_slots=load.n_slots, family=family, marker_tokens=marker_tokens, gpu=gpu
        )

    serve(options.fd, open_runner)


if __name__ == "__main__":
    main()
