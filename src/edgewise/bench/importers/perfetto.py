"""Perfetto traces: what Android's system tracing, Android Studio and apps with the Perfetto SDK record; ours too.

Source of the format: perfetto.dev/docs/reference/synthetic-track-event (track events) and
perfetto.dev/docs/data-sources/atrace (slices that apps print through android.os.Trace and ATrace_beginSection).
"""

from __future__ import annotations

from collections import defaultdict

from edgewise.bench.importers.result import checked, dearest, imported, spread
from edgewise.bench.measure import Measurement
from edgewise.bench.trace import read as slices


def read(data: bytes) -> Measurement:
    """How long the slices of each name took, the dearest names first; a slice holds the time of those within it."""
    times: dict[str, list[float]] = defaultdict(list)
    for track in slices(data):
        for span in track.spans:
            times[span.name].append(checked(span.end_ns - span.start_ns, f"the duration of {span.name}") / 1e6)
    return imported("perfetto", {f"slice {name}": spread(took, "ms") for name, took in dearest(times).items()})
