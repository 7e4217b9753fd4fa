"""A small authority that issues certificates for both sides, and revokes them.

Its folder holds `ca.pem`, which both sides trust, and `ca-key.pem`, which neither machine needs. Every certificate says
what it is for, so that a client cannot pose as the server.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from entropi.errors import UserError

CA, CA_KEY, REVOKED = "ca.pem", "ca-key.pem", "revoked.pem"
RESERVED = ("ca", "revoked")  # names that would be those of these files
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@-]{0,62}[A-Za-z0-9])?\Z")  # also of files; common names end at 64


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
