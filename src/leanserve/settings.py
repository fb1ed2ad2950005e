"""Every setting: its one home.

A setting is a field of one of the small frozen groups below, and each part of the server gets its own group
and nothing else. The name of a field is unique over all groups, so a flat ``name=value`` finds its group; the
command line, the environment variables and docs/reference/settings.md are all made from these fields.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from typing import Any

from leanserve.errors import SettingsError
from leanserve.option import Frozen, Option, check_value, option
from leanserve.workerenv import parse_worker_env

#: The highest limit that can be counted over all processes of a pool (leanserve.tokens).
MAX_TOKENS = 32768

__all__ = [
    "ACCESS_ATOM",
    "AdminSettings",
    "AdmissionSettings",
    "CancelSettings",
    "CrashSettings",
    "DrainSettings",
    "FlowSettings",
    "HttpSettings",
    "ListenSettings",
    "LoadSettings",
    "LogSettings",
    "Option",
    "PoolSettings",
    "ProxySettings",
    "RecycleSettings",
    "ReloadSettings",
    "RequestSettings",
    "RollSettings",
    "Settings",
    "TimeoutSettings",
    "TlsSettings",
    "WebSocketSettings",
    "WorkerSettings",
    "options",
    "uses_tls",
]


class ListenSettings(Frozen):
    """Address"""

    host: str = option("127.0.0.1", "Address to listen on; '::' is dual stack.")
    port: int = option(8000, "Port to listen on; 0 lets the kernel choose.", minimum=0, maximum=65535)
    bind: tuple[str, ...] = option(
        (), "HOST:PORT, [IPV6]:PORT, unix:PATH or fd://N; may be repeated, and replaces --host and --port."
    )
    uds: str | None = option(None, "Path of a unix socket to listen on.")
    uds_mode: int = option(
        0o660, "File mode of the unix socket, set before it listens.", unit="octal", minimum=0, maximum=0o777
    )
    fd: int | None = option(None, "Listen on this inherited socket descriptor.", minimum=0)
    backlog: int = option(2048, "Connections that the kernel may queue per listener.", minimum=1)
    accept: str = option(
        "auto",
        "A listener per worker (SO_REUSEPORT: even load) or one shared by all; auto: per-worker on Linux.",
        choices=("auto", "per-worker", "shared"),
    )
    accept_below: int | None = option(
        None,
        "New connections only while fewer requests than this are at work in the worker; with more, they go "
        "to others or wait in the kernel.",
        minimum=1,
    )


class LoadSettings(Frozen):
    """Application"""

    factory: bool = option(False, "APP is a function without arguments that returns the application.")
    interface: str = option(
        "auto", "Interface of the application.", choices=("auto", "asgi3", "asgi2", "wsgi")
    )
    app_dir: str = option("", "Directory to look for APP in, before the Python path.")
    root_path: str = option("", "Path prefix that a proxy strips: ASGI root_path.")
    lifespan: str = option("auto", "Lifespan protocol.", choices=("auto", "on", "off"))
    lifespan_startup_timeout: float | None = option(
        None, "Longest lifespan startup; none waits for ever (a model may load for minutes).",
        unit="seconds", minimum=0,
    )
    lifespan_shutdown_timeout: float | None = option(
        30.0, "Longest lifespan shutdown.", unit="seconds", minimum=0
    )
    wsgi_threads: int = option(40, "Threads of one worker for a WSGI application.", minimum=1)


class HttpSettings(Frozen):
    """HTTP"""

    request_line_bytes: int = option(
        8190, "Longest request line; beyond it 414.", unit="bytes", minimum=64
    )
    header_bytes: int = option(
        65536,
        "Largest header block; beyond it 431.",
        unit="bytes",
        aliases=("h11_max_incomplete_event_size",),
        minimum=256,
    )
    header_count: int = option(128, "Most header lines; beyond it 431.", minimum=1)
    trailer_bytes: int = option(
        8192, "Largest trailer section; beyond it (or header_count lines) 431.", unit="bytes", minimum=0
    )
    max_body_size: int | None = option(
        None, "Largest request body; beyond it 413. None: the server holds no more of it than the "
        "application leaves unread.", unit="bytes", minimum=0,
    )
    server_header: bool = option(True, "Send the server header.")
    date_header: bool = option(True, "Send the date header.")
    header: tuple[str, ...] = option(
        (), "NAME:VALUE to add to every response; may be repeated.", separators="\n"
    )
    fastpath: bool = option(
        True, "Recognise plain requests and WebSocket frames; what goes over the wire is the same."
    )


class TimeoutSettings(Frozen):
    """Deadlines"""

    first_byte_timeout: float = option(
        10.0, "From accept to the first byte of a request.", unit="seconds", minimum=0
    )
    header_timeout: float = option(
        20.0, "From the first byte of a request to the end of its header block; then 408.",
        unit="seconds", minimum=0,
    )
    keep_alive_timeout: float = option(
        75.0, "Idle time between two requests of a connection.",
        unit="seconds", aliases=("timeout_keep_alive",), minimum=0,
    )
    linger_timeout: float = option(
        5.0, "How long input is read and dropped after our last byte, so that the peer can read it.",
        unit="seconds", minimum=0,
    )
    tls_handshake_timeout: float = option(10.0, "TLS handshake.", unit="seconds", minimum=0.1)
    tls_close_timeout: float = option(
        5.0, "Wait for the peer's TLS close_notify.", unit="seconds", minimum=0.1
    )


class RequestSettings(Frozen):
    """Requests"""

    body_timeout: float = option(
        20.0, "Longest silence within a request body, and the start that body_min_rate gives; then 408.",
        unit="seconds", minimum=0,
    )
    body_min_rate: int = option(
        100, "What a request body has to bring on average; 0 lets it trickle.",
        unit="bytes per second", minimum=0,
    )
    send_timeout: float | None = option(
        60.0, "Within this a peer has to read send_high_water bytes of what waits for it, or it is cut.",
        unit="seconds", minimum=0,
    )
    request_timeout: float | None = option(
        None, "From the complete request to the end of the response; then 504, or a cut connection.",
        unit="seconds", minimum=0,
    )
    request_timeout_header: str | None = option(
        "request-timeout",
        "Field in which a client says how many seconds it will wait; request_timeout is the most it gets.",
    )
    response_start_timeout: float | None = option(
        None, "From the complete request to the first byte of the response; then 504.",
        unit="seconds", minimum=0,
    )
    response_gap_timeout: float | None = option(
        None, "Longest silence of the application within a response; then the connection is cut.",
        unit="seconds", minimum=0,
    )
    sse_comment_interval: float | None = option(
        None, "Send a comment while a text/event-stream response is silent for this long.",
        unit="seconds", minimum=0.01,
    )


class CancelSettings(Frozen):
    """Cancellation"""

    cancel_on_disconnect: bool = option(
        True, "Cancel the application when its client has gone; without, it is told and no more."
    )
    disconnect_policy: tuple[str, ...] = option(
        (), "PATTERN=cancel, notify or ignore for paths, as '/jobs/*=ignore'; the first that fits; repeated.",
    )
    half_close: str = option(
        "deliver",
        "A client that closes its sending side behind a request: deliver the response, or take it as gone.",
        choices=("deliver", "disconnect"),
    )
    ws_cancel_grace: float = option(
        5.0, "From websocket.disconnect to the cancellation of an application that still runs.",
        unit="seconds", minimum=0,
    )


class DrainSettings(Frozen):
    """Stopping"""

    drain_timeout: float = option(
        30.0, "How long running requests may take to finish after SIGTERM.",
        unit="seconds", aliases=("timeout_graceful_shutdown",), minimum=0,
    )
    pre_stop_delay: float = option(
        0.0, "Keep accepting for this long after SIGTERM, until the load balancer has noticed.",
        unit="seconds", minimum=0,
    )
    drain_idle_timeout: float = option(
        1.0, "While draining, how long an idle connection may still bring its next request.",
        unit="seconds", minimum=0,
    )
    kill_grace: float = option(
        5.0, "From the end of the drain to SIGKILL.", unit="seconds", minimum=0
    )


class FlowSettings(Frozen):
    """Back-pressure"""

    send_high_water: int = option(
        65536, "Unsent bytes of one connection at which send() waits.", unit="bytes", minimum=1
    )
    receive_high_water: int = option(
        65536, "Bytes the application has not received at which reading stops.", unit="bytes", minimum=1
    )


class WebSocketSettings(Frozen):
    """WebSocket"""

    ws_max_size: int = option(16777216, "Largest message; beyond it close 1009.", unit="bytes", minimum=1)
    ws_max_fragments: int = option(
        16384, "Most fragments of one message, besides one per 64 bytes; beyond it close 1009.", minimum=1
    )
    ws_ping_interval: float | None = option(
        20.0, "Send a ping after this time; 0 sends none.", unit="seconds", minimum=0
    )
    ws_ping_timeout: float | None = option(
        20.0, "Close with 1011 when nothing arrives for this long after a ping; 0 never does.",
        unit="seconds", minimum=0,
    )
    ws_close_timeout: float = option(
        10.0, "How long to wait for the peer's half of the closing handshake.", unit="seconds", minimum=0
    )
    ws_per_message_deflate: bool = option(
        False, "Offer compression; costs memory per connection and time per message."
    )
    ws_deflate_window_bits: int = option(
        15, "Largest compression window, as a power of two; a client may not offer to limit its own.",
        minimum=9, maximum=15,
    )
    ws_deflate_mem_level: int = option(
        8, "Memory of a compressor besides its window: 2 to the power of this + 9, in bytes.",
        minimum=1, maximum=9,
    )
    ws_deflate_context_takeover: bool = option(
        True, "Keep the windows from one message to the next; without, an idle connection has none."
    )


class TlsSettings(Frozen):
    """TLS"""

    ssl_certfile: str | None = option(None, "Certificate chain (PEM).")
    ssl_keyfile: str | None = option(None, "Private key (PEM), when it is not in the certificate file.")
    ssl_keyfile_password: str | None = option(None, "Password of the private key.", secret=True)
    ssl_ca_certs: str | None = option(None, "Certificates that client certificates are checked against.")
    ssl_cert_reqs: str = option(
        "none", "Ask for a client certificate; 0, 1 and 2 mean none, optional and required.",
        choices=("none", "optional", "required"),
        synonyms={"0": "none", "1": "optional", "2": "required"},
    )
    ssl_min_version: str = option("1.2", "Lowest TLS version.", choices=("1.2", "1.3"))
    ssl_ciphers: str | None = option(None, "OpenSSL cipher list for TLS 1.2; none is Python's own choice.")
    ssl_context_factory: Callable[[], Any] | str | None = option(
        None, "Function (or module:attr of one) that returns the ssl.SSLContext, called in every worker.",
    )


def uses_tls(settings: TlsSettings) -> bool:
    """Whether the listeners speak TLS."""
    return settings.ssl_certfile is not None or settings.ssl_context_factory is not None


class ProxySettings(Frozen):
    """Proxies in front"""

    proxy_headers: bool = option(True, "Believe X-Forwarded-For and X-Forwarded-Proto of trusted peers.")
    forwarded_allow_ips: str = option(
        "127.0.0.1,::1",
        "Trusted proxies: addresses, networks, 'unix', or '*' for the last hop whoever it is.",
        environment=("FORWARDED_ALLOW_IPS",),
    )
    proxy_protocol: str = option(
        "off", "PROXY protocol (v1, v2) in front of HTTP and TLS; required: all others are closed.",
        choices=("off", "optional", "required"),
    )
    proxy_protocol_allow_ips: str = option(
        "127.0.0.1,::1", "Peers whose PROXY header is believed: addresses, networks, 'unix', or '*'."
    )


class AdmissionSettings(Frozen):
    """Admission"""

    max_concurrent_requests: int | None = option(
        None, "Most requests and WebSockets at work in all workers together; further ones wait or get 503.",
        aliases=("limit_concurrency",), minimum=1, maximum=MAX_TOKENS,
    )
    max_queue: int = option(
        0, "Most requests that wait until one of them is done; beyond it 503 with Retry-After.",
        minimum=0, maximum=MAX_TOKENS,
    )
    queue_timeout: float | None = option(
        30.0, "Longest wait; then 503 with Retry-After. None waits for ever.", unit="seconds", minimum=0
    )
    fair_by: str | None = option(
        None, "Who waits is served in turns per 'client' (its address) or per value of this request header."
    )
    limit_exempt: tuple[str, ...] = option(
        ("/health", "/healthz", "/livez", "/readyz", "/ping", "/v2/health/live", "/v2/health/ready"),
        "Path that is neither counted nor limited; may be repeated, and replaces these; '' exempts none.",
    )


class WorkerSettings(Frozen):
    """Worker"""

    loop: str = option(
        "auto", "Event loop; auto is uvloop where it is installed.", choices=("auto", "uvloop", "asyncio")
    )
    stall_limit: float | None = option(
        1.0, "Log what blocks the event loop for longer than this, while it does; none looks for nothing.",
        unit="seconds", minimum=0.1,
    )
    flight_recorder: bool = option(
        False, "Note the requests at work where it outlives the worker: when one dies, the log names them."
    )


class RecycleSettings(Frozen):
    """Recycling"""

    limit_max_requests: int | None = option(
        None, "Replace a worker after this many requests, its successor ready first.", minimum=1
    )
    limit_max_requests_jitter: int = option(
        0, "Add a random number up to this to limit_max_requests, so that workers do not leave together.",
        minimum=0,
    )
    limit_max_age: float | None = option(
        None, "Replace a worker that has lived for this long.", unit="seconds", minimum=1
    )
    limit_max_rss: int | None = option(
        None, "Replace a worker whose resident memory is above this.", unit="bytes", minimum=1
    )
    limit_max_gpu_memory: int | None = option(
        None, "Replace a worker that has more than this on all GPUs together; needs nvidia-ml-py.",
        unit="bytes", minimum=1,
    )
    limit_jitter: float = option(
        0.1, "Part of its limits of age and memory that a worker forgoes, at random up to this, so that "
        "workers do not leave together.", minimum=0, maximum=0.9,
    )


class RollSettings(Frozen):
    """Replacing workers"""

    roll_strategy: str = option(
        "start-first", "Whether the successor is ready before the old worker leaves, or begins after that.",
        choices=("start-first", "stop-first"),
    )
    max_surge: int = option(
        1, "Successors that may be under way at a time in a reload with start-first.", minimum=1
    )
    start_timeout: float | None = option(
        None, "How long a worker may take to be ready, before its stacks are logged and it is ended; the "
        "application may extend it; none: as long as it takes.", unit="seconds", minimum=0.1,
    )


class PoolSettings(Frozen):
    """Processes"""

    workers: int | str = option(
        1, "Worker processes, or 'auto': CPU affinity, cgroup quota, and memory with worker_memory.",
        choices=("auto",), minimum=1, environment=("WEB_CONCURRENCY",),
    )
    worker_memory: int | None = option(
        None, "What one worker needs; 'auto' starts no more than fit into the cgroup's limit or the machine.",
        unit="bytes", minimum=1,
    )
    env_file: str | None = option(
        None, "File of KEY=VALUE lines that are put into the environment before the workers start."
    )
    worker_env: tuple[str, ...] = option(
        (), "NAME=A;B;C in the environment of the workers: A for the first, B for the second, in turns; "
        "repeated.", separators="\n", table=";",
    )
    worker_kind: str = option(
        "process", "What a worker is: a process, or a thread with an event loop in one process for all.",
        choices=("process", "thread"),
    )
    preload: bool = option(
        False, "Import the application once, in a process that the workers are forked from: they share its "
        "memory (Linux)."
    )
    start_method: str = option("fork", "How a worker process begins.", choices=("fork", "spawn"))
    hooks: str | None = option(
        None, "MODULE or MODULE:ATTRIBUTE with functions that the supervisor calls when workers come and go."
    )
    reload_config_only: bool = option(
        False, "SIGHUP reads the configuration and the certificates again, and replaces no worker."
    )


class CrashSettings(Frozen):
    """Workers that crash or hang"""

    restart_limit: int = option(
        10, "Crashed workers within restart_window after which the server gives up with exit code 4.",
        minimum=1,
    )
    restart_window: float = option(60.0, "See restart_limit.", unit="seconds", minimum=0)
    restart_backoff_max: float = option(
        30.0, "Longest wait before a crashed worker is replaced.", unit="seconds", minimum=0
    )
    hang_limit: float | None = option(
        None, "Replace a worker whose loop stands still for longer: stacks to the log, SIGTERM, and after "
        "kill_grace SIGKILL; none: never.", unit="seconds", minimum=2,
    )


class AdminSettings(Frozen):
    """Administration"""

    admin: str | None = option(
        None,
        "HOST:PORT or unix:PATH of /livez, /readyz, /startupz, /metrics and /status; orders over unix only.",
    )
    control_socket: str | None = option(
        "auto",
        "Unix socket that leanserve ctl and top find; auto: PID.sock in $XDG_RUNTIME_DIR/leanserve, else in "
        "/tmp/leanserve-UID.",
    )
    ready_workers: int = option(1, "Ready workers from which /readyz says yes.", minimum=1)
    max_stall: float | None = option(
        None, "How long the loops of all workers may stand still before /livez says no; none: for ever.",
        unit="seconds", minimum=1,
    )
    health_path: str | None = option(
        None, "Path that a worker answers itself, with 200, without the application."
    )
    ready_path: str | None = option(
        None, "Path that a worker answers itself, with 503 while it drains or its application is not ready."
    )


class ReloadSettings(Frozen):
    """Development"""

    reload: bool = option(False, "Start the workers anew when a source file changes.")
    reload_dir: tuple[str, ...] = option((), "Directory to watch; may be repeated; default is here.")
    reload_include: tuple[str, ...] = option(("*.py",), "Glob of file names to watch; may be repeated.")
    reload_exclude: tuple[str, ...] = option((), "Glob of file names not to watch; may be repeated.")
    reload_delay: float = option(0.25, "Quiet time before a reload.", unit="seconds", minimum=0)
    reload_grace: float = option(
        2.0, "How long a worker may take to leave at a reload.", unit="seconds", minimum=0
    )


class LogSettings(Frozen):
    """Logging"""

    log_level: str = option(
        "info", "Level of the leanserve logger.",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
    )
    log_config: str | Mapping[str, Any] | None = option(
        None, "Logging configuration: a .json, .yaml or .ini file (in code: a mapping for dictConfig)."
    )
    log_format: str = option("text", "Form of all lines.", choices=("text", "json"))
    access_log: bool = option(
        True, "One line per request, at its completion, on stdout; none with a log_level above info."
    )
    access_log_format: str | None = option(
        None, "Form of the access lines: text, json, or gunicorn's atoms ('%(h)s %(s)s'); none is that of "
        "log_format.", aliases=("access_logformat",),
    )
    request_id_header: str | None = option(
        "x-request-id", "Request field whose value is logged as the id of the request; none is made."
    )
    use_colors: bool | None = option(None, "Colour the level names; default is when stderr is a terminal.")

    @property
    def access_form(self) -> str:
        """Of the access lines: "text", "json" or a format with atoms."""
        return self.access_log_format or self.log_format

    @property
    def logs_access(self) -> bool:
        """Whether access lines may be written: they are of level info, unless a log_config says otherwise."""
        quiet = self.log_level in ("critical", "error", "warning") and self.log_config is None
        return self.access_log and not quiet


class Settings(Frozen):
    """All groups. Build it with :meth:`build`, from flat names.

    Source of the defaults: docs/reference/settings.md, which is made from this file.
    """

    listen: ListenSettings = field(default_factory=ListenSettings)
    load: LoadSettings = field(default_factory=LoadSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    timeouts: TimeoutSettings = field(default_factory=TimeoutSettings)
    request: RequestSettings = field(default_factory=RequestSettings)
    cancel: CancelSettings = field(default_factory=CancelSettings)
    drain: DrainSettings = field(default_factory=DrainSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    websocket: WebSocketSettings = field(default_factory=WebSocketSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    proxy: ProxySettings = field(default_factory=ProxySettings)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    recycle: RecycleSettings = field(default_factory=RecycleSettings)
    roll: RollSettings = field(default_factory=RollSettings)
    pool: PoolSettings = field(default_factory=PoolSettings)
    crash: CrashSettings = field(default_factory=CrashSettings)
    admin: AdminSettings = field(default_factory=AdminSettings)
    reload: ReloadSettings = field(default_factory=ReloadSettings)
    log: LogSettings = field(default_factory=LogSettings)

    @classmethod
    def build(cls, **flat: Any) -> Settings:
        """Settings from flat names (``workers=4, port=0``); aliases are taken too.

        Raises:
            SettingsError: an unknown name, a value of the wrong type, choice or size, or values that
                cannot stand together.
        """
        return cls().replace(**flat)

    def replace(self, **flat: Any) -> Settings:
        """A copy with some flat names changed. Raises SettingsError as :meth:`build`."""
        per_group: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            found = _BY_NAME.get(name)
            if found is None:
                raise SettingsError(f"unknown setting {name!r}; see docs/reference/settings.md")
            group, item = found
            per_group.setdefault(group, {})[item.name] = check_value(item, value)
        changed = {
            group: dataclasses.replace(getattr(self, group), **values)
            for group, values in per_group.items()
        }
        result = dataclasses.replace(self, **changed)
        _check_together(result)
        return result


def options() -> Iterator[tuple[type[Any], dataclasses.Field[Any], Option]]:
    """Every setting as (group class, field, its Option), in the order of this file."""
    for group in dataclasses.fields(Settings):
        group_class: Any = group.default_factory
        for item in dataclasses.fields(group_class):
            yield group_class, item, item.metadata["option"]


def _by_name() -> dict[str, tuple[str, dataclasses.Field[Any]]]:
    found: dict[str, tuple[str, dataclasses.Field[Any]]] = {}
    for group in dataclasses.fields(Settings):
        group_class: Any = group.default_factory
        for item in dataclasses.fields(group_class):
            for name in (item.name, *item.metadata["option"].aliases):
                assert name not in found, name
                found[name] = (group.name, item)
    return found


_BY_NAME = _by_name()


# RFC 9110 section 5.6.2 (token) and 5.5 (field-value: no control character but HTAB).
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEADER = re.compile(_TOKEN + r":[^\x00-\x08\x0a-\x1f\x7f]*")


# As it stands in a request line: RFC 3986 section 3.3, already percent-encoded.
_PATH = re.compile(r"/[!$%&'()*+,./0-9:;=@A-Z_a-z~-]*")
#: What stands between % and its end in an access log format: letters of gunicorn, names of fields, variables.
ACCESS_ATOM = re.compile(
    r"%(?:%|\(([hlutrmUqHsBbfaTDLMp]|client|method|path|query|version|status|duration_ms|ttfb_ms|request_bytes"
    r"|response_bytes|worker|request_id|traceparent|cause|\{" + _TOKEN + r"\}[ioe])\)s)"
)


def _check_together(settings: Settings) -> None:
    tls = settings.tls
    _check_admission(settings.admission)
    paths = [path for path in (settings.admin.health_path, settings.admin.ready_path) if path is not None]
    for path in paths:
        if not _PATH.fullmatch(path) or paths.count(path) > 1:
            raise SettingsError(f"health_path and ready_path must be two paths such as /health, not {path!r}")
    _check_log(settings.log)
    _check_pool(settings)
    for line in settings.http.header:
        if not _HEADER.fullmatch(line):
            raise SettingsError(f"header must be NAME:VALUE without control characters, not {line!r}")
        if line.partition(":")[0].lower() in ("connection", "content-length", "transfer-encoding", "upgrade"):
            raise SettingsError(f"header {line!r}: framing and connection are decided for each response")
    for rule in settings.cancel.disconnect_policy:
        pattern, _, policy = rule.rpartition("=")
        if not pattern or policy not in ("cancel", "notify", "ignore"):
            raise SettingsError(f"disconnect_policy must be PATTERN=cancel, notify or ignore, not {rule!r}")
    if tls.ssl_certfile is None and tls.ssl_context_factory is None:
        for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_ciphers"):
            if getattr(tls, name) is not None:
                raise SettingsError(f"{name} needs ssl_certfile: without a certificate there is no TLS")
    if tls.ssl_cert_reqs != "none" and tls.ssl_ca_certs is None and tls.ssl_context_factory is None:
        raise SettingsError(
            f"ssl_cert_reqs {tls.ssl_cert_reqs} needs ssl_ca_certs, to check client certificates against"
        )


def _check_pool(settings: Settings) -> None:
    pool = settings.pool
    values = parse_worker_env(pool.worker_env)
    if pool.worker_kind == "thread":
        several = next((name for name, each in values.items() if len(each) > 1), None)
        if several is not None:
            raise SettingsError(f"worker_env {several}: threads have one environment, so write one value")
    if pool.preload and pool.start_method != "fork":
        raise SettingsError("preload needs start_method fork: a spawned worker shares no memory")
    if pool.preload and settings.reload.reload:
        raise SettingsError("preload and reload cannot stand together; reload is for development")


def _check_log(settings: LogSettings) -> None:
    form = settings.access_log_format
    if form is not None and form not in ("text", "json"):
        if not form.isprintable() or not form.isascii():
            raise SettingsError(f"access_log_format must be printable ASCII in one line, not {form!a}")
        if ACCESS_ATOM.search(form) is None:
            raise SettingsError(f"access_log_format must be text, json or have atoms as %(h)s, not {form!r}")
        rest = ACCESS_ATOM.sub("", form)
        if "%" in rest:
            wrong = re.sub(r"(%\(.*?\).?).*", r"\1", rest[rest.index("%") :])
            raise SettingsError(f"access_log_format: {wrong!r} is no atom; docs/howto/logs.md has them all")
    name = settings.request_id_header
    if name is not None and not re.fullmatch(_TOKEN, name):
        raise SettingsError(f"request_id_header must be the name of a header, not {name!r}")


def _check_admission(settings: AdmissionSettings) -> None:
    if settings.max_queue and settings.max_concurrent_requests is None:
        raise SettingsError("max_queue needs max_concurrent_requests: without a limit nobody waits")
    if settings.fair_by is not None:
        if not settings.max_queue:
            raise SettingsError("fair_by needs max_queue: those who wait are served in turns")
        if not re.fullmatch(_TOKEN, settings.fair_by):
            raise SettingsError(f"fair_by must be 'client' or the name of a header, not {settings.fair_by!r}")
    for path in settings.limit_exempt:
        if path and not path.startswith("/"):
            raise SettingsError(f"limit_exempt must be a path that begins with '/', not {path!r}")
