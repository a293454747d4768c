"""Signed bundles: what the owner of a key signed, as it was signed, and nothing else."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import cxrgaze
from cxrgaze import files
from cxrgaze.bundles.bundle import MANIFEST, SIGNATURE, Bundle
from cxrgaze.engines import inspect_cli
from cxrgaze.errors import ExitCode, IntegrityError, UsageError
from cxrgaze.export import cli as export_cli
from cxrgaze.runtime import cli as predict_cli

ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")


def _write_pair(folder, name, private=None):
    from cryptography.hazmat.primitives import serialization as s

    private = private or ed25519.Ed25519PrivateKey.generate()
    pem = s.Encoding.PEM
    (folder / f"{name}.pem").write_bytes(
        private.private_bytes(pem, s.PrivateFormat.PKCS8, s.NoEncryption())
    )
    (folder / f"{name}.pub").write_bytes(
        private.public_key().public_bytes(pem, s.PublicFormat.SubjectPublicKeyInfo)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A signed bundle, its key pair `key` and another pair `other`."""
    folder = tmp_path_factory.mktemp("signed")
    for name in ("key", "other"):
        _write_pair(folder, name)
    arguments = ["--precision", "fp16", "--output", str(folder), "--sign", str(folder / "key.pem")]
    assert export_cli.main(arguments) == 0
    return folder


@pytest.fixture
def signed(made, tmp_path):
    return shutil.copytree(made / "demo-fp16.cxrgaze", tmp_path / "demo-fp16.cxrgaze")


def test_a_signed_bundle_is_read(made, signed, tmp_path, films):
    with cxrgaze.load(signed, public_key=made / "key.pub") as reader:
        assert reader.read(np.zeros((64, 64), np.uint8) + np.arange(64, dtype=np.uint8)).label
    film = str(films / "nih_00001507_002_512.png")
    assert predict_cli.main([str(signed), film, "--public-key", str(made / "key.pub")]) == 0
    with cxrgaze.load(signed):
        pass  # who asks for no signature gets none checked


def test_inspect_says_what_it_checked(made, signed, capsys):
    for more, word in ([], "not checked"), (["--verify", str(made / "key.pub")], "valid"):
        assert inspect_cli.main([str(signed), "--json", *more]) == 0
        assert word in json.loads(capsys.readouterr().out)["bundle"]["signature"]
    other = ["--verify", str(made / "other.pub")]
    assert inspect_cli.main([str(signed), *other]) == ExitCode.INTEGRITY
    assert inspect_cli.main(["--device", *other]) == ExitCode.USAGE


def _rewritten(path):
    """As an attacker would: another temperature, with a new digest."""
    manifest = Bundle.open(path).manifest
    decision = manifest.decision.model_copy(update={"temperature": 9.0})
    (path / MANIFEST).write_bytes(manifest.model_copy(update={"decision": decision}).rendered())


ATTACKS = {
    "a manifest with a new digest": _rewritten,
    "a signature changed": lambda p: (p / SIGNATURE).write_bytes(bytes(64)),
    "a signature cut short": lambda p: (p / SIGNATURE).write_bytes(
        (p / SIGNATURE).read_bytes()[:-1]
    ),
    "a signature too long": lambda p: (p / SIGNATURE).write_bytes(bytes(65)),
    "no signature": lambda p: (p / SIGNATURE).unlink(),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_altered_bundle_is_refused(made, signed, name):
    ATTACKS[name](signed)
    with pytest.raises(IntegrityError):
        cxrgaze.load(signed, public_key=made / "key.pub")


def test_the_attack_on_the_digest_passes_without_a_key(signed):
    """What a signature is for."""
    _rewritten(signed)
    with cxrgaze.load(signed) as reader:
        assert reader.bundle.manifest.decision.temperature == 9.0


def test_a_bundle_signed_by_somebody_else_is_refused(made, signed):
    with pytest.raises(IntegrityError, match="by the owner of"):
        cxrgaze.load(signed, public_key=made / "other.pub")


def test_a_signature_behind_a_link_is_refused(made, signed, tmp_path):
    (signed / SIGNATURE).rename(tmp_path / "sig")
    (signed / SIGNATURE).symlink_to(tmp_path / "sig")
    with pytest.raises(IntegrityError, match="is a link"):
        cxrgaze.load(signed, public_key=made / "key.pub")


def test_a_wrong_key_is_a_usage_error_and_leaves_nothing(made, tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ec

    _write_pair(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "text.pem").write_text("no key")
    wrong = [tmp_path / "curve.pem", tmp_path / "text.pem", tmp_path / "none.pem", made / "key.pub"]
    for key in wrong:
        arguments = ["--output", str(tmp_path / "out"), "--sign", str(key)]
        assert export_cli.main(arguments) == ExitCode.USAGE
    assert not (tmp_path / "out").exists()
    for key in (tmp_path / "curve.pub", tmp_path / "text.pem", made / "key.pem"):
        with pytest.raises(UsageError):
            cxrgaze.load(made / "demo-fp16.cxrgaze", public_key=key)


def test_openssls_own_keys_serve(made, tmp_path):
    """The commands of the help text, where openssl is."""
    import subprocess

    if not shutil.which("openssl"):
        pytest.skip("openssl is not here")
    key, public = str(tmp_path / "key.pem"), str(tmp_path / "public.pem")
    for command in (
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", key],
        ["openssl", "pkey", "-in", key, "-pubout", "-out", public],
    ):
        subprocess.run(command, check=True, capture_output=True)
    assert export_cli.main(["--output", str(tmp_path), "--sign", key]) == 0
    bundle = tmp_path / "demo-fp32.cxrgaze"
    assert inspect_cli.main([str(bundle), "--verify", public]) == 0
    (tmp_path / "m").write_bytes((bundle / MANIFEST).read_bytes())
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"]
    check += ["-in", str(tmp_path / "m"), "-sigfile", str(bundle / SIGNATURE)]
    assert subprocess.run(check, capture_output=True).returncode == 0
    assert len(files.read_regular(bundle / SIGNATURE, 64)) == 64
