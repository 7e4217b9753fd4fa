"""`entropi certificates`: an authority of one's own, and what it certifies."""

from __future__ import annotations

from pathlib import Path

from entropi.commands.common import Command, Words, extra


def run(folder: Path, server: list[str], client: list[str], revoke: list[str], days: int = 365) -> None:
    """Make an authority in FOLDER, or use the one there, and let it certify servers and clients for TLS.

    Args:
        folder: of the authority; ca-key.pem in it can certify anybody, so it belongs on neither machine
        server: host names and addresses under which clients reach one server
        client: names of clients, one certificate each
        revoke: names whose certificates in FOLDER are added to its revocation list, revoked.pem, for `serve --revoked`
        days: for which the certificates are valid
    """
    with extra("private"):
        from entropi.private.wire import authority

    if server or client or not revoke:
        for path in authority.issue(folder, server, client, days):
            print(path)
    if revoke:
        print(authority.revoke(folder, revoke))


_NAMES = Words("NAME", default=[])
COMMAND = Command(run, place=12, words={"server": _NAMES, "client": _NAMES, "revoke": _NAMES})
