"""TLSConfig: certificates for channels over TCP, as paths, so that it can be sent to the process that uses them."""

from __future__ import annotations

import ssl

from msgspec import Struct

from arun.errors import MisuseError

__all__ = ("TLSConfig",)


class TLSConfig(Struct, frozen=True, kw_only=True):
    """Encrypt a TCP channel, and let clients make sure whom they talk to. The token says who the client is.

    A server needs ``certificate`` and ``key``; a client what it verifies that certificate with. One TLSConfig with all
    of it serves both, as for :meth:`actors.RayCluster.connect`. Only TLS 1.2 and 1.3 are spoken.

    :ivar certificate: path of the server's certificate (PEM), followed by those of intermediate authorities.
    :ivar key: path of its private key (PEM, not encrypted).
    :ivar authority: path of the certificates (PEM) that clients trust; by default those of the system.
    :ivar hostname: the name that the server's certificate must be for; by default the host that the client connects to.
    """

    certificate: str | None = None
    key: str | None = None
    authority: str | None = None
    hostname: str | None = None

    def server_context(self) -> ssl.SSLContext:
        """What a server uses.

        :raises MisuseError: certificate or key are missing, unreadable, or don't belong together.
        """
        if self.certificate is None or self.key is None:
            raise MisuseError("a server needs TLSConfig(certificate=..., key=...), both of them paths")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except (OSError, ValueError) as exc:
            raise MisuseError(
                f"TLSConfig: {self.certificate} and {self.key} are no certificate and key that belong together: {exc}"
            ) from exc
        return context

    def client_context(self) -> ssl.SSLContext:
        """What a client uses.

        :raises MisuseError: the authority is unreadable.
        """
        try:
            return ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.authority)
        except (OSError, ValueError) as exc:
            raise MisuseError(f"TLSConfig: {self.authority} holds no certificates to trust: {exc}") from exc


def _no_password() -> str:
    # Otherwise OpenSSL asks for it on the terminal, and waits.
    raise ValueError("the key is encrypted")
