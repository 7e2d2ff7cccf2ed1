"""Jobs accepted a second: POST /api/jobs from several clients at once. Each answer comes after the job is on disk.

    .venv/bin/python bench/accepts.py [--clients 16] [--seconds 10] [--url http://127.0.0.1:8000] --token TOKEN

Prints one line with the rate and the latencies, and for comparison how many sequential 4 KiB writes with fdatasync this
disk does a second.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from urllib.parse import urlsplit

BODY = b'{"content": "Say hello in one word.", "model": ""}'


async def client(host: str, port: int, token: str, until: float, latencies: list[float]) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    request = (
        f"POST /api/jobs HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    ).encode() + BODY
    while time.perf_counter() < until:
        started = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"not accepted: {head.decode()}")
        length = next(
            int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
        )
        await reader.readexactly(length)
        latencies.append(time.perf_counter() - started)
    writer.close()


def syncs_a_second(folder: str, seconds: float = 1.0) -> float:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        n, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            os.pwrite(file.fileno(), b"x" * 4096, 0)
            os.fdatasync(file.fileno())
            n += 1
        return n / (time.perf_counter() - started)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--token", required=True)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--disk", default=".", help="a folder on the database's disk")
    options = parser.parse_args()
    url = urlsplit(options.url)
    latencies: list[float] = []
    started = time.perf_counter()
    await asyncio.gather(
        *(
            client(url.hostname or "", url.port or 80, options.token, started + options.seconds, latencies)
            for _ in range(options.clients)
        )
    )
    took = time.perf_counter() - started
    ranks = statistics.quantiles(latencies, n=100)
    print(
        f"{len(latencies) / took:.0f} accepted/s from {options.clients} clients, "
        f"p50 {ranks[49] * 1000:.1f} ms, p99 {ranks[98] * 1000:.1f} ms; "
        f"disk: {syncs_a_second(options.disk):.0f} fdatasync/s"
    )


if __name__ == "__main__":
    asyncio.run(main())
