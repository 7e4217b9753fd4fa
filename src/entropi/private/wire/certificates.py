"""Who is at the other end: TLS 1.3 with certificates on both sides, each of which says what it is for."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from entropi.errors import UserError


@dataclass(frozen=True)
class Tls:
    """Files of one side, PEM.

    Attributes:
        cert: this side's certificate, followed by intermediate ones if there are any.
        key: its private key.
        ca: the authorities whose certificates of the other side are accepted, and no others.
    """

    cert: Path
    key: Path
    ca: Path

    def server_context(self) -> ssl.SSLContext:
        """For a server that talks to nobody without a client certificate.

        Raises:
            UserError: a file is missing, is no PEM, or certificate and key do not belong together.
        """
        return self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def client_context(self) -> ssl.SSLContext:
        """For a client that talks only to a server whose certificate bears the name it was asked for.

        Raises:
            UserError: as for `server_context`.
        """
        return self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))  # checks the host's name

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        for path in (self.cert, self.key, self.ca):
            try:
                path.open("rb").close()
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from None

        try:
            context.load_verify_locations(self.ca)
        except ssl.SSLError:
            raise UserError(f"{self.ca} holds no certificate of an authority") from None

        def no_password() -> str:  # nobody is asked in the middle of a service
            raise UserError(f"{self.key} is protected by a password; a key without one is needed")

        try:
            context.load_cert_chain(self.cert, self.key, no_password)
        except ssl.SSLError:
            raise UserError(f"{self.cert} and {self.key} are not a certificate and its private key") from None
        return context


def tls_files(cert: Path | None, key: Path | None, ca: Path | None, ca_option: str) -> Tls | None:
    """The three files if all are given, None if none is.

    Raises:
        UserError: some are given and others not.
    """
    given = {"--tls-cert": cert, "--tls-key": key, ca_option: ca}
    missing = [name for name, path in given.items() if path is None]
    if cert is not None and key is not None and ca is not None:
        return Tls(cert, key, ca)
    if len(missing) < len(given):
        raise UserError(f"TLS needs all of {', '.join(given)}; {' and '.join(missing)} is missing")
    return None


@dataclass(frozen=True)
class Peer:
    """The other side of a connection, as its verified certificate has it.

    Attributes:
        name: common name, safe to log.
        fingerprint: SHA-256 of the certificate, hex.
        issuer: name of the authority, DER.
        serial: number of the certificate, of this issuer.
    """

    name: str
    fingerprint: str
    issuer: bytes
    serial: int

    @classmethod
    def of(cls, transport: Any) -> Peer | None:
        """None without TLS."""
        connection = transport.get_extra_info("ssl_object") if transport is not None else None
        encoded = connection.getpeercert(binary_form=True) if connection is not None else None
        return cls.in_certificate(x509.load_der_x509_certificate(encoded)) if encoded else None

    @classmethod
    def in_certificate(cls, certificate: x509.Certificate) -> Peer:
        """As `of`, for a certificate that somebody has verified."""
        names = [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        name = re.sub(r"[^A-Za-z0-9._@-]", "?", names[0])[:64] if names else "?"
        fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
        return cls(name, fingerprint, certificate.issuer.public_bytes(), certificate.serial_number)

    def __str__(self) -> str:
        return f"{self.name}/{self.fingerprint[:16]}"
