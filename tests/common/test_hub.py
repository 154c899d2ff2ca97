import hashlib

import pytest

from k_diffusion.common import hub


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A file as the hub's cache keeps it: a link to one that is named by its SHA-256."""
    library = pytest.importorskip("huggingface_hub")
    blob = tmp_path / "blobs" / hashlib.sha256(b"weights").hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    monkeypatch.setattr(library, "hf_hub_download", lambda repo, file: str(tmp_path / file))
    return blob


def test_a_file_of_the_hub_has_the_hubs_checksum(stored):
    path = hub.download_file("owner/name", "model.safetensors", "the weights")
    assert path.read_bytes() == b"weights"


def test_a_damaged_file_of_the_hubs_cache_is_kept_aside(stored):
    stored.write_bytes(b"weighed")
    with pytest.raises(hub.HubError, match=r"must have SHA-256 \w{64}, got \w{64}; it is kept as"):
        hub.download_file("owner/name", "model.safetensors", "the weights")
    assert not stored.exists()
    assert stored.with_name(f"{stored.name}.wrong").read_bytes() == b"weighed"


def test_without_a_network_there_are_three_ways(stored, monkeypatch):
    library = pytest.importorskip("huggingface_hub")

    def refuse(repo, file):
        raise library.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(library, "hf_hub_download", refuse)
    with pytest.raises(
        hub.HubError,
        match=r"^can't download the weights from the hub's owner/name: the hub can't be reached; "
        r"connect to the network, or put it into the hub's cache .*, or pass the path of a copy$",
    ):
        hub.download_file("owner/name", "model.safetensors", "the weights")
