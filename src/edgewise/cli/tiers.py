"""The models that the settings name, opened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from edgewise.cli.output import note, progress
from edgewise.errors import UsageError
from edgewise.settings import DEFAULT_MODEL, CloudSettings, keys_of, secret

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
    from edgewise.serve.run import Tls
    from edgewise.serve.split import Split
    from edgewise.settings import Settings
    from edgewise.split.worker import Worker
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


def open_edge(settings: Settings, *, keep_log: bool = False) -> Generator:
    """What answers on this machine: a split model if the settings name workers, else the cascade."""
    return open_cascade(settings, keep_log=keep_log) if settings.split.url is None else open_split(settings)


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
    settings: Settings,
    open_it: Callable[[Settings], Generator],
    *,
    route: Route,
    wishes: tuple[str, ...],
    split: Callable[[Settings], Split | None] | None = None,
) -> None:
    """Serve the generator that `open_it` makes until a signal comes. `wishes` are model names that ask for a tier;
    `split` makes what edges of a split model speak to."""
    from edgewise.joint.cascade import Cascade
    from edgewise.serve.app import create_app
    from edgewise.serve.exchange import Limits
    from edgewise.serve.run import run

    keys, tls = doors(settings)  # before the model is loaded: that takes a while
    generator = open_it(settings)
    asyncio.run(_first_answer(generator, "edge" if "edge" in wishes else "auto"))
    cascade = generator if isinstance(generator, Cascade) else None
    app = create_app(
        generator,
        models=("auto", *wishes, generator.name),
        route=route,
        keys=keys,
        split=split(settings) if split else None,
        limits=Limits(choices=settings.serve.choices, send_s=settings.serve.send_s),
        breaker=cascade.breaker if cascade else None,
        log=cascade.log if cascade else None,
        rules=cascade.rules if cascade else None,
    )
    run(app, settings.serve.host, settings.serve.port, send_s=settings.serve.send_s, tls=tls)


def listen_as_worker(settings: Settings, layers: range | None) -> None:
    """Serve the last layers of the model until a signal comes."""
    from edgewise.serve.app import create_worker_app
    from edgewise.serve.run import run
    from edgewise.serve.split import Split

    keys, tls = doors(settings)
    worker = open_worker(settings, layers, inline=True)
    app = create_worker_app(Split(lambda: worker), keys=keys)
    run(app, settings.serve.host, settings.serve.port, send_s=settings.serve.send_s, tls=tls)


def listen_with_half(settings: Settings, shapes: Mapping[str, Sequence[int]]) -> None:
    """Serve the second half of the ONNX file that is the model, at any cut, until a signal comes."""
    from edgewise.models.graph import Graph
    from edgewise.serve.app import create_worker_app
    from edgewise.serve.halves import Half
    from edgewise.serve.run import run
    from edgewise.split.halves import BackHalf

    keys, tls = doors(settings)
    half = Half(BackHalf(Graph.open(settings.model.name, shapes)))
    app = create_worker_app(half, keys=keys)
    run(app, settings.serve.host, settings.serve.port, send_s=settings.serve.send_s, tls=tls)


def doors(settings: Settings) -> tuple[tuple[str, ...], Tls | None]:
    """The keys that open this node, and the certificate that it shows."""
    from edgewise.devices.address import is_loopback
    from edgewise.serve.run import Tls

    serve = settings.serve
    key = secret(serve.key_env, "--key-env")
    keys = (key,) if key is not None else () if serve.key_file is None else keys_of(serve.key_file)
    if not keys and not is_loopback(serve.host):
        note(f"{serve.host} is open to others and asks for no key; --key-env NAME or --key-file FILE makes it")
    if (serve.tls_cert is None) != (serve.tls_key is None):
        raise UsageError("one of --tls-cert and --tls-key is missing", hint="https needs both")
    return keys, None if serve.tls_cert is None or serve.tls_key is None else Tls(serve.tls_cert, serve.tls_key)


def open_worker(settings: Settings, layers: range | None = None, *, inline: bool = False) -> Worker:
    """The last layers of this machine's model, for edges that run its first. A model of its own: it computes beside
    what else this process serves, and shares the memory of the weights."""
    from edgewise.engines.load import local_model
    from edgewise.split.worker import Worker

    bundle, model = local_bundle(settings), settings.model
    made = local_model(bundle, runtime=model.runtime, mode=model.mode, slots=model.slots, context=model.context)
    made.give_back()
    return Worker(made, bundle.weights, layers=layers, inline=inline)


def worker_door(settings: Settings) -> Split | None:
    """Where edges find the last layers of this machine's model, which is loaded when the first of them comes; None for
    a model that is no bundle."""
    from edgewise.serve.split import Split

    name = settings.model.name.lower()
    if name.startswith(("http://", "https://")) or name.endswith(".gguf"):
        return None
    return Split(lambda: open_worker(settings))


def open_split(settings: Settings) -> Generator:
    """The first layers here, the others at the workers that the settings name."""
    from edgewise.engines.load import loaded
    from edgewise.split.channel import Way
    from edgewise.split.generator import open_generator

    if settings.privacy.rules is not None:
        raise UsageError(
            "there are privacy rules, and a split model sends every prompt's hidden states to its worker",
            hint="hidden states can be turned back into text; drop --split, or --privacy",
        )
    split, model = settings.split, settings.model
    key = None if split.key_file is None else keys_of(split.key_file)[0]
    bundle = local_bundle(settings)
    engine, tokenizer = loaded(bundle, runtime=model.runtime, mode=model.mode, slots=model.slots, context=model.context)
    assert split.url is not None, "callers look"
    ways = [Way(url, key, split.ca) for url in split.url.split(",")]
    engine.give_back()  # a device that cannot hold the model must not hold it because it was checked
    return open_generator(engine, tokenizer, bundle, ways, split)


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
    return Policy.shipped(_pair(settings)) if route.threshold is None else Policy.threshold(route.threshold)


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
