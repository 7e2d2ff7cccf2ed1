"""P4 and P5: how soon the first text of a further turn comes, with 2,000 tokens of history.

The first turn of each conversation is new to both servers, so its first text shows what computing the history costs.
The second follows at once: both servers have the history in a slot. Then the product is stopped with SIGTERM, started
again, its model loaded by a prompt of another conversation, and the third turn is asked.
"""

from __future__ import annotations

from typing import NamedTuple

from bench import prompts
from bench.client import Message, Server
from bench.product import Product
from bench.table import Row, compared

MAX_TOKENS = 16


class Turns(NamedTuple):
    """Seconds to the first text, one value for each pair."""

    peer_warm: list[float]
    product_cold: list[float]
    product_warm: list[float]
    product_restored: list[float]
    history_tokens: list[int]


async def further_turns(peer: Server, product: Product, n_pairs: int) -> list[Row]:
    seen = Turns([], [], [], [], [])
    for pair in range(n_pairs):
        series = f"history-{pair}"
        await _peer_turns(peer, series, seen)
        await _product_turns(product, series, seen)
    size = f"{min(seen.history_tokens)} to {max(seen.history_tokens)} tokens of history"
    return [
        compared(
            "P4",
            f"first text of a further turn, {size}; other: llama-server, its cache warm",
            milliseconds(seen.peer_warm),
            milliseconds(seen.product_warm),
            unit="ms",
            better="less",
            goal=1.1,
        ),
        compared(
            "P5",
            "the same after a restart; other: computing the history",
            milliseconds(seen.product_cold),
            milliseconds(seen.product_restored),
            unit="ms",
            better="less",
            goal=0.1,
        ),
    ]


async def _peer_turns(peer: Server, series: str, seen: Turns) -> None:
    turns = prompts.history(series)
    first = await peer.ask(turns, MAX_TOKENS)
    second = await peer.ask(prompts.next_turn(turns, first.text, 2), MAX_TOKENS)
    seen.peer_warm.append(second.first_s)


async def _product_turns(product: Product, series: str, seen: Turns) -> None:
    asked = prompts.history(series)
    first = await product.turn(asked[0].content, MAX_TOKENS, conversation_id=series)
    second = await product.turn(_question(asked, 2), MAX_TOKENS, conversation_id=series)
    await product.stop()
    await product.start()
    await product.turn("Say hello.", MAX_TOKENS)
    third = await product.turn(_question(asked, 3), MAX_TOKENS, conversation_id=series)
    seen.product_cold.append(first.first_s)
    seen.product_warm.append(second.first_s)
    seen.product_restored.append(third.first_s)
    seen.history_tokens.append(first.prompt_tokens)


def _question(asked: list[Message], number: int) -> str:
    return prompts.next_turn(asked, "", number)[-1].content


def milliseconds(seconds: list[float]) -> list[float]:
    return [1000 * one for one in seconds]
