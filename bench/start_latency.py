"""From a 2xx to the start of its job: the worker idle, the model loaded, one job at a time.

    .venv/bin/python bench/start_latency.py --token TOKEN [--jobs 100] [--url http://127.0.0.1:8000]

The job's own times are read: `created_at` is taken before the commit that the 2xx waits for, `started_at` before the
commit of the claim, so the figure holds the accept's disk wait too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--token", required=True)
    parser.add_argument("--jobs", type=int, default=100)
    options = parser.parse_args()
    connection = http.client.HTTPConnection(urlsplit(options.url).netloc)

    def call(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {options.token}", "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer

    def run() -> float:
        job_id = call("POST", "/api/jobs", {"content": "Say hello."})["job_id"]
        while (job := call("GET", f"/api/jobs/{job_id}"))["status"] not in ("done", "error"):
            time.sleep(0.05)
        created, started = (datetime.fromisoformat(job[name]) for name in ("created_at", "started_at"))
        return (started - created).total_seconds() * 1000

    run()
    waits = [run() for _ in range(options.jobs)]
    ranks = statistics.quantiles(waits, n=100)
    print(f"{options.jobs} jobs: start after p50 {ranks[49]:.1f} ms, p99 {ranks[98]:.1f} ms, max {max(waits):.1f} ms")


if __name__ == "__main__":
    main()
