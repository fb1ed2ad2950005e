"""TLS: the context from the settings, and what the ``tls`` extension of ASGI says of a connection."""

from __future__ import annotations

import importlib
import ssl
from typing import Any

from leanserve.errors import SettingsError
from leanserve.settings import TlsSettings

__all__ = ["build_context", "describe_tls", "hand_over"]

_CERT_REQS = {
    "none": ssl.CERT_NONE, "0": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL, "1": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED, "2": ssl.CERT_REQUIRED,
}  # fmt: skip
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def build_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """The server's SSL context, or None for plain listeners.

    Raises:
        SettingsError: a file that is missing, unreadable, no certificate, or does not fit its key.
    """
    if settings.ssl_context_factory is not None:
        return _call_factory(settings.ssl_context_factory)
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise SettingsError("ssl_keyfile is given without ssl_certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[settings.ssl_min_version]
    context.verify_mode = _CERT_REQS[settings.ssl_cert_reqs]
    # OpenSSL would send two with each TLS 1.3 handshake, and each takes a fifteenth of its time. A client may
    # use one once (RFC 8446, appendix C.4), and gets another with the connection that it uses it for.
    context.num_tickets = 1
    # RFC 7301: we speak one protocol. Python's ssl cannot refuse a client that offers only others, as section
    # 3.2 wants it: its handshake succeeds without a protocol, and it finds HTTP/1.1.
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, settings)
    if settings.ssl_ca_certs is not None:
        _load_ca(context, settings.ssl_ca_certs)
    elif context.verify_mode is not ssl.CERT_NONE:
        raise SettingsError(
            "ssl_cert_reqs asks for client certificates: give ssl_ca_certs to check them against"
        )
    if settings.ssl_ciphers is not None:
        try:
            context.set_ciphers(settings.ssl_ciphers)
        except ssl.SSLError as error:
            # This one error of the ssl module has no attribute "reason".
            raise SettingsError(f"ssl_ciphers {settings.ssl_ciphers!r}: no such cipher") from error
    return context


def hand_over(listening: ssl.SSLContext, newest: ssl.SSLContext) -> None:
    """Let handshakes that begin on one context go on with the certificate and the authorities of another.

    The loop keeps the context that it listens with. To load another pair into that one would leave the old
    one beside it when the keys are of different kinds, and many clients would be shown it. What belongs to
    the handshake itself (versions, whether clients are asked for a certificate) stays that of `listening`.
    """
    own = newest.sni_callback  # of a factory's: it goes on choosing

    def choose(ssl_object: Any, name: Any, _context: ssl.SSLContext) -> int | None:
        # Called for clients that name nobody, too: OpenSSL asks at every ClientHello.
        ssl_object.context = newest
        return None if own is None else own(ssl_object, name, newest)

    listening.sni_callback = choose


def _load_certificate(context: ssl.SSLContext, settings: TlsSettings) -> None:
    assert settings.ssl_certfile is not None
    asked = False

    def password() -> str:
        # An empty password, not a prompt: a server that asks its terminal for one hangs where there is none.
        nonlocal asked
        asked = True
        return settings.ssl_keyfile_password or ""

    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password)
    except ValueError as error:
        raise SettingsError(f"ssl_keyfile_password: {error}") from error
    except ssl.SSLError as error:
        names = settings.ssl_certfile
        if settings.ssl_keyfile:
            names += f" with {settings.ssl_keyfile}"
        hint = error.reason or "not PEM, or the key does not fit"
        if settings.ssl_keyfile is None and not asked and not error.reason:
            hint = "not PEM, or no private key in it: give ssl_keyfile"
        if asked and error.reason != "KEY_VALUES_MISMATCH":
            hint = "wrong ssl_keyfile_password, or none given"
        raise SettingsError(f"cannot use certificate {names}: {hint}") from error
    except OSError as error:
        for name in filter(None, (settings.ssl_certfile, settings.ssl_keyfile)):
            _check_readable(name)  # OpenSSL does not say which of the two it was
        raise SettingsError(f"cannot read certificate or key: {error.strerror}") from error


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error


def _load_ca(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise SettingsError(f"ssl_ca_certs {path}: {error.reason or 'no certificate in it'}") from error
    except OSError as error:
        raise SettingsError(f"cannot read ssl_ca_certs {path}: {error.strerror}") from error


def _call_factory(factory: Any) -> ssl.SSLContext:
    if isinstance(factory, str):
        module, _, attribute = factory.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise SettingsError(f"ssl_context_factory {module}:{attribute}: {error}") from error
    if not callable(factory):
        raise SettingsError(f"ssl_context_factory is {type(factory).__name__}, not a function")
    try:
        context = factory()
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError) as error:
        raise SettingsError(f"ssl_context_factory failed: {error!r}") from error
    if not isinstance(context, ssl.SSLContext):
        raise SettingsError(f"ssl_context_factory returned {type(context).__name__}, not an ssl.SSLContext")
    return context


def describe_tls(ssl_object: ssl.SSLObject | ssl.SSLSocket, server_cert: str | None) -> dict[str, Any]:
    """The ``tls`` extension (ASGI TLS spec 0.2), built once per connection.

    Args:
        ssl_object: of the finished handshake.
        server_cert: our own certificate as PEM, or None.
    """
    der = ssl_object.getpeercert(binary_form=True)
    # The name as RFC 4514 text would need a DER parser of our own; the certificate itself is in the chain.
    chain = [ssl.DER_cert_to_PEM_cert(der)] if der else []
    get_chain = getattr(ssl_object, "get_verified_chain", None)  # public since Python 3.13
    if der and get_chain is not None:
        chain = [ssl.DER_cert_to_PEM_cert(link) for link in get_chain()]
    cipher = ssl_object.cipher()
    return {
        "server_cert": server_cert,
        "client_cert_chain": chain,
        "client_cert_name": _subject(ssl_object.getpeercert()),
        "client_cert_error": None,
        "tls_version": _TLS_NUMBERS.get(ssl_object.version() or ""),
        "cipher_suite": _cipher_number(ssl_object, cipher[0]) if cipher else None,
    }


_TLS_NUMBERS = {"TLSv1": 0x0301, "TLSv1.1": 0x0302, "TLSv1.2": 0x0303, "TLSv1.3": 0x0304}

# RFC 4514 section 3: attribute types that have a short name.
_SHORT = {
    "commonName": "CN", "localityName": "L", "stateOrProvinceName": "ST", "organizationName": "O",
    "organizationalUnitName": "OU", "countryName": "C", "streetAddress": "STREET", "domainComponent": "DC",
    "userId": "UID",
}  # fmt: skip


def _subject(certificate: dict[str, Any] | None) -> str | None:
    """RFC 4514 text of the subject: last part first, specials escaped."""
    if not certificate:
        return None
    parts = []
    for rdn in reversed(certificate.get("subject", ())):
        parts.append("+".join(f"{_SHORT.get(name, name)}={_escape(value)}" for name, value in rdn))
    return ",".join(parts)


def _escape(value: str) -> str:
    escaped = "".join(f"\\{c}" if c in '",;<>\\+' else c for c in value)
    if escaped[:1] in ("#", " "):
        escaped = "\\" + escaped
    if escaped.endswith(" ") and len(escaped) > 1:
        escaped = escaped[:-1] + "\\ "
    return escaped


def _cipher_number(ssl_object: Any, name: str) -> int | None:
    """IANA number of the cipher suite: the low 16 bits of OpenSSL's id."""
    number = _cipher_numbers.get(name)
    if number is None:
        for cipher in ssl_object.context.get_ciphers():
            if cipher["name"] == name:
                number = _cipher_numbers[name] = int(cipher["id"]) & 0xFFFF
    return number


# A name has one number, and listing the ciphers takes a tenth of the time that a handshake takes.
_cipher_numbers: dict[str, int] = {}
