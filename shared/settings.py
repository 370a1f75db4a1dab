"""The only reader of the environment: every setting, checked once, at start.

A bad value refuses to start and names the setting; so does a DARKROOM_ variable that nobody knows,
because a misspelt setting that is silently ignored is found out on the day it was needed.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from shared.catalogue import MODELS

PREFIX = "DARKROOM_"
#: The vendor's own names, kept so that a team's existing variables work. They carry no prefix.
VENDOR_NAMES = {"dataoorts_api_key": "DATAOORTS_API_KEY", "dataoorts_url": "DATAOORTS_URL"}

#: What may make images, and how long a call of it may take in seconds, if nobody says otherwise.
CALL_SECONDS = {"dataoorts": 120.0, "diffusers": 300.0, "automatic1111": 300.0}
KNOWN_BACKENDS = tuple(CALL_SECONDS)
#: What an attempt takes beyond its call, at most: judging the picture, and writing down what came of it.
AROUND_CALL_SECONDS = 120.0
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


class SettingsError(Exception):
    """Some settings are missing or wrong. The message has a line a setting, with its name."""


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _parse_json(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error


def _networks(value: object) -> object:
    parts = _split(value)
    if not isinstance(parts, tuple):
        return parts
    networks = []
    for part in parts:
        try:
            networks.append(ip_network(part))
        except ValueError as error:
            raise ValueError(f"must name networks such as 10.20.0.0/16, separated by commas: {error}") from None
    return tuple(networks)


def _sizes(value: object) -> object:
    parts = _split(value)
    if not isinstance(parts, tuple) or not all(isinstance(part, str) for part in parts):
        return parts
    sizes = [re.fullmatch(r"([0-9]{2,4})x([0-9]{2,4})", part) for part in parts]
    if not all(sizes):
        raise ValueError("must name sizes such as 512x512, separated by commas")
    return tuple((int(size[1]), int(size[2])) for size in sizes if size)


class Settings(BaseModel):
    """What the operator decided. Field names are the variables' names without the prefix, in lower case."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    data_dir: Path = Path("data")
    #: Where a worker keeps received pictures until they are stored. It must outlive the worker, on one machine.
    spool: Path = Field(default_factory=lambda given: given.get("data_dir", Path()) / "spool", validate_default=True)
    database_url: str = ""  # empty: SQLite in data_dir
    redis_url: str = "redis://127.0.0.1:6379/0"
    api_key: str | None = Field(None, repr=False)
    secret_key: str = Field(repr=False)
    backends: Annotated[tuple[str, ...], BeforeValidator(_split)] = ("dataoorts",)
    image_store: str = "database"
    #: USD an image, by model; what is not named here costs what the catalogue says.
    prices: Annotated[dict[str, Decimal], BeforeValidator(_parse_json)] = {}
    lease_seconds: float = Field(20, ge=10, le=3600)
    #: The longest that one attempt may take; None: what the backend's own default is.
    attempt_seconds: float | None = Field(None, ge=10, le=3600)
    max_attempts: int = Field(3, ge=1, le=100)
    max_crashes: int = Field(3, ge=2, le=100)  # a first death accuses every job of its process: it can't be final
    max_wait_seconds: int = Field(86400, ge=1, le=30 * 86400)
    #: How many jobs may wait for one backend.
    max_queued: int = Field(100_000, ge=1, le=100_000_000)
    public_url: str | None = None
    #: Networks that webhooks may go to although they are not public.
    webhook_allow: Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(_networks)] = ()
    #: A folder or hub id of a Stable Diffusion XL pipeline, for the backend `diffusers`.
    gpu_model: str = Field("stabilityai/stable-diffusion-xl-base-1.0", min_length=1)
    gpu_revision: str | None = None  # a commit of the hub's repository
    gpu_download: bool = False  # whether the model may be fetched from the hub
    gpu_device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    gpu_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    gpu_low_memory: bool = False
    #: Sizes whose steps are compiled at the start, as (width, height). Nothing is compiled without any.
    gpu_compile: Annotated[tuple[tuple[int, int], ...], BeforeValidator(_sizes)] = ()
    #: A server that speaks the Automatic1111 web UI's API, for the backend `automatic1111`.
    automatic1111_url: str | None = None
    automatic1111_auth: str | None = Field(None, repr=False)  # user:password, as its --api-auth
    automatic1111_checkpoint: str | None = None  # None: what it has loaded
    automatic1111_sandbox: bool = False
    sandbox: bool = False
    #: `text` is for people at a terminal, `json` for machines.
    log_format: Literal["text", "json"] = "text"
    dataoorts_api_key: str | None = Field(None, repr=False)
    dataoorts_url: str = "https://cloud.dataoorts.com/api/v1"

    @field_validator("spool")
    @classmethod
    def _spool_is_a_path(cls, value: Path) -> Path:
        if not str(value).strip() or not str(value).isprintable():
            raise ValueError("must be the path of a folder")
        return value.absolute()

    @field_validator("secret_key")
    @classmethod
    def _secret_key_is_long(cls, value: str) -> str:
        if len(value) < 32:
            raise ValueError("must be 32 characters or more; `openssl rand -hex 32` makes one")
        return value

    @field_validator("api_key")
    @classmethod
    def _api_key_has_the_shape(cls, value: str | None) -> str | None:
        if value is not None and not (value.startswith("dk_") and len(value) >= 32 and value.isascii()):
            raise ValueError("must be an ASCII string of 32 characters or more that starts with dk_")
        if (value is not None and not value.isprintable()) or (value is not None and " " in value):
            raise ValueError("must hold no blanks or control characters")
        return value

    @field_validator("backends")
    @classmethod
    def _backends_are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in KNOWN_BACKENDS]
        if unknown or not value:
            raise ValueError(f"names {', '.join(unknown) or 'nothing'}; known: {', '.join(KNOWN_BACKENDS)}")
        if len(set(value)) < len(value):
            raise ValueError("names a backend twice")
        return value

    @field_validator("image_store")
    @classmethod
    def _image_store_is_known(cls, value: str) -> str:
        if value != "database":
            raise ValueError("must be `database`")
        return value

    @field_validator("prices")
    @classmethod
    def _prices_are_amounts_of_models(cls, value: dict[str, Decimal]) -> dict[str, Decimal]:
        for model, price in value.items():
            if model not in MODELS:
                near = difflib.get_close_matches(model, MODELS, 1) or list(MODELS)
                raise ValueError(f"there is no model {model}; did you mean {' or '.join(near)}?")
            if not price.is_finite() or not 0 <= price <= 1000:
                raise ValueError(f"the price of {model} must lie between 0 and 1000 USD")
            if price != price.quantize(Decimal("0.000001")):
                raise ValueError(f"the price of {model} is finer than a millionth of a dollar")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_url_has_a_scheme(cls, value: str) -> str:
        if urlsplit(value).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value

    @field_validator("database_url")
    @classmethod
    def _database_is_one_we_serve(cls, value: str) -> str:
        if value and urlsplit(value).scheme not in ("sqlite", "postgresql", "postgresql+psycopg"):
            raise ValueError("must start with postgresql:// or sqlite:///")
        return value.replace("postgresql://", "postgresql+psycopg://", 1)

    @field_validator("dataoorts_url", "public_url")
    @classmethod
    def _urls_are_whole(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("must be an http or https URL")
        return value

    @field_validator("automatic1111_url")
    @classmethod
    def _server_is_named_without_a_password(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError("must be an http or https URL, without what follows a ? or #")
            if "@" in parts.netloc:
                raise ValueError("must not hold a password: DARKROOM_AUTOMATIC1111_AUTH does")
        return value

    @field_validator("automatic1111_auth")
    @classmethod
    def _auth_is_a_user_and_a_password(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\x20-\x39\x3b-\x7e]+:[\x20-\x7e]+", value):
            raise ValueError("must be user:password, of printable ASCII characters")
        return value

    @model_validator(mode="after")
    def _backend_has_a_server(self) -> Self:
        if "automatic1111" in self.backends and self.automatic1111_url is None:
            raise ValueError(
                "DARKROOM_AUTOMATIC1111_URL: must be set, as DARKROOM_BACKENDS names automatic1111: where its server is"
            )
        return self

    @model_validator(mode="after")
    def _vendor_key_travels_encrypted(self) -> Self:
        parts = urlsplit(self.dataoorts_url)
        if parts.scheme == "http" and parts.hostname not in LOOPBACK_HOSTS and not self.sandbox:
            raise ValueError(
                "DATAOORTS_URL: plain http would show the key to the network; use https (http only to loopback)"
            )
        return self

    @model_validator(mode="after")
    def _database_defaults_to_sqlite(self) -> Self:
        if not self.database_url:
            object.__setattr__(self, "database_url", f"sqlite:///{self.data_dir.resolve() / 'darkroom.db'}")
        return self

    def call_seconds(self, backend: str) -> float:
        """How long a call of this backend may take."""
        return self.attempt_seconds or CALL_SECONDS[backend]

    def grace_seconds(self, backend: str) -> float:
        """How long its worker may take to end when asked to. Its calls are paid: ended before, they are paid twice."""
        return self.call_seconds(backend) + AROUND_CALL_SECONDS

    def is_sandbox(self, backend: str) -> bool:
        """Whether this backend's pictures come from the sandbox, which stands in for whoever is not there."""
        return {"dataoorts": self.sandbox, "automatic1111": self.automatic1111_sandbox}.get(backend, False)

    @property
    def secrets(self) -> list[str]:
        """What must stand in no log, whoever writes it."""
        passwords = [urlsplit(url).password for url in (self.database_url, self.redis_url)]
        if self.automatic1111_auth:
            passwords += [self.automatic1111_auth, self.automatic1111_auth.partition(":")[2]]
        return [text for text in (self.secret_key, self.api_key, self.dataoorts_api_key, *passwords) if text]

    @property
    def broker_url(self) -> str:
        """The Redis URL as Celery spells it (a socket is `redis+socket://`, its database `virtual_host`)."""
        if self.redis_url.startswith("unix://"):
            return self.redis_url.replace("unix://", "redis+socket://", 1).replace("?db=", "?virtual_host=", 1)
        return self.redis_url


def variable(field: str) -> str:
    """The environment variable of a setting."""
    return VENDOR_NAMES.get(field, PREFIX + field.upper())


def load(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Read and check all settings; raises SettingsError with a line for each that is wrong.

    An empty variable counts as not set, as it does in a compose file that passes `${NAME:-}` on.
    """
    environ = os.environ if environ is None else environ
    known = {variable(field): field for field in Settings.model_fields}
    lines = []
    for name in environ:
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            lines.append(f"{name}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
    values = {field: environ[name] for name, field in known.items() if environ.get(name)} | overrides
    settings = None
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False):
            field = str(problem["loc"][0]) if problem["loc"] else ""
            what = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "missing":
                what = "must be set; `openssl rand -hex 32` makes one" if field == "secret_key" else "must be set"
            lines.append(f"{variable(field)}: {what}" if field else what)
    if lines or settings is None:
        raise SettingsError("\n".join(lines))
    return settings


def log_format() -> str:
    """How to log, for those who log before the settings are read. A wrong value is refused where they are."""
    return "json" if os.environ.get(variable("log_format")) == "json" else "text"


def given() -> dict[str, str]:
    """The settings that the environment names, as they stand there: what `./dev up` fills up with its own."""
    return {name: value for name in map(variable, Settings.model_fields) if (value := os.environ.get(name))}


def child_environ(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that we start: ours, with these variables set."""
    return {**os.environ, **changes}
