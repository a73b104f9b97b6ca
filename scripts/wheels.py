"""Prove that every pinned run-time requirement has a wheel for each platform that Edgewise promises. pip resolves from
metadata alone: nothing is downloaded or installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements" / "run.txt"
TIMEOUT_S = 120
PLATFORMS = {
    "linux x86-64": ["manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"],
    "linux aarch64": ["manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"],
    "macOS arm64": ["macosx_14_0_arm64"],
    "Windows x64": ["win_amd64"],
}


def missing(platform: str) -> str:
    """pip's last words if a wheel is missing, else nothing."""
    with tempfile.TemporaryDirectory() as nowhere:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--target", nowhere, "--only-binary=:all:", "--python-version=3.11", "--implementation=cp"]
        command += [f"--platform={tag}" for tag in PLATFORMS[platform]]
        command += ["--disable-pip-version-check", "--requirement", str(REQUIREMENTS)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return f"pip gave no answer within {TIMEOUT_S} s"
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def main() -> int:
    with ThreadPoolExecutor(2) as pool:
        verdicts = dict(zip(PLATFORMS, pool.map(missing, PLATFORMS), strict=True))
    for platform, verdict in verdicts.items():
        print(f"wheels for {platform}: {verdict or 'all there'}")
    return 1 if any(verdicts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
