"""The first lines of a worker: `python -P start.py JOB_DIRECTORY`, by the Python of any environment.

That environment does not have Edgewise installed, and must not see what else is installed beside it. So the package is
made known by its path alone, then the worker runs.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

if __name__ == "__main__":
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
