"""The two models of a cascade, by what says that they are the same ones later."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from edgewise.joint.judge import Part

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Model(Part, frozen=True):
    """One of the two models; `sha256` of what says all of it (a bundle's manifest), null where that is not known."""

    name: str
    sha256: Sha256 | None


class Pair(Part, frozen=True):
    """The models that a policy was fitted on, or that answered a request; `cloud` is null where it is not known."""

    edge: Model
    cloud: Model | None


def mismatch(fitted: Pair | None, here: Pair) -> str | None:
    """What is different between the models that a policy was fitted on and those that are here; None if nothing that
    is known is. A policy that names no models was written for any."""
    if fitted is None:
        return None
    tiers = [("edge", fitted.edge, here.edge)]
    if fitted.cloud is not None and here.cloud is not None:
        tiers.append(("cloud", fitted.cloud, here.cloud))
    for tier, wanted, found in tiers:
        if wanted.sha256 and found.sha256:
            if wanted.sha256 != found.sha256:
                return f"it was fitted on another {tier} model, {_named(wanted)}; here is {_named(found)}"
        elif wanted.name != found.name:
            return f"it was fitted on the {tier} model {_named(wanted)}; here is {_named(found)}"
    return None


def identity(name: str, manifest: Path | None) -> Model:
    """A model by its name and, where it is a bundle, by its manifest, which holds the hashes of all its files."""
    return Model(name, None if manifest is None else hashlib.sha256(manifest.read_bytes()).hexdigest())


def _named(model: Model) -> str:
    return model.name if model.sha256 is None else f"{model.name}, {model.sha256[:12]}…"
