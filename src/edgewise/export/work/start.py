"""The first lines of a worker: `python -P start.py JOB_DIRECTORY PARENT`, by the Python of any environment.

That environment does not have Edgewise installed, and must not see what else is installed beside it. So the package is
made known by its path alone, then the worker runs.
"""

import ctypes
import importlib.util
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def end_with(parent: int) -> None:
    """The parent ends its workers itself, but cannot where it is killed."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        sys.exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    spec = importlib.util.spec_from_file_location(
        "edgewise", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["edgewise"] = package
    spec.loader.exec_module(package)
    from edgewise.export.work.worker import main

    main(Path(sys.argv[1]))
