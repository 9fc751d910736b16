"""Ray's connections encrypted: a local cluster with certificates, those who have them and those who don't."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.clusters import ROOT, started

pytestmark = [pytest.mark.slow, pytest.mark.ray]

TASK = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
print("answer", ray.get(ray.remote(lambda x: x + 1).remote(41), timeout=120))
"""


def make_certificates(folder: Path) -> dict[str, str]:
    """An authority and a node's certificate by it, as files; the variables by which Ray takes them."""
    authority, node = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "unimrg test")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node")])
    now = datetime.datetime.now(datetime.UTC)
    until = now + datetime.timedelta(days=1)

    def certificate(
        name: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
        )
        builder = (
            builder.serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(until)
        )
        return builder.add_extension(extension, critical=True).sign(authority, hashes.SHA256())

    addresses = ["127.0.0.1", ray.util.get_node_ip_address()]  # Ray prefers the latter
    names = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    signed = {
        "ca.crt": certificate(issuer, authority, x509.BasicConstraints(ca=True, path_length=0)),
        "tls.crt": certificate(subject, node, x509.SubjectAlternativeName(names)),
    }
    for name, made in signed.items():
        (folder / name).write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key = node.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "tls.key").write_bytes(key)
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / "tls.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "tls.key"),
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
    }


def drive(address: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A driver from outside that runs one task."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", TASK, address],
        cwd=ROOT,
        env=inherited | environment | {"RAY_gcs_server_port_wait_time_s": "1"},  # a try, of half a minute
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_only_those_with_certificates_get_in(tmp_path: Path) -> None:
    tls = make_certificates(tmp_path)
    with started(tmp_path, nodes=2, environment=tls) as state:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": state.token_file}
        host, port = state.gcs.split(":")
        context = ssl.create_default_context(cafile=tls["RAY_TLS_CA_CERT"])
        context.load_cert_chain(tls["RAY_TLS_SERVER_CERT"], tls["RAY_TLS_SERVER_KEY"])
        with (
            socket.create_connection((host, int(port))) as plain,
            context.wrap_socket(plain, server_hostname=host) as encrypted,
        ):
            assert encrypted.version() == "TLSv1.3"
        inside = drive(state.gcs, token | tls)
        assert "answer 42" in inside.stdout, inside.stderr[-3000:]
        outside = drive(state.gcs, token)  # the token alone isn't enough
        assert outside.returncode != 0 and "answer" not in outside.stdout
        forged = tmp_path / "forged"
        forged.mkdir()
        stranger = drive(state.gcs, token | make_certificates(forged))
        assert stranger.returncode != 0 and "answer" not in stranger.stdout
