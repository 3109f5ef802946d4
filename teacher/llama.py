"""llama.cpp's OpenAI-compatible server as a process: ``python -m r1distill.teacher.llama SETTINGS`` (JSON).

Settings: gguf, port, served_name, context_tokens (of one answer and its question), slots, chat_template (null: the
file's own).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any


def main(settings: dict[str, Any]) -> None:
    """Serve one GGUF file on 127.0.0.1 until a signal comes."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["gguf"]
    params.model_alias = {settings["served_name"]}
    params.hostnames, params.port = ["127.0.0.1"], settings["port"]
    params.n_parallel = settings["slots"]
    params.n_ctx = settings["context_tokens"] * settings["slots"]
    params.chat_template = settings["chat_template"] or ""
    # llama.cpp's threads spin at every barrier: one that has to share its core slows all of them down tenfold.
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # What the request says is what is sampled: no top-k of 40, no min-p of 0.05. The thinking stays in the text.
    params.sampling.top_k, params.sampling.min_p = 0, 0.0
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    params.ui = False
    server = xllamacpp.Server(params)
    print(f"listening at {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
