"""Compiles src/edgewise/engines/native when the package is built or installed for development (a hatchling build hook).

Where it cannot (another processor than x86-64, Windows, no C compiler), the package goes without: models then run on
onnxruntime, and `edgewise doctor` says so. CC names another compiler than cc.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/edgewise/engines/native")
LIBRARY = NATIVE / "blocks.so"
COMMON = shlex.split("-std=gnu11 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi")
COMMON += shlex.split("-ffp-contract=fast -fno-math-errno -fno-strict-aliasing")
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-DEW_LANES=8", "-DEW_TILE=4"]
AVX512 = ["-mavx2", "-mfma", "-mf16c", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
AVX512 += ["-DEW_LANES=16", "-DEW_TILE=12"]
KERNELS = {
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}


class NativeHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        reason = self._compile(Path(self.root))
        if reason is not None:
            self.app.display_warning(f"the native kernels are left out: {reason}")
            return
        build_data["artifacts"].append(f"/{LIBRARY}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def _compile(self, root: Path) -> str | None:
        """Why there is no library; None if there is one now."""
        (root / LIBRARY).unlink(missing_ok=True)
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
        if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform == "win32":
            return f"they are not written for {platform.machine()} on {sys.platform}"
        if shutil.which(compiler[0]) is None:
            return f"there is no C compiler {compiler[0]!r}"
        try:
            build(compiler, root)
        except subprocess.CalledProcessError as e:
            return f"{shlex.join(compiler)} failed:\n{e.stderr[-2000:]}"
        return None


def build(compiler: list[str], root: Path) -> None:
    """One object for each source, the kernels once per instruction set, linked into one library."""
    sources = root / NATIVE
    with tempfile.TemporaryDirectory() as place:
        jobs = {name: [str(sources / f"{name}.c")] for name in ("blocks", "pool", "probe")}
        for name, flags in KERNELS.items():
            own = [f"-DEW_KERNELS=ew_kernels_{name}", f'-DEW_NAME="{name}"']
            jobs[name] = [str(sources / "kernels.c"), *flags, *own]
        objects = {name: str(Path(place) / f"{name}.o") for name in jobs}

        def one(name: str) -> None:
            _run([*compiler, *COMMON, "-c", *jobs[name], "-o", objects[name]])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(one, jobs))
        _run([*compiler, "-shared", *objects.values(), "-lpthread", "-lm", "-o", str(root / LIBRARY)])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
