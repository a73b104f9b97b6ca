"""The models that the settings name, opened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgewise.cli.output import note, progress
from edgewise.errors import UsageError
from edgewise.settings import DEFAULT_MODEL, CloudSettings, secret

if TYPE_CHECKING:
    from pathlib import Path

    from edgewise.engines.base import Generator
    from edgewise.joint.cascade import Cascade
    from edgewise.joint.pair import Pair
    from edgewise.joint.policies import Policies
    from edgewise.joint.policy import Policy
    from edgewise.joint.privacy import Rules
    from edgewise.joint.replay_log import ReplayLog
    from edgewise.models.bundle import Bundle
    from edgewise.settings import Settings
    from edgewise.types import Route, Wish


CLOUD_MODEL = CloudSettings().model  # that name says nothing of what answers


def open_model(settings: Settings) -> Generator:
    """The model of this machine. The default one is pulled if it is not here yet."""
    from edgewise.engines.load import open_generator

    _prepare(settings)
    model = settings.model
    return open_generator(
        model.name,
        home=settings.home,
        runtime=model.runtime,
        mode=model.mode,
        slots=model.slots,
        context=model.context,
    )


def local_bundle(settings: Settings) -> Bundle:
    """The same model as a bundle, for verbs that look inside; UsageError if another engine runs it."""
    from edgewise.models.store import find

    name = settings.model.name
    if name.lower().startswith(("http://", "https://")) or name.lower().endswith(".gguf"):
        raise UsageError(f"{name} is not a bundle", hint=f"edgewise pull {name} may make one")
    _prepare(settings)
    return find(name, settings.home)


def _prepare(settings: Settings) -> None:
    if settings.threads is not None:
        from edgewise.engines.local import set_threads

        set_threads(settings.threads)
    if settings.model.name == DEFAULT_MODEL:
        _pull_default(settings)


def open_cascade(settings: Settings, *, keep_log: bool = False) -> Cascade:
    """The edge, and the cloud behind it if there is one. Whoever calls this closes the cascade, which closes both."""
    from edgewise.engines.openai import OpenAI
    from edgewise.joint.cascade import Cascade
    from edgewise.joint.policies import check

    rules = _rules(settings)
    if rules is not None and _is_elsewhere(settings.model.name):
        raise UsageError(
            "there are privacy rules, and the edge is an address of another machine: nothing could stay on this one",
            hint="name a bundle with --edge, or drop --privacy",
        )
    key = secret(settings.cloud.key_env, "--cloud-key-env")
    url = settings.cloud.url
    cloud = (
        None
        if url is None
        else OpenAI(url, model=settings.cloud.model, key=key, answer_timeout_s=settings.cloud.answer_s)
    )
    if settings.route.policy is not None:
        check(settings.route.policy)  # before a model is pulled for nothing
    log = _log(settings) if keep_log else None
    edge = open_model(settings)
    return Cascade(edge, cloud, _policy(settings), rules=rules, log=log)


def listen(
    settings: Settings, open_it: Callable[[Settings], Generator], *, route: Route, wishes: tuple[str, ...]
) -> None:
    """Serve the generator that `open_it` makes until a signal comes. `wishes` are model names that ask for a tier."""
    from edgewise.devices.address import is_loopback
    from edgewise.joint.cascade import Cascade
    from edgewise.serve.app import create_app
    from edgewise.serve.exchange import Limits
    from edgewise.serve.run import run

    key = secret(settings.serve.key_env, "--key-env")  # before the model is loaded: that takes a while
    if key is None and not is_loopback(settings.serve.host):
        note(f"{settings.serve.host} is open to others and asks for no key; --key-env NAME makes it")
    generator = open_it(settings)
    asyncio.run(_first_answer(generator, "edge" if "edge" in wishes else "auto"))
    cascade = generator if isinstance(generator, Cascade) else None
    app = create_app(
        generator,
        models=("auto", *wishes, generator.name),
        route=route,
        key=key,
        limits=Limits(choices=settings.serve.choices, send_s=settings.serve.send_s),
        breaker=cascade.breaker if cascade else None,
        log=cascade.log if cascade else None,
        rules=cascade.rules if cascade else None,
    )
    run(app, settings.serve.host, settings.serve.port, send_s=settings.serve.send_s)


async def _first_answer(generator: Generator, route: Wish) -> None:
    """One token, before anyone is told that we are ready: the first answer of a process brings the weights into memory,
    which takes a second or two that no user should wait. A model that cannot chat says so here."""
    from edgewise.types import Message, Request

    async for _ in generator.generate(Request((Message("user", "Hello"),), max_tokens=1, route=route)):
        pass


def _policy(settings: Settings) -> Policy | Policies:
    from edgewise.joint.policies import Policies
    from edgewise.joint.policy import Policy

    route = settings.route
    if route.policy is not None:
        return Policies(route.policy, _pair(settings))
    return Policy.default() if route.threshold is None else Policy.threshold(route.threshold)


def _pair(settings: Settings) -> Pair:
    """The models of this node, as far as they are known."""
    from edgewise.joint.pair import Model, Pair, identity

    edge = identity(settings.model.name, manifest(settings.model.name, settings.home))
    cloud = settings.cloud.model
    return Pair(edge, None if cloud == CLOUD_MODEL else Model(cloud, None))


def _log(settings: Settings) -> ReplayLog | None:
    from edgewise.joint.replay_log import ReplayLog

    log = settings.log
    if log.file is None:
        if log.texts or log.share:
            raise UsageError("there is no replay log to keep texts or audits in", hint="name a file with --log FILE")
        return None
    return ReplayLog(log.file, _pair(settings), texts=log.texts, share=log.share)


def manifest(name: str, home: Path) -> Path | None:
    """The manifest of the bundle of that name; None where it is no bundle, or not here."""
    from edgewise.errors import EdgewiseError
    from edgewise.models.bundle import MANIFEST
    from edgewise.models.store import find

    try:
        return find(name, home, check=False).path / MANIFEST
    except EdgewiseError:
        return None


def _is_elsewhere(name: str) -> bool:
    from urllib.parse import urlsplit

    from edgewise.devices.address import is_loopback

    return name.lower().startswith(("http://", "https://")) and not is_loopback(urlsplit(name).hostname or "")


def _rules(settings: Settings) -> Rules | None:
    from edgewise.joint.privacy import Rules

    return None if settings.privacy.rules is None else Rules.open(settings.privacy.rules)


def _pull_default(settings: Settings) -> None:
    from edgewise.errors import UnknownModel
    from edgewise.models.source import pull
    from edgewise.models.store import find

    try:
        find(DEFAULT_MODEL, settings.home, check=False)
    except UnknownModel:
        note(f"there is no bundle {DEFAULT_MODEL} in {settings.home} yet: pulling it (about 100 MB, once)")
        with progress() as show:
            pull(DEFAULT_MODEL, home=settings.home, progress=show)
