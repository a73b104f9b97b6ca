"""Perfetto traces: what Android's system tracing, Android Studio and apps with the Perfetto SDK record; ours too.

Sources of the format, all of google/perfetto: docs/reference/synthetic-track-event.md (track events),
docs/data-sources/atrace.md (slices that apps print through android.os.Trace and ATrace_beginSection), for the form of
those prints src/trace_processor/importers/systrace/systrace_parser.h, and protos/perfetto/trace/trace_packet.proto.
"""

from __future__ import annotations

from collections import defaultdict

from edgewise.bench.importers.result import checked, dearest, imported, spread
from edgewise.bench.measure import Measurement
from edgewise.bench.trace import read as trace


def read(data: bytes) -> Measurement:
    """How long the slices of each name took, the dearest names first; a slice holds the time of those within it."""
    times: dict[str, list[float]] = defaultdict(list)
    found = trace(data)
    for track in found.tracks:
        for span in track.spans:
            took = checked(span.end_ns - span.start_ns, f"the duration of {span.name} in ns")
            times[span.name].append(took / 1e6)
    results = {f"slice {name}": spread(took, "ms") for name, took in dearest(times).items()}
    return imported("perfetto", results, left_out=found.left_out)
