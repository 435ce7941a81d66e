"""Checkpoints are read as data: from files and the web, with yacs nodes, and if they mean harm."""

import functools
import http.server
import os
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmcv.ops")
from mmdeform.models.backbones.dat import load_dat_checkpoint
from mmdeform.models.backbones.reading import read_checkpoint

from .small_dat import small_dat


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def attacks(target: Path) -> dict[str, Attack]:
    return {
        "os": Attack(os.system, f"mkdir '{target}'"),
        "builtins": Attack(eval, f"__import__('os').mkdir({str(target)!r})"),
        "pathlib": Attack(Path.mkdir, target),
    }


class TestAttacks:
    @pytest.mark.parametrize("name", ["os", "builtins", "pathlib"])
    @pytest.mark.parametrize("file_format", ["zip", "legacy", "pickle"])
    def test_refused_and_not_run(self, name: str, file_format: str, tmp_path: Path) -> None:
        target, file = tmp_path / "harm", tmp_path / "dat.pth"
        checkpoint = {"model": {"a": torch.ones(1)}, "config": attacks(target)[name]}
        if file_format == "pickle":
            file.write_bytes(pickle.dumps(checkpoint, protocol=2))
        else:
            torch.save(checkpoint, file, _use_new_zipfile_serialization=file_format == "zip")
        with pytest.raises(pickle.UnpicklingError, match=r"dat\.pth.*nothing of it was run"):
            read_checkpoint(file)
        assert not target.exists()
        if file_format == "pickle":
            pickle.loads(file.read_bytes())
        else:
            torch.load(file, weights_only=False)
        assert target.exists()  # it was an attack

    def test_error_names_what_was_asked_for(self, tmp_path: Path) -> None:
        torch.save({"model": Attack(eval, "1")}, tmp_path / "dat.pth")
        with pytest.raises(pickle.UnpicklingError, match="it asks for eval"):
            read_checkpoint(tmp_path / "dat.pth")

    def test_no_checkpoint_at_all(self, tmp_path: Path) -> None:
        for content in (b"", b"text", b"PK\3\4 broken"):
            (tmp_path / "dat.pth").write_bytes(content)
            with pytest.raises(ValueError, match=r"dat\.pth: expected a file of torch\.save"):
                read_checkpoint(tmp_path / "dat.pth")


class TestYacs:
    def test_nodes_become_dicts(self, tmp_path: Path, yacs: type) -> None:
        config = yacs(MODEL=yacs(NAME="dat_tiny", DAT=yacs(dims=[8, 16])))
        file, model = tmp_path / "dat.pth", small_dat("v1")
        state = {key: torch.full_like(value, 2.0) for key, value in model.state_dict().items()}
        torch.save({"model": state, "config": config, "max_accuracy": 82.0}, file)
        del sys.modules["yacs.config"], sys.modules["yacs"]
        with pytest.raises(pickle.UnpicklingError, match=r"yacs\.config\.CfgNode"):
            torch.load(file)
        load_dat_checkpoint(model, file)
        assert all(value.eq(2.0).all() for value in model.state_dict().values())
        read = read_checkpoint(file)
        assert read["config"] == {"MODEL": {"NAME": "dat_tiny", "DAT": {"dims": [8, 16]}}}
        assert "yacs" not in sys.modules
        with pytest.raises(pickle.UnpicklingError):  # allowed for these calls alone
            torch.load(file)

    def test_attack_within_a_node(self, tmp_path: Path, yacs: type) -> None:
        target = tmp_path / "harm"
        torch.save({"config": yacs(x=Attack(os.mkdir, str(target)))}, tmp_path / "dat.pth")
        with pytest.raises(pickle.UnpicklingError, match="nothing of it was run"):
            read_checkpoint(tmp_path / "dat.pth")
        assert not target.exists()

    @pytest.fixture
    def yacs(self, monkeypatch: pytest.MonkeyPatch) -> type:
        """A class of the name and make of ``yacs.config.CfgNode``."""

        class CfgNode(dict):
            def __init__(self, **values: Any) -> None:
                super().__init__(values)
                self.__dict__["__immutable__"] = False

        CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
        module = types.ModuleType("yacs.config")
        module.CfgNode = CfgNode
        monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        monkeypatch.setitem(sys.modules, "yacs.config", module)
        return CfgNode


class TestSources:
    def test_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.save([1, 2], tmp_path / "dat.pth")
        monkeypatch.setenv("HOME", str(tmp_path))
        for path in (tmp_path / "dat.pth", str(tmp_path / "dat.pth"), "~/dat.pth"):
            assert read_checkpoint(path) == [1, 2]

    def test_missing_file(self) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read_checkpoint("nowhere.pth")

    def test_url_is_kept_and_read_safely(self, tmp_path: Path, server: str) -> None:
        torch.save([1, 2], tmp_path / "dat.pth")
        assert read_checkpoint(f"{server}/dat.pth") == [1, 2]
        (tmp_path / "dat.pth").unlink()
        assert read_checkpoint(f"{server}/dat.pth") == [1, 2]

        torch.save(attacks(tmp_path / "harm")["os"], tmp_path / "bad.pth")
        with pytest.raises(pickle.UnpicklingError, match=r"http.*bad\.pth"):
            read_checkpoint(f"{server}/bad.pth")
        assert not (tmp_path / "harm").exists()

    def test_file_backend(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from mmengine import fileio

        torch.save([1, 2], tmp_path / "dat.pth")
        monkeypatch.setattr(fileio, "get", lambda path: (tmp_path / path[5:]).read_bytes())
        assert read_checkpoint("s3://dat.pth") == [1, 2]

    @pytest.fixture
    def server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """A web server of ``tmp_path``; files from it are kept in ``tmp_path / 'hub'``."""
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_args: Any) -> None:
                pass

        handler = functools.partial(Handler, directory=str(tmp_path))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
