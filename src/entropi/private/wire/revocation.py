"""Certificates that are no longer believed, and the files of a server's side that may change while it runs."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from entropi.errors import UserError
from entropi.private.wire.certificates import Peer, Tls

_CRL = re.compile(r"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)


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
