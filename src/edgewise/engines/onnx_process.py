"""onnxruntime in this process: what all of its sessions share."""

from __future__ import annotations

from functools import cache

import onnxruntime as ort

from edgewise.engines.local import fixed_threads
from edgewise.errors import EngineError


def shared_options() -> ort.SessionOptions:
    """Options of a session on the process's one pool of threads: 30 pools would fight for the cores, and once there is
    a shared one onnxruntime allows no other."""
    _start()
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = 4  # what fails is raised
    return options


def failed(error: Exception) -> EngineError:
    """onnxruntime raises classes of its C extension that share only Exception."""
    return EngineError(f"onnxruntime failed: {error}", hint="this request cannot be answered here; others can")


def probe() -> tuple[str, list[str]]:
    """The runtime's version and the providers it was built with, for `doctor`."""
    return ort.__version__, ort.get_available_providers()


@cache
def _start() -> None:
    """Graphs run in turn, so that one arena for intermediate results serves them all; with one each, a prefill would
    hold its buffers once per block."""
    ort.set_global_thread_pool_sizes(fixed_threads(), 1)
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)
