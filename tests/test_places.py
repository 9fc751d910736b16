"""Weights may lie anywhere: on this machine, in object storage, on the hub; what is fetched is kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub import REVISIONS, Hub, run_hub
from tests.s3 import S3Server, free_port
from unimrg.config import FamilyConfig
from unimrg.errors import CheckpointError, ConfigError, StorageError
from unimrg.families import load_family
from unimrg.storage import S3Config, Store
from unimrg.weights import PLACES, HubPlace, absolute, check_reachable, localized

NO_S3 = S3Config()
BOTH = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "README.md": b"words",
    "model.safetensors": b"tensors",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"graph",
}
PICKLE = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "run.py": b"code"}
PARTS = {"transformer/config.json": b"{}", "transformer/a.safetensors": b"1", "text/b.safetensors": b"2"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with run_hub() as server:
        server.add("org/both", BOTH)
        server.add("org/both", {"config.json": b"{}", "old.safetensors": b"old"}, "old")
        server.add("org/pickle", PICKLE)
        server.add("org/parts", PARTS)
        use_endpoint(monkeypatch, server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """What HF_ENDPOINT does when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def fetched(place: str, key: str = "weights", s3: S3Config = NO_S3, only_descriptions: bool = False) -> Path:
    with localized(FamilyConfig(**{key: place}), s3, only_descriptions) as local:
        return Path(getattr(local, key))


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("org/name", HubPlace("org/name")),
        ("Qwen/Qwen2.5-0.5B", HubPlace("Qwen/Qwen2.5-0.5B")),
        ("org/name@v1.0", HubPlace("org/name", "", "v1.0")),
        ("hf://org/name", HubPlace("org/name")),
        ("hf://org/name/", HubPlace("org/name")),
        ("hf://org/name/a.pth", HubPlace("org/name", "a.pth")),
        ("hf://org/name/sub/a_b.pth@refs/pr/1", HubPlace("org/name", "sub/a_b.pth", "refs/pr/1")),
        ("hf://org/name/transformer", HubPlace("org/name", "transformer")),
        *((text, None) for text in ("", "name", "./a/b", "a/b/c", "/a/b", "s3://a/b", "../a", "a/..", "~/a")),
    ],
)
def test_places_on_the_hub(text: str, place: HubPlace | None) -> None:
    assert HubPlace.parse(text) == place
    if place:
        assert HubPlace.parse(str(place)) == place and absolute(text, NO_S3) == text


@pytest.mark.parametrize(
    "text", ["hf://", "hf://org", "hf://org/name/../x", "hf://org/name@", "hf:///org/name"]
)
def test_what_is_no_place_on_the_hub(text: str) -> None:
    with pytest.raises(ConfigError, match="is no place on the hub"):
        HubPlace.parse(text)


def test_a_path_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert HubPlace.parse("org/name") is None and HubPlace.parse("hf://org/name")
    assert absolute("org/name", NO_S3) == str(tmp_path / "org" / "name")
    assert fetched("org/name") == tmp_path / "org" / "name"


def test_the_model_of_the_package_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = FamilyConfig(weights="shipped:harmon")
    assert absolute(config.weights, NO_S3) == config.weights  # each node has a package of its own
    check_reachable(config, NO_S3)
    with localized(config, NO_S3) as local:
        model, tokenizer = load_family("harmon").build(local, 0)
    assert sum(p.numel() for p in model.parameters()) < 3e6 and len(tokenizer) > 500
    with pytest.raises(ConfigError, match=r"'shipped:other' doesn't come with .*; there is shipped:"):
        check_reachable(replace(config, weights="shipped:other"), NO_S3)
    wrong = replace(config, name="showo")
    with pytest.raises(CheckpointError, match="is a model of harmon; choose"), localized(wrong, NO_S3):
        pass


def test_every_knob_is_a_place(tmp_path: Path) -> None:
    config = FamilyConfig(**dict.fromkeys(PLACES, str(tmp_path)), freeze=["llm"])
    with localized(config, NO_S3) as local:
        assert local == config and local is not config
    for key in PLACES:
        wrong = FamilyConfig(**{key: "/no/such"})
        with pytest.raises(CheckpointError, match=f"family.{key}: /no/such does not exist"):
            check_reachable(wrong, NO_S3)
        with pytest.raises(CheckpointError, match=f"^{key}: /no/such"), localized(wrong, NO_S3, section=""):
            pass


# -- the hub -------------------------------------------------------------------------------------------------


def test_what_is_fetched_from_the_hub(hub: Hub) -> None:
    described = {"config.json", "tokenizer.json"}
    assert names(fetched("org/both", "tokenizer")) == described
    assert names(fetched("org/both", only_descriptions=True)) == described
    assert set(hub.fetched) == {"org/both/config.json", "org/both/tokenizer.json"}
    folder = fetched("org/both")
    assert names(folder) == {*described, "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == b"tensors"
    assert fetched("hf://org/both") == fetched("org/both@main") == folder
    assert names(fetched("org/pickle")) == {"config.json", "pytorch_model.bin"}
    assert names(fetched("hf://org/parts/transformer", "diffusion_weights")) == {
        "config.json",
        "a.safetensors",
    }
    assert fetched("hf://org/both/pytorch_model.bin").read_bytes() == b"pickle"
    assert names(fetched("org/both@old")) == {"config.json", "old.safetensors"}
    assert names(fetched(f"org/both@{REVISIONS['old']}")) == {"config.json", "old.safetensors"}
    assert fetched("hf://org/parts/text/b.safetensors", only_descriptions=True).exists() is False
    assert set(hub.fetched.values()) == {1}


def test_looking_at_the_hub_fetches_nothing(hub: Hub) -> None:
    for place in (
        "org/both",
        "org/both@old",
        "hf://org/both/model.safetensors",
        "hf://org/parts/transformer",
    ):
        check_reachable(FamilyConfig(vision_weights=place), NO_S3)
    assert not hub.fetched


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("org/none", "RepositoryNotFound"),
        ("org/both@v9", "RevisionNotFound"),
        ("hf://org/both/no.pth", "hf://org/both/no.pth does not exist; the repository holds config.json"),
        ("hf://org/parts/vae", "hf://org/parts/vae does not exist; the repository holds transformer/"),
    ],
)
def test_what_the_hub_doesn_t_have(hub: Hub, place: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as refused:
        check_reachable(FamilyConfig(vae_weights=place), NO_S3)
    assert str(refused.value).startswith("family.vae_weights: hf://org/") and "\n" not in str(refused.value)
    with pytest.raises(CheckpointError, match=r"family\.vae_weights: hf://org/"):
        fetched(place, "vae_weights")


def test_without_the_hub_what_was_fetched_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched("org/both")
    fetched("hf://org/parts/transformer/a.safetensors")
    use_endpoint(monkeypatch, f"http://127.0.0.1:{free_port()}")
    for place in ("org/both", "hf://org/parts/transformer/a.safetensors"):
        check_reachable(FamilyConfig(weights=place), NO_S3)
        assert fetched(place).exists()
    for place in ("org/pickle", "org/both@old", "hf://org/parts/text/b.safetensors"):
        for act in (lambda text: check_reachable(FamilyConfig(weights=text), NO_S3), fetched):
            with pytest.raises(CheckpointError, match=r"the hub doesn't give it .* give a local folder"):
                act(place)


TOGETHER = """
import sys
from unimrg.config import FamilyConfig
from unimrg.storage import S3Config
from unimrg.weights import localized
config = FamilyConfig(weights=sys.argv[1], vae_weights=sys.argv[2], tokenizer=sys.argv[1])
sys.stdin.readline()
with localized(config, S3Config()) as local:
    print(local.weights, local.vae_weights)
"""


def test_processes_of_a_machine_fetch_once(hub: Hub, s3_server: S3Server, tmp_path: Path) -> None:
    """Three processes begin at the same moment; what they are given is whole, and was sent once."""
    store = store_of(s3_server, "together")
    store.write_bytes("vae.safetensors", b"v" * (1 << 20))
    hub.add("org/large", {"config.json": b"{}", "model.safetensors": b"x" * (4 << 20)})
    environment = s3_server.env | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "UNIMRG_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin",
    }
    words = [sys.executable, "-c", TOGETHER, "org/large", f"{store.url}/vae.safetensors"]
    processes = [
        subprocess.Popen(
            words,
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, said
    assert len({out for out, _ in said}) == 1
    weights, vae = (Path(word) for word in said[0][0].split())
    assert (weights / "model.safetensors").stat().st_size == 4 << 20 and vae.stat().st_size == 1 << 20
    assert hub.fetched == {"org/large/config.json": 1, "org/large/model.safetensors": 1}
    left = sorted(path.name for path in (tmp_path / "cache" / "weights").iterdir())
    assert left == [vae.parent.name, f"{vae.parent.name}.lock"]


# -- object storage ------------------------------------------------------------------------------------------


def store_of(server: S3Server, prefix: str) -> Store:
    return Store.at(server.url(prefix), s3_of(server))


def s3_of(server: S3Server) -> S3Config:
    return S3Config(server.endpoint, server.region, server.access_key, server.secret_key)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("UNIMRG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def test_folders_and_files_of_object_storage(s3_server: S3Server, cache: Path) -> None:
    store, s3 = store_of(s3_server, "places"), s3_of(s3_server)
    for name, content in (("config.json", b"{}"), ("model.safetensors", b"1"), ("deep/a.bin", b"22")):
        store.write_bytes(f"model/{name}", content)
    url = f"{store.url}/model"
    check_reachable(FamilyConfig(weights=url, tokenizer=f"{url}/config.json"), s3)
    assert not cache.exists()
    assert names(fetched(url, s3=s3, only_descriptions=True)) == {"config.json"}
    folder = fetched(url, s3=s3)
    assert folder.name == "model" and names(folder) == {"config.json", "model.safetensors", "deep/a.bin"}
    assert fetched(f"{url}/deep/a.bin", s3=s3).read_bytes() == b"22"
    assert absolute(f"{url}/", s3) == url
    # Kept: not one byte is read again, until the objects change.
    (folder / "model.safetensors").write_bytes(b"touched")
    assert fetched(url, s3=s3) == folder and (folder / "model.safetensors").read_bytes() == b"touched"
    store.write_bytes("model/model.safetensors", b"333")
    assert (fetched(url, s3=s3) / "model.safetensors").read_bytes() == b"333"


def test_a_torn_fetch_is_done_again(
    s3_server: S3Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, s3 = store_of(s3_server, "torn"), s3_of(s3_server)
    store.write_bytes("a.safetensors", b"1")
    store.write_bytes("b.safetensors", b"2")
    download = Store.download

    def torn(self: Store, path: str, local_folder: Path) -> None:
        if path == "b.safetensors":
            raise StorageError("cut short")
        download(self, path, local_folder)

    monkeypatch.setattr(Store, "download", torn)
    with pytest.raises(StorageError, match="cut short"):
        fetched(store.url, s3=s3)
    monkeypatch.setattr(Store, "download", download)
    assert names(fetched(store.url, s3=s3)) == {"a.safetensors", "b.safetensors"}
    assert not list(cache.glob("*.part"))


def test_what_object_storage_doesn_t_have(s3_server: S3Server, cache: Path) -> None:
    wrong = FamilyConfig(weights=s3_server.url("no/such"))
    with pytest.raises(StorageError, match="there is nothing at"):
        check_reachable(wrong, s3_of(s3_server))
    with pytest.raises(StorageError, match="there is nothing at"), localized(wrong, s3_of(s3_server)):
        pass
