"""Pickles become safetensors in a child that may do little else; hostile ones become our error and nothing happens."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import allaprima as ap
from allaprima.errors import CheckpointError, ConfigError
from allaprima.weights import unpickling
from allaprima.weights.conversion import CHILD, convert
from allaprima.weights.unpickling import Refused, check_archive, leftovers, read, separate, tensors_of
from tests.tiny import tiny_bert_pipeline


class Attack:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def refusal(source: Path, memory_bytes: int = 1 << 30) -> str:
    """What the child's own steps say of a file, without a child."""
    try:
        check_archive(source)
        tensors_of(read(source), memory_bytes)
    except (Refused, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        return repr(error)
    raise AssertionError("it was read")


# ---- what is converted


def test_a_checkpoint_of_a_trainer(tmp_path: Path) -> None:
    """In one go: all dtypes, a shared tensor, a view, numbers beside the weights, an object of the trainer's."""
    shared = torch.randn(64, 3)
    state = {
        "whole": torch.randn(5, 7),
        "half": torch.randn(9).half(),
        "brain": torch.randn(2, 2, 2).bfloat16(),
        "number": torch.tensor(3),
        "table": torch.arange(77)[None],
        "one": shared,
        "two": shared,
        "view": shared[10:20, 1:],
        "turned": shared.T,
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state, "global_step": 470000, "epoch": 2, "callbacks": {Callback: 1}}, path)
    seen = []
    (found,) = convert(path, progress=lambda *at: seen.append(at))
    assert found.path == tmp_path / "model.safetensors"
    loaded = load_file(found.path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], state[k]) and loaded[k].dtype == state[k].dtype for k in state)
    with safe_open(found.path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "global_step": "470000", "epoch": "2"}
    assert (found.tensors, found.skipped) == (10, ("callbacks",))
    assert seen[-1] == (found.path, path.stat().st_size, path.stat().st_size)
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["model.ckpt", "model.safetensors"]
    with pytest.raises(CheckpointError, match="there already"):
        convert(path)


class Callback: ...


Callback.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.fixture(autouse=True)
def trainers_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the trainer's library were there while the file is written."""
    import types

    module = types.ModuleType(Callback.__module__)
    module.Callback = Callback  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, Callback.__module__, module)


def pickled(folder: Path) -> None:
    """As Taiyi was published: every part a pickle."""
    for file in folder.glob("*/*.safetensors"):
        name = "pytorch_model.bin" if file.name == "model.safetensors" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_folder_of_pickles_draws_afterwards(tmp_path: Path, elsewhere: bool) -> None:
    pipe = tiny_bert_pipeline()
    pipe.save_pretrained(tmp_path / "taiyi")
    pickled(tmp_path / "taiyi")
    with pytest.raises(CheckpointError, match="allaprima models convert"):
        ap.load(tmp_path / "taiyi")
    target = tmp_path / "new" if elsewhere else tmp_path / "taiyi"
    before = sorted((tmp_path / "taiyi").rglob("*"))
    assert len(convert(tmp_path / "taiyi", target if elsewhere else None)) == 3
    loaded = ap.load(target, dtype="float32", device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(loaded, part).state_dict(), getattr(pipe, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if elsewhere:
        assert sorted((tmp_path / "taiyi").rglob("*")) == before
        assert not list(target.rglob("*.bin"))
    else:
        with pytest.raises(CheckpointError, match="no pickled weights"):
            convert(tmp_path / "taiyi")


def test_shards_keep_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from allaprima.weights import conversion

    part = tmp_path / "model" / "text_encoder"
    part.mkdir(parents=True)
    for number in (1, 2):
        torch.save({f"w{number}": torch.zeros(1)}, part / f"pytorch_model-0000{number}-of-00002.bin")
    table = {f"w{number}": f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)}
    (part / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    monkeypatch.setattr(conversion, "_convert", lambda source, target, *rest: target)
    convert(tmp_path / "model")
    written = json.loads((part / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == {f"w{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}


def test_what_is_asked_for_wrongly(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    for path, said in ((tmp_path / "gone.ckpt", "no file"), (tmp_path / "x.txt", "no pickle by its name")):
        with pytest.raises(CheckpointError, match=said):
            convert(path)
    with pytest.raises(ConfigError):
        convert(tmp_path / "x.txt", seconds=0)


# ---- what is refused


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "alone"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, zipped: bool, inside: bool) -> None:
    path, mark = tmp_path / "evil.ckpt", tmp_path / "ran"
    evil = {"state_dict": {"a": torch.zeros(1), "b": Attack(mark)}} if inside else Attack(mark)
    torch.save(evil, path, _use_new_zipfile_serialization=zipped)
    assert "system" in refusal(path) or "Unsupported" in refusal(path)
    assert not mark.exists()
    path.write_bytes(pickle.dumps(Attack(mark), protocol=2))
    refusal(path)
    assert not mark.exists()


def test_the_child_refuses_what_its_steps_refuse(tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.ckpt", tmp_path / "ran"
    torch.save({"state_dict": {"a": Attack(mark)}}, path)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt is not converted: it names .*system"):
        convert(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["evil.ckpt"]


def test_a_compressed_archive_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * (8 << 20))
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    assert path.stat().st_size < 100_000
    assert "compressed" in refusal(path)


def test_an_archive_of_many_files_or_of_a_huge_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "many.ckpt"
    torch.save({"a": torch.zeros(1)}, path)
    monkeypatch.setattr(unpickling, "MAX_ENTRIES", 1)
    assert "files; allowed" in refusal(path)
    monkeypatch.undo()
    monkeypatch.setattr(unpickling, "MAX_PICKLE_BYTES", 1)
    assert "table of contents" in refusal(path)


def test_tensors_larger_than_their_file(tmp_path: Path) -> None:
    path = tmp_path / "huge.ckpt"
    torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)
    assert "claim 4398046511104 bytes" in refusal(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": torch.zeros(4).to_sparse()}, "sparse"),
        ({"a": torch.zeros(4, device="meta")}, "without memory"),
        ({"lr": 0.1}, "no weights"),
        ([1, 2], "holds a list"),
        ({"state_dict": {}}, "no weights"),
    ],
)
def test_what_is_no_table_of_weights(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    assert said in refusal(tmp_path / "x.ckpt")


def test_a_truncated_or_random_file(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.randn(100)}, path)
    raw = path.read_bytes()
    for content in (b"", raw[: len(raw) // 2], b"\x80\x02}q\x00.", os.urandom(1000), b"<html>404</html>"):
        path.write_bytes(content)
        assert refusal(path)


def test_too_much_memory_and_too_much_time(tmp_path: Path) -> None:
    path = tmp_path / "large.ckpt"
    torch.save({"a": torch.zeros(16 << 20)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"memory|claim"):
        convert(path, memory_bytes=8 << 20)
    with pytest.raises(CheckpointError, match="more than 1 s"):
        convert(shutil.copy(path, tmp_path / "slow.ckpt"), seconds=1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["large.ckpt", "slow.ckpt"]


def test_leftovers_of_trainers_are_no_attack(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": {Callback: 1}}, tmp_path / "x.ckpt")
    assert leftovers(tmp_path / "x.ckpt") == ["pytorch_lightning.callbacks.model_checkpoint.Callback"]
    whole = torch.zeros(4)
    assert dict(separate({"a": whole}))["a"].data_ptr() == whole.data_ptr()


# ---- what the child gives up


CONFINED = f"""
import sys, runpy
child = runpy.run_path({str(CHILD)!r})
print(child["leave_network"]())
import socket, subprocess, os, pathlib
child["deny"](pathlib.Path("/allowed"))
def tried(what):
    try:
        what()
    except BaseException as error:
        return type(error).__name__
    return "done"
print([tried(what) for what in (
    lambda: os.system("true"),
    lambda: subprocess.run(["true"]),
    lambda: socket.create_connection(("127.0.0.1", {{port}})),
    lambda: open({{path!r}}, "w"),
    lambda: os.remove({{path!r}}),
)])
"""


def test_the_child_reaches_nothing(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        program = CONFINED.format(port=server.getsockname()[1], path=str(tmp_path / "x"))
        (tmp_path / "x").touch()
        out = subprocess.run([sys.executable, "-I", "-c", program], check=True, capture_output=True, text=True).stdout
    network, tried = out.strip().splitlines()
    assert network in ("none", "refused by Python alone")
    assert tried == str(["Refused"] * 5)
    assert (tmp_path / "x").exists()


def test_without_a_network_even_c_finds_none() -> None:
    """The namespace alone, without the hook; where the system permits one."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        program = (
            f"import runpy, socket; print(runpy.run_path({str(CHILD)!r})['leave_network']())\n"
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        )
        done = subprocess.run([sys.executable, "-I", "-c", program], check=False, capture_output=True, text=True)
    if not done.stdout.startswith("none"):
        pytest.skip("this system permits no network namespace")
    assert done.returncode == 1
    assert "OSError" in done.stderr or "unreachable" in done.stderr


def test_no_token_reaches_the_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    given = {}

    class Stop(Exception): ...

    def popen(command: Any, **options: Any) -> Any:
        given.update(options["env"])
        raise Stop

    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(Stop):
        convert(tmp_path / "x.pt")
    assert "PATH" in given
    assert "secret" not in given.values()
