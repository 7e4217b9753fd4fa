"""Who is at the other end: TLS 1.3 with certificates on both sides, and a small authority that issues them.

An authority's folder holds `ca.pem`, which both sides trust, and `ca-key.pem`, which neither machine needs. Every
certificate says what it is for, so that a client cannot pose as the server.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from entropi.errors import UserError

CA, CA_KEY, REVOKED = "ca.pem", "ca-key.pem", "revoked.pem"
RESERVED = ("ca", "revoked")  # names that would be those of these files
_CRL = re.compile(r"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@-]{0,62}[A-Za-z0-9])?\Z")  # also of files; common names end at 64


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


@dataclass(frozen=True)
class Revoked:
    """Certificates that are no longer believed although their authority and dates are.

    Attributes:
        serials: issuer and number, from revocation lists.
        fingerprints: SHA-256, hex; or the first 16 digits, as logs have them.
    """

    serials: frozenset[tuple[bytes, int]] = frozenset()
    fingerprints: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: Path, ca: Path) -> Revoked:
        """From a file with X.509 revocation lists (PEM) of authorities in `ca`, fingerprints, or both.

        A list is honoured after the date for its next issue too: what it revokes stays revoked.

        Raises:
            UserError: unreadable, a line that is neither, or a list that no authority in `ca` has signed.
        """
        try:
            text = path.read_text(encoding="ascii")
            authorities = x509.load_pem_x509_certificates(ca.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
        except ValueError:  # bytes that are no ASCII; no PEM
            raise UserError(f"{path} is no list of revoked certificates") from None
        serials: set[tuple[bytes, int]] = set()
        for block in _CRL.findall(text):
            try:
                found = x509.load_pem_x509_crl(block.encode())
                signed = any(
                    authority.subject == found.issuer and _has_signed(authority, found) for authority in authorities
                )
                serials |= {(found.issuer.public_bytes(), entry.serial_number) for entry in found}
            except ValueError:
                raise UserError(f"{path} holds a damaged revocation list") from None
            if not signed:
                raise UserError(f"{path} holds a revocation list that no authority in {ca} has signed")
        fingerprints = set()
        for number, line in enumerate(_CRL.sub(_blank, text).splitlines(), start=1):
            word = line.partition("#")[0].strip().replace(":", "").lower()
            if word and not re.fullmatch("[0-9a-f]{16}|[0-9a-f]{64}", word):
                raise UserError(f"line {number} of {path} is neither a SHA-256 fingerprint nor a revocation list")
            if word:
                fingerprints.add(word)
        return cls(frozenset(serials), frozenset(fingerprints))

    def __contains__(self, peer: Peer) -> bool:
        known = {peer.fingerprint, peer.fingerprint[:16]}
        return (peer.issuer, peer.serial) in self.serials or bool(self.fingerprints & known)

    def __len__(self) -> int:
        return len(self.serials) + len(self.fingerprints)


def _blank(match: re.Match[str]) -> str:
    """As many empty lines, so that the numbers of the others stay."""
    return "\n" * match[0].count("\n")


def _has_signed(authority: x509.Certificate, revoked: x509.CertificateRevocationList) -> bool:
    key = authority.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        return revoked.is_signature_valid(key)
    return False


def revoke(folder: Path, names: Sequence[str], days: int = 365) -> Path:
    """Add certificates in `folder` to its authority's revocation list, which is made if it is not there yet.

    Args:
        names: of servers or clients whose certificates `issue` wrote.
        days: after which a new list is due; ours is honoured longer.

    Returns:
        the list, to be copied to the servers.

    Raises:
        UserError: no such certificate, or no usable authority.
    """
    authority, authority_key = _read_authority(folder)
    path, now = folder / REVOKED, datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.subject)
    builder = builder.last_update(now).next_update(now + datetime.timedelta(days=days))
    entries: dict[int, x509.RevokedCertificate] = {}
    try:
        if path.exists():
            entries = {entry.serial_number: entry for entry in x509.load_pem_x509_crl(path.read_bytes())}
    except ValueError:
        raise UserError(f"{path} is damaged") from None
    for name in names:
        file = folder / f"{_file_name(name)}.pem"
        try:
            serial = x509.load_pem_x509_certificate(file.read_bytes()).serial_number
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        except ValueError:
            raise UserError(f"{file} is no certificate") from None
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        entries.setdefault(serial, entry)
    for entry in entries.values():
        builder = builder.add_revoked_certificate(entry)
    numbered = builder.add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
    fresh = path.with_suffix(".new")
    try:  # a server that reads it meanwhile finds the old list or the new one
        fresh.write_bytes(numbered.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        os.replace(fresh, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


class Watched:
    """Files of the server's side that may change while it runs.

    Attributes:
        context: the TLS side of new connections.
        revoked: what is no longer believed.

    Raises:
        UserError: unusable files, from the constructor alone.
    """

    def __init__(self, tls: Tls, revoked: Path | None) -> None:
        self._tls, self._list = tls, revoked
        self._seen = self._stamps()
        self.context, self.revoked = self._read()

    def _read(self) -> tuple[ssl.SSLContext, Revoked]:
        return self._tls.server_context(), Revoked.read(self._list, self._tls.ca) if self._list else Revoked()

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        stamps: list[tuple[int, int, int] | None] = []
        for path in (self._tls.cert, self._tls.key, self._tls.ca, self._list):
            try:
                status = path.stat() if path is not None else None
            except OSError:
                status = None
            stamps.append((status.st_mtime_ns, status.st_ino, status.st_size) if status is not None else None)
        return stamps

    def has_changed(self) -> bool:
        """Whether any of the files is another than when they were last read."""
        return self._stamps() != self._seen

    def reload(self) -> None:
        """Read all of them again; what was read before stays if one cannot be used.

        Raises:
            UserError: why not.
        """
        self._seen = self._stamps()
        self.context, self.revoked = self._read()


def issue(folder: Path, servers: Sequence[str], clients: Sequence[str], days: int) -> list[Path]:
    """Certificates and keys in `folder`, by its authority, which is made if it is not there yet.

    Args:
        servers: host names or IP addresses under which clients reach a server; one certificate for all of them,
            named after the first.
        clients: names of clients, one certificate each.
        days: for which the certificates are valid.

    Returns:
        the files written; private keys can be read by their owner only.

    Raises:
        UserError: an impossible name, nothing to do, a damaged authority, or a file that exists already.
    """
    problems = [f"{name!r} cannot name a client" for name in clients if not _NAME.match(name) or name in RESERVED]
    problems += [f"{name!r} is no host name or address" for name in servers if not _is_host(name)]
    if not servers and not clients:
        problems.append("neither a server nor a client is named")
    if not 1 <= days <= 3650:
        problems.append(f"{days} days are not between 1 and 3650")
    wanted = [_file_name(name) for name in [*servers[:1], *clients]]
    if len(set(wanted)) < len(wanted):
        problems.append("a name is given twice")
    problems += [f"{folder / (name + '.pem')} exists already" for name in wanted if (folder / f"{name}.pem").exists()]
    if folder.exists() and not folder.is_dir():
        problems.append(f"{folder} is a file, where the authority's folder should be")
    if problems:
        raise UserError("; ".join(problems))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if not (folder / CA).exists():
        written += _make_authority(folder)
    authority, authority_key = _read_authority(folder)
    for name, hosts in [(servers[0], servers)] if servers else []:
        written += _issue_one(folder, name, hosts, ExtendedKeyUsageOID.SERVER_AUTH, authority, authority_key, days)
    for name in clients:
        written += _issue_one(folder, name, [], ExtendedKeyUsageOID.CLIENT_AUTH, authority, authority_key, days)
    return written


def _is_host(name: str) -> bool:
    return _address(name) is not None or bool(_NAME.match(name) and "@" not in name and "_" not in name)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _file_name(name: str) -> str:
    return name.replace(":", "-")  # of IPv6


def _make_authority(folder: Path) -> list[Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject(f"entropi authority {hashlib.sha256(_public(key)).hexdigest()[:8]}")
    certificate = (
        _builder(name, name, key.public_key(), days=3650)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _write(folder / CA_KEY, folder / CA, key, certificate)


def _read_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate((folder / CA).read_bytes())
        key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), None)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    except (ValueError, TypeError):  # TypeError: a password
        raise UserError(f"{folder / CA} and {folder / CA_KEY} are not an authority made by this command") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise UserError(f"{folder / CA_KEY} is not the key of {folder / CA}")
    return certificate, key


def _issue_one(
    folder: Path,
    name: str,
    hosts: Sequence[str],
    purpose: x509.ObjectIdentifier,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> list[Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(_subject(name), authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
    )
    if hosts:
        addresses = [(_address(host), host) for host in hosts]
        names = [x509.IPAddress(address) if address else x509.DNSName(host) for address, host in addresses]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    stem = _file_name(name)
    certificate = builder.sign(authority_key, hashes.SHA256())
    return _write(folder / f"{stem}-key.pem", folder / f"{stem}.pem", key, certificate)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _write(
    key_file: Path, certificate_file: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
) -> list[Path]:
    """The key first, for its owner only from the moment it exists; neither replaces a file."""
    plain = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for path, data, mode in (
        (key_file, plain, 0o600),
        (certificate_file, certificate.public_bytes(serialization.Encoding.PEM), 0o644),
    ):
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
    return [certificate_file, key_file]
