"""Tokens signed with keys made here, checked against a JWKS in a file and behind a real https address."""

from __future__ import annotations

import hmac
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from serving.errors import InvalidApiKey
from serving.tenancy import jwks
from serving.tenancy.jwks import Jwks, JwksError
from serving.tenancy.tokens import TokenVerifier

ISSUER, AUDIENCE = "https://id.example", "vblora"
RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
PRIVATE: dict[str, Any] = {"RS256": RSA, "ES256": EC, "EdDSA": ED}
SECRET = "s" * 32


def public(algorithm: str, private: Any = None) -> dict[str, Any]:
    """The JWK of a private key; its id is the algorithm's name."""
    maker = jwt.get_algorithm_by_name(algorithm)
    return {**maker.to_jwk((private or PRIVATE[algorithm]).public_key(), as_dict=True), "kid": algorithm}


KEYS = [public(algorithm) for algorithm in PRIVATE]
SYMMETRIC = {"kty": "oct", "alg": "HS256", "kid": "HS256", "k": jwt.utils.base64url_encode(SECRET.encode()).decode()}


def claims(**changes: Any) -> dict[str, Any]:
    """Those of a good token; None leaves one out."""
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "acme", "exp": time.time() + 60}
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def token(algorithm: str = "RS256", key: Any = None, kid: str | None = None, **changes: Any) -> str:
    return jwt.encode(claims(**changes), key or PRIVATE[algorithm], algorithm, headers={"kid": kid or algorithm})


def write(path: Path, *keys: dict[str, Any]) -> str:
    path.write_text(json.dumps({"keys": keys}))
    return str(path)


@pytest.fixture
def verify(tmp_path: Path) -> TokenVerifier:
    return TokenVerifier(Jwks(write(tmp_path / "jwks.json", *KEYS, SYMMETRIC)), ISSUER, AUDIENCE, "sub")


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_a_good_token_names_its_tenant(verify: TokenVerifier, algorithm: str) -> None:
    assert verify(token(algorithm)) == "acme"
    assert verify(token(algorithm, aud=["x", AUDIENCE], exp=time.time() - 1)) == "acme"  # clocks differ a little


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": None},
        {"iss": "https://id.example.org"},
        {"iss": None},
        {"aud": "else"},
        {"aud": None},
        {"sub": None},
    ],
    ids=str,
)
def test_claims_that_do_not_hold(verify: TokenVerifier, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidApiKey):
        verify(token(**changes))


@pytest.mark.parametrize(("claim", "seconds"), [("exp", -60), ("nbf", 86_400)])
def test_times_that_do_not_hold(verify: TokenVerifier, claim: str, seconds: int) -> None:
    with pytest.raises(InvalidApiKey):
        verify(token(**{claim: time.time() + seconds}))


def test_the_claim_may_be_another(tmp_path: Path) -> None:
    keys = Jwks(write(tmp_path / "jwks.json", *KEYS))
    verify = TokenVerifier(keys, ISSUER, AUDIENCE, "tenant")
    assert verify(token(tenant="acme", sub="a person")) == "acme"
    for tenant in (None, 7, ["acme"], {"acme": 1}):
        with pytest.raises(InvalidApiKey):
            verify(token(tenant=tenant))


def forged(header: dict[str, Any], signature: str = "", secret: bytes = b"") -> str:
    """A token of this header, with a signature as given or, with `secret`, by HMAC."""
    parts = (json.dumps(part).encode() for part in (header, claims()))
    signed = ".".join(jwt.utils.base64url_encode(part).decode() for part in parts)
    if secret:
        signature = jwt.utils.base64url_encode(hmac.digest(secret, signed.encode(), "sha256")).decode()
    return f"{signed}.{signature}"


def test_signatures_that_are_none(verify: TokenVerifier) -> None:
    pem = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    others = rsa.generate_private_key(65537, 2048)
    good = token()
    tokens = [
        forged({"alg": "none", "kid": "RS256"}),
        forged({"alg": "none"}),
        forged({"alg": "RS256", "kid": "RS256"}, "AAAA"),
        forged({"alg": "HS256", "kid": "RS256"}, secret=pem),
        forged({"alg": "RS256", "kid": "HS256"}, secret=SECRET.encode()),
        token(key=others),
        token("ES256", kid="RS256"),
        token("RS256", kid="unknown"),
        jwt.encode(claims(), SECRET, "HS256", headers={"kid": "HS256"}),
        jwt.encode(claims(), SECRET, "HS256", headers={"kid": "RS256"}),
        jwt.encode(claims(), RSA, "RS512", headers={"kid": "RS256"}),
        jwt.encode(claims(), RSA, "PS256", headers={"kid": "RS256"}),
        jwt.encode(claims(), RSA, "RS256"),  # which key, of several?
        good[:-4] + "AAAA",
        good.rpartition(".")[0] + ".",
        good + "." + "a" * 2**14,
        "",
        "a.b.c",
        "é.b.c",
    ]
    for wrong in tokens:
        with pytest.raises(InvalidApiKey):
            verify(wrong)
    assert verify(good) == "acme"


def test_a_single_key_needs_no_id(tmp_path: Path) -> None:
    key = public("ES256")
    del key["kid"]
    verify = TokenVerifier(Jwks(write(tmp_path / "jwks.json", key, SYMMETRIC)), ISSUER, AUDIENCE, "sub")
    assert verify(jwt.encode(claims(), EC, "ES256")) == "acme"
    with pytest.raises(InvalidApiKey):
        verify(jwt.encode(claims(), SECRET, "HS256"))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"keys": 1}', '{"keys": []}', '{"keys": [1]}', json.dumps({"keys": [SYMMETRIC]})],
)
def test_a_file_without_usable_keys_is_told_at_start(tmp_path: Path, content: str) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(content)
    with pytest.raises(JwksError):
        Jwks(str(path))


@pytest.mark.parametrize("source", ["/nowhere/jwks.json", "http://127.0.0.1/jwks", "file:///etc/passwd"])
def test_a_source_that_cannot_be_is_told_at_start(source: str) -> None:
    with pytest.raises(JwksError):
        Jwks(source)


def test_keys_are_read_again(tmp_path: Path) -> None:
    clock = [1000.0]
    path = tmp_path / "jwks.json"
    keys = Jwks(write(path, public("RS256")), clock=lambda: clock[0])
    write(path, public("ES256"))
    assert keys.find("ES256") is None  # it was read just now
    clock[0] += jwks.RETRY_SECONDS
    assert keys.find("ES256") and not keys.find("RS256")
    write(path, public("EdDSA"), {**public("RS256"), "use": "enc"}, public("ES256"))
    clock[0] += jwks.FRESH_SECONDS - 1
    assert keys.find("ES256")
    clock[0] += 1
    assert keys.find("ES256") and keys.find("EdDSA") and not keys.find("RS256")
    path.write_text("nonsense")
    clock[0] += jwks.FRESH_SECONDS
    assert keys.find("ES256") and keys.find("EdDSA")


class Issuer:
    """An https server of `reply` (status, headers, body) with a certificate of its own."""

    def __init__(self, folder: Path) -> None:
        self.reply: tuple[int, dict[str, str], bytes] = (200, {}, json.dumps({"keys": KEYS}).encode())
        self.asked = 0
        self.certificate = folder / "certificate.pem"
        _certify(self.certificate)
        self.server = HTTPServer(("127.0.0.1", 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server.server_port}/jwks"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                status, headers, body = issuer.reply
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(OSError):  # of a client that has seen enough
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        return Handler


def _certify(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = builder.add_extension(addresses, critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))


@pytest.fixture
def issuer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Issuer]:
    issuer = Issuer(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(issuer.certificate))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield issuer
    issuer.close()


def test_keys_come_from_an_https_address(issuer: Issuer) -> None:
    assert TokenVerifier(Jwks(issuer.url), ISSUER, AUDIENCE, "sub")(token()) == "acme"
    assert issuer.asked == 1


def test_a_certificate_that_nobody_vouches_for_is_refused(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    assert Jwks(issuer.url).find("RS256") is None
    assert issuer.asked == 0


def test_redirects_are_not_followed_and_sizes_are_capped(issuer: Issuer) -> None:
    """Seen to fail with `follow_redirects=True` in `jwks.py`."""
    good = issuer.reply[2]
    for reply in [
        (302, {"Location": issuer.url + "/other"}, b""),
        (302, {"Location": "http://169.254.169.254/"}, good),
        (500, {}, good),
        (200, {}, good + b" " * jwks.MAX_BYTES),
    ]:
        issuer.reply, issuer.asked = reply, 0
        assert Jwks(issuer.url).find("RS256") is None
        assert issuer.asked == 1


def test_an_issuer_that_is_away_is_asked_again(issuer: Issuer) -> None:
    clock = [1000.0]
    good, issuer.reply = issuer.reply, (503, {}, b"")
    keys = Jwks(issuer.url, clock=lambda: clock[0])
    issuer.reply = good
    assert [keys.find(f"{number}") for number in range(20)] == [None] * 20
    assert issuer.asked == 1  # strangers' tokens do not make us ask more often
    clock[0] += jwks.RETRY_SECONDS
    assert keys.find("RS256")
    issuer.reply = (503, {}, b"")
    clock[0] += jwks.FRESH_SECONDS
    assert keys.find("RS256")
    assert issuer.asked == 3
