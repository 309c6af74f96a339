"""Every setting of the server: a flag, else ``VBLORA_*`` in the environment, else the YAML file, else its default.

The one list behind the command line and docs/settings.md (`settings_reference.py`). Knows neither HTTP nor engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

import yaml
from platformdirs import user_data_path
from pydantic import BeforeValidator, ByteSize, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from serving.types import EngineSettings, TenantLimits

ENV_PREFIX = "VBLORA_"
# No endpoint, user or password: those are the environment's.
_STORAGE_URL = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]+(/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*/?|file:///.+")
MODEL_HELP = "Base model: a hub id, a folder, a .gguf file, or `demo`, which also registers the shipped adapters."


class SettingsError(Exception):
    """Settings that cannot be used; the message names them as an operator writes them."""


def default_data_dir() -> Path:
    """Where a server keeps its data if it is told no other folder."""
    return user_data_path("vblora-serve", appauthor=False)


def _split(value: Any) -> Any:
    return [item for item in value.split(",") if item] if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split)]
Positive = Annotated[int, Field(ge=1)]
Quota = Annotated[int, Field(ge=0)] | None
NO_LIMIT = "0 is no limit; a tenant may have its own."


class ServerSettings(BaseSettings):
    """What `vblora-serve run` takes. Lists are repeated flags, and comma-separated in the environment."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    model: str = Field(description=MODEL_HELP)
    served_model_name: str | None = Field(None, description="Name of the base model in the API, instead of its own.")
    chat_template: str | None = Field(None, description="Chat template to use instead of the model's: a Jinja file.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    allow_unauthenticated: bool = Field(
        False, description="Serve without keys on an address that is not loopback: whoever reaches it may do anything."
    )
    allowed_hosts: Texts = Field(
        (),
        description="Host that requests may name; by default any, but without keys loopback's on a loopback address. "
        "Repeatable.",
    )
    require_keys: bool = Field(False, description="Do not start while there is no tenant in the registry.")
    admin_port: int | None = Field(
        None, ge=0, le=65535, description="Port that serves /metrics, /health* and /version without a key, over HTTP."
    )
    admin_host: str = Field("127.0.0.1", description="Address of admin-port.")
    jwt_issuer: str | None = Field(None, description="Issuer of the JSON Web Tokens that are taken besides keys.")
    jwt_audience: str | None = Field(None, description="Audience that tokens must name.")
    jwt_jwks: str | None = Field(None, description="The issuer's public keys: a JWKS file, or its https address.")
    jwt_tenant_claim: str = Field("sub", description="Claim of a token that names the tenant.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the base model's weights; `auto` takes the one they are stored in."
    )
    device: str = Field("cpu", description="Torch device, `cpu` or `cuda`.")
    max_batch_size: Positive = Field(32, description="Most requests in one step.")
    max_model_len: Positive | None = Field(None, description="Most tokens of prompt and answer; at most the model's.")
    max_batched_tokens: Positive = Field(512, description="Most tokens in one step, prompts in chunks included.")
    max_queue: Positive = Field(4096, description="Most requests waiting, over all tenants.")
    max_queue_per_tenant: Positive = Field(512, description="Most requests of one tenant waiting.")
    requests_per_minute: Quota = Field(None, description=f"Requests of one tenant a minute. {NO_LIMIT}")
    tokens_per_minute: Quota = Field(
        None,
        description="Tokens of one tenant a minute, of prompts and answers; max_tokens count till an answer ends. "
        + NO_LIMIT,
    )
    concurrent_requests: Quota = Field(
        None, description=f"Requests of one tenant at a time, on this process. {NO_LIMIT}"
    )
    max_tokens: Quota = Field(None, description=f"Most tokens that one answer may ask for. {NO_LIMIT}")
    max_adapters: Quota = Field(None, description=f"Most adapters of one tenant. {NO_LIMIT}")
    max_adapter_bytes: ByteSize | None = Field(
        None, description=f"Most bytes of one tenant's adapters, all revisions together. {NO_LIMIT}"
    )
    redis_url: str | None = Field(
        None, description="Redis that counts requests and tokens a minute for several servers together, redis://…"
    )
    kv_cache_memory: ByteSize | None = Field(
        None,
        description="Memory for keys and values, such as 2GiB; by default a quarter of the free memory, at most 4GiB.",
    )
    block_size: Positive = Field(16, description="Tokens in a block of the key and value cache.")
    max_rank: Positive = Field(16, description="Highest rank of an adapter that is accepted.")
    adapter_slots: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Slots for composed adapters, the empty one included; by default max-batch-size + 1."
    )
    adapter_memory: ByteSize = Field(
        ByteSize(2**30),
        description="Memory for the adapters and banks that are kept between requests, such as 1GiB. What running "
        "requests use stays whatever it takes, so any value works; with 0 each request reads its adapter anew.",
    )
    adapter_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of composed adapters in their slots; `auto` takes the base model's."
    )
    quantization: Literal["int8"] | None = Field(
        None, description="`int8` computes the base model's linear layers in 8-bit integers: faster, slightly worse."
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="Where uploaded adapters and their registry are kept.",
    )
    database_url: str | None = Field(
        None, description="Registry's database, sqlite:///… or postgresql://…; by default a file in data-dir."
    )
    storage_url: str | None = Field(
        None,
        description="Where adapters' bytes are kept, s3://BUCKET/PREFIX or file:///FOLDER; by default a folder in "
        "data-dir.",
    )
    adapter: Texts = Field((), description="Shared adapter to register at start, as NAME=PATH. Repeatable.")
    adapter_root: Paths = Field((), description="Folder below which load_lora_adapter may read. Repeatable.")
    adapters_dir: Path | None = Field(
        None,
        description="Folder that is watched: each folder in it with an adapter's two files is a shared adapter.",
    )
    keep_revisions: Positive = Field(10, description="Revisions kept of an adapter, beside active and pinned ones.")
    drain_timeout: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="Seconds that running requests get to finish after SIGTERM."
    )
    cors_origins: Texts = Field((), description="Origin whose pages may call the API; `*` for all. Repeatable.")
    ssl_certfile: Path | None = Field(None, description="TLS certificate chain, PEM.")
    ssl_keyfile: Path | None = Field(None, description="TLS private key, PEM.")
    metrics_tenant_label: bool = Field(
        False, description="Tell tenants apart in the metrics that count requests and tokens."
    )
    metrics_compat: Literal["vllm"] | None = Field(
        None, description="Also give the gauges that gateways and dashboards made for this server look for: `vllm`."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log lines shown.")
    max_body_bytes: ByteSize = Field(ByteSize(4 * 2**20), description="Largest JSON body.")
    max_upload_bytes: ByteSize = Field(ByteSize(64 * 2**20), description="Largest upload of an adapter.")
    max_prompts: Positive = Field(256, description="Most prompts in one request.")
    max_stop: Positive = Field(16, description="Most stop strings in one request.")
    max_stop_token_ids: Positive = Field(1024, description="Most stop token ids in one request.")
    max_logit_bias: Positive = Field(1024, description="Most entries of logit_bias in one request.")
    max_choices: Positive = Field(16, description="Most choices of one prompt, `n`.")
    max_allowed_token_ids: Positive = Field(8192, description="Most allowed_token_ids in one request.")
    max_bad_words: Positive = Field(128, description="Most bad_words in one request.")
    max_logprobs: Positive = Field(20, description="Most of the likeliest tokens told of at each token.")
    max_tools: Positive = Field(128, description="Most tools in one request.")
    max_structure_bytes: ByteSize = Field(
        ByteSize(64 * 2**10), description="Longest schema, regular expression or grammar that answers must match."
    )
    max_structure_choices: Positive = Field(1024, description="Most entries of structured_outputs.choice.")

    @field_validator("adapter")
    @classmethod
    def _name_and_path(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [entry for entry in value if not all(entry.partition("="))]:
            raise ValueError(f"write NAME=PATH, not {wrong[0]!r}")
        return value

    @field_validator("storage_url")
    @classmethod
    def _bucket_or_folder(cls, value: str | None) -> str | None:
        if value is not None and not _STORAGE_URL.fullmatch(value):
            raise ValueError("write s3://BUCKET, s3://BUCKET/PREFIX or file:///FOLDER")
        return value

    @model_validator(mode="after")
    def _check_what_belongs_together(self) -> ServerSettings:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl-certfile and ssl-keyfile belong together")
        if len({self.jwt_issuer is None, self.jwt_audience is None, self.jwt_jwks is None}) > 1:
            raise ValueError("jwt-issuer, jwt-audience and jwt-jwks belong together")
        return self

    def asks_for_keys(self, *, tenants: bool) -> bool:
        """Whether callers need keys: if there are `tenants`. Raises `SettingsError` where a server without keys is not
        wanted."""
        if tenants:
            return True
        if self.require_keys or self.jwt_issuer is not None:
            flag = "--require-keys" if self.require_keys else "--jwt-issuer"
            raise SettingsError(
                f"{flag} needs a tenant and the registry has none: vblora-serve tenant add NAME --role operator"
            )
        if not self.loopback and not self.allow_unauthenticated:
            raise SettingsError(
                f"host {self.host} is reachable from other machines and this server asks for no keys: listen on "
                "127.0.0.1, make keys with `vblora-serve tenant add`, or add --allow-unauthenticated"
            )
        return False

    def to_tenant_limits(self) -> TenantLimits:
        """What holds for tenants that have no limits of their own."""
        return TenantLimits(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            concurrent_requests=self.concurrent_requests,
            queued_requests=self.max_queue_per_tenant,
            max_tokens=self.max_tokens,
            adapters=self.max_adapters,
            adapter_bytes=self.max_adapter_bytes,
        )

    @property
    def storage_folder(self) -> Path | None:
        """The folder that `storage_url` means, if it means one."""
        if self.storage_url is None or not self.storage_url.startswith("file:"):
            return None
        return Path(url2pathname(urlsplit(self.storage_url).path))

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach `host`."""
        return is_loopback(self.host)

    @property
    def adapters(self) -> dict[str, Path]:
        """`adapter` as name → folder."""
        return {name: Path(path) for name, _, path in (entry.partition("=") for entry in self.adapter)}

    def to_engine_settings(self) -> EngineSettings:
        """The part that the engine needs."""
        return EngineSettings(
            model=self.model,
            served_model_name=self.served_model_name,
            chat_template=self.chat_template,
            dtype=self.dtype,
            device=self.device,
            max_batch_size=self.max_batch_size,
            max_model_len=self.max_model_len,
            max_batched_tokens=self.max_batched_tokens,
            max_queue=self.max_queue,
            max_queue_per_tenant=self.max_queue_per_tenant,
            block_size=self.block_size,
            kv_cache_bytes=self.kv_cache_memory,
            max_rank=self.max_rank,
            adapter_slots=self.adapter_slots,
            adapter_memory_bytes=self.adapter_memory,
            adapter_dtype=self.adapter_dtype,
            quantization=self.quantization,
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> ServerSettings:
    """Settings from `flags` (None: not given), the environment and the YAML file `config`.

    Raises `SettingsError` naming the first setting at fault.
    """
    file = {} if config is None else _read_yaml(config)

    class Layered(ServerSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=file)

    try:
        return Layered(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise SettingsError(_explain(error)) from error


def flag_of(name: str) -> str:
    """The flag of a setting: ``max_rank`` → ``--max-rank``."""
    return "--" + name.replace("_", "-")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise SettingsError(f"--config {path} must map names of settings to values")
    return {str(name).replace("-", "_"): value for name, value in data.items()}


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"there is no setting {name}"
    if first["type"] == "missing":
        return f"{name} is required: give {name.upper()}, or set {ENV_PREFIX}{name.upper()}"
    return f"{flag_of(name)}: {message[:1].lower() + message[1:]}"
