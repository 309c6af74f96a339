"""The only wiring: settings → engine, catalog, metrics, application, process. Knows everybody; nobody knows it."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from serving.adapters.catalog import Catalog
from serving.adapters.registry import Registry
from serving.adapters.storage.folder import open_folder
from serving.adapters.storage.revisions import RevisionStorage
from serving.adapters.watched import WatchedFolder
from serving.api.application import build_admin_application, build_application
from serving.api.context import ApiContext, Caps
from serving.api.lifecycle import Lifecycle
from serving.api.middleware import LOOPBACK_HOSTS
from serving.demo import demo_adapters
from serving.engine import Engine
from serving.errors import ServingError, StartupError
from serving.listeners import bind, configured, served
from serving.metrics import AdapterGauges, Metrics
from serving.settings import ServerSettings, SettingsError, is_loopback
from serving.store.database import DatabaseError, open_database, sqlite_url
from serving.tenancy.quotas import TenantQuotas
from serving.tenancy.service import Tenancy, keyed_tenancy, open_tenancy
from serving.tenancy.tenants import TenantRegistry
from serving.tenancy.usage import SqlUsageLedger
from serving.tenancy.windows import Windows, WindowsError
from serving.upkeep import sweep_hourly, watch

DEMO_MODEL = "demo"
CLOSE_SECONDS = 5.0
_log = logging.getLogger(__name__)


def create_app(settings: ServerSettings, engine: Engine | None = None) -> FastAPI:
    """The application over `engine`, or over one that this loads; the application closes it when it ends.

    Raises `StartupError` when the base model, the registry or an adapter of the settings cannot be used, and
    `SettingsError` when the settings ask for keys and there are none.
    """
    with ExitStack() as undo:
        database = _open_database(settings)
        undo.callback(database.dispose)
        usage = SqlUsageLedger(database)
        undo.callback(usage.close)
        tenancy = _open_tenancy(settings, database)
        undo.callback(tenancy.close)
        bucket = _open_bucket(settings)
        admin_listener = None
        if settings.admin_port is not None:
            admin_listener = undo.enter_context(bind(settings.admin_host, settings.admin_port))
        metrics = Metrics(
            CollectorRegistry(), tenant_label=settings.metrics_tenant_label, vllm=settings.metrics_compat == "vllm"
        )
        windows = _open_windows(settings, metrics)
        undo.callback(windows.close)
        engine = engine or Engine.from_settings(settings.to_engine_settings(), observer=metrics)
        undo.callback(engine.close, CLOSE_SECONDS)
        catalog = _open_catalog(settings, engine, database, bucket)
        watched = _open_watched(settings, catalog)
        quotas = TenantQuotas(tenancy.directory, settings.to_tenant_limits(), windows)
        context = _context(settings, engine, catalog, metrics, tenancy, quotas, usage)
        opened = undo.pop_all()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, opened.close)
            stack.callback(asyncio.create_task(sweep_hourly(catalog)).cancel)
            if watched is not None:
                stack.callback(asyncio.create_task(watch(watched)).cancel)
                stack.callback(watched.close)
            if admin_listener is not None:
                admin_context = replace(context, hosts=LOOPBACK_HOSTS if is_loopback(settings.admin_host) else None)
                _log.info("metrics and health on port %d", admin_listener.getsockname()[1])
                await stack.enter_async_context(served(build_admin_application(admin_context), admin_listener))
            yield

    return build_application(context, lifespan, settings.cors_origins)


def _context(
    settings: ServerSettings,
    engine: Engine,
    catalog: Catalog,
    metrics: Metrics,
    tenancy: Tenancy,
    quotas: TenantQuotas,
    usage: SqlUsageLedger,
) -> ApiContext:
    metrics.watch(engine.stats, lambda: _adapter_gauges(catalog, engine))
    return ApiContext(
        engine=engine,
        codec=engine.codec,
        structures=engine.grammars,
        card=engine.card,
        catalog=catalog,
        authenticator=tenancy.authenticator,
        tenants=tenancy.tenants,
        observer=metrics,
        lifecycle=Lifecycle(),
        quotas=quotas,
        usage=usage,
        registry=metrics.registry,
        version=version("vblora"),
        caps=_caps(settings),
        hosts=_hosts(settings, tenancy),
        keyed=tenancy.keyed,
    )


def serve(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises `StartupError` and `SettingsError`."""
    with bind(settings.host, settings.port) as listener:
        app = create_app(settings)
        config = configured(app, ssl_certfile=settings.ssl_certfile, ssl_keyfile=settings.ssl_keyfile)
        context: ApiContext = app.state.context
        try:
            config.load()
        except OSError as error:
            raise StartupError(f"the certificate or its key cannot be used: {error}") from error
        _log.info("serving %s on %s", context.card.base_id, _address(settings, listener))
        DrainingServer(config, context.lifecycle, settings.drain_timeout).run(sockets=[listener])


class DrainingServer(uvicorn.Server):
    """uvicorn, but a signal first stops new work and leaves the listener open until the running requests end.

    After `timeout` seconds, or at a second signal, what still generates is ended with an error. Exit status 0.
    """

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, timeout: float) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._timeout = timeout
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._deadline = now + self._timeout if self._deadline is None else now

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None:
            self._lifecycle.drain()
            expired = time.monotonic() >= self._deadline
            if expired:
                self._lifecycle.end_generations()
            self.should_exit = expired or not self._lifecycle.in_flight
        return await super().on_tick(counter)


def _address(settings: ServerSettings, listener: socket.socket) -> str:
    scheme = "https" if settings.ssl_certfile else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


def _open_database(settings: ServerSettings) -> Database:
    try:
        return open_database(settings.database_url or sqlite_url(settings.data_dir / "registry.db"))
    except DatabaseError as error:
        raise StartupError(str(error)) from error


def _open_windows(settings: ServerSettings, metrics: Metrics) -> Windows:
    try:
        return Windows(settings.redis_url, failed=metrics.on_quota_storage_error)
    except WindowsError as error:
        raise StartupError(f"--redis-url: {error}") from error


def _open_tenancy(settings: ServerSettings, database: Database) -> Tenancy:
    if not settings.asks_for_keys(tenants=bool(TenantRegistry(database))):
        return open_tenancy(database)
    if settings.jwt_issuer is None or settings.jwt_audience is None or settings.jwt_jwks is None:
        return keyed_tenancy(database)
    try:
        from serving.tenancy.jwks import Jwks, JwksError  # an extra: not everybody has it
        from serving.tenancy.tokens import TokenVerifier
    except ImportError as error:
        raise StartupError("tokens need the extra `jwt`: pip install 'vblora[jwt]'") from error
    try:
        jwks = Jwks(settings.jwt_jwks)
    except JwksError as error:
        raise StartupError(f"--jwt-jwks: {error}") from error
    return keyed_tenancy(
        database, TokenVerifier(jwks, settings.jwt_issuer, settings.jwt_audience, settings.jwt_tenant_claim)
    )


def _open_catalog(
    settings: ServerSettings, engine: Engine, database: Database, bucket: RevisionStorage | None
) -> Catalog:
    """The registry of this base model, with the adapters of the settings in it."""
    try:
        catalog = Catalog(
            Registry(database, engine.card.base_id),
            bucket or _open_folder(settings, engine.card.base_id),
            engine.residency,
            engine.layout.compact,
            adapter_roots=settings.adapter_root,
            reserved={engine.card.base_id},
            keep_revisions=settings.keep_revisions,
        )
    except (OSError, SQLAlchemyError) as error:
        where = "--storage-url" if settings.storage_url else "--data-dir"
        raise StartupError(f"the adapters under {where} cannot be used: {error}") from error
    shipped = demo_adapters() if settings.model == DEMO_MODEL else {}
    for name, path in {**shipped, **settings.adapters}.items():
        _register(catalog, name, path)
    return catalog


def _open_folder(settings: ServerSettings, base_id: str) -> RevisionStorage:
    """The storage in a folder: the one that is set, or the base's own, as adapters fit one base only."""
    of_base = settings.data_dir / "adapters" / re.sub(r"[^A-Za-z0-9_-]+", "-", base_id) / "revisions"
    return open_folder(settings.storage_folder or of_base)


def _open_bucket(settings: ServerSettings) -> RevisionStorage | None:
    """The storage in a bucket, if one is set. Nothing is asked of it yet."""
    if settings.storage_url is None or settings.storage_folder is not None:
        return None
    try:
        from serving.adapters.storage.s3 import S3Objects  # an extra: not everybody has it
    except ImportError as error:
        raise SettingsError("--storage-url: s3://… needs the extra `s3`: pip install 'vblora[s3]'") from error
    try:
        return RevisionStorage(S3Objects(settings.storage_url))
    except OSError as error:
        raise StartupError(f"--storage-url cannot be used: {error}") from error


def _register(catalog: Catalog, name: str, path: Path) -> None:
    try:
        catalog.register(name, path)
    except ServingError as error:
        raise StartupError(f"adapter {name} from {path}: {error.message}") from error


def _open_watched(settings: ServerSettings, catalog: Catalog) -> WatchedFolder | None:
    if settings.adapters_dir is None:
        return None
    if not settings.adapters_dir.is_dir():
        raise StartupError(f"--adapters-dir {settings.adapters_dir} is not a folder")
    return WatchedFolder(settings.adapters_dir, catalog.declared)


def _adapter_gauges(catalog: Catalog, engine: Engine) -> AdapterGauges:
    stats = engine.residency.stats()
    return AdapterGauges(
        len(catalog), stats.adapters, stats.bytes, stats.banks, stats.bank_bytes, evictions=stats.evictions
    )


def _hosts(settings: ServerSettings, tenancy: Tenancy) -> frozenset[str] | None:
    """The Host headers that are answered; None answers any, as a key protects from whatever page sends them."""
    if settings.allowed_hosts:
        return frozenset(host.lower() for host in settings.allowed_hosts)
    return LOOPBACK_HOSTS if settings.loopback and not tenancy.keyed else None


def _caps(settings: ServerSettings) -> Caps:
    return Caps(
        body_bytes=settings.max_body_bytes,
        upload_bytes=settings.max_upload_bytes,
        prompts=settings.max_prompts,
        stop=settings.max_stop,
        stop_token_ids=settings.max_stop_token_ids,
        choices=settings.max_choices,
        allowed_token_ids=settings.max_allowed_token_ids,
        bad_words=settings.max_bad_words,
        logit_bias=settings.max_logit_bias,
        logprobs=settings.max_logprobs,
        tools=settings.max_tools,
        structure_bytes=settings.max_structure_bytes,
        structure_choices=settings.max_structure_choices,
    )
