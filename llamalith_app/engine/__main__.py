"""The engine child's composition root: llama.cpp at one end, the worker's socket at the other."""

from __future__ import annotations

import argparse

from llamalith_app.engine.child import serve
from llamalith_app.engine.runner import LlamaRunner

parser = argparse.ArgumentParser(prog="llamalith engine")
parser.add_argument("--fd", type=int, required=True, help="the socket to the worker")
serve(parser.parse_args().fd, LlamaRunner)
