"""What is in the package, and ``_base_ = 'mmdeform::...'``."""

import importlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

pytest.importorskip("mmdet")
from mmengine.config import Config

from mmdeform import compat

from .conftest import ROOT

MIM = ROOT / "mmdeform" / ".mim"
# One of each family: parsing is the same for all.
CONFIGS = [
    max(folder.glob("*.py")).relative_to(ROOT / "configs")
    for folder in sorted(ROOT.glob("configs/*"))
    if folder.name != "_ablations"  # whose files are specs
]
SMALL = "dcnv2/mask-rcnn_r50-mdconv-c3-c5_shapes.py"


def packaged(folder: Path) -> set[str]:
    """The files that belong into the package, by their paths in ``folder``."""
    files = {
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    }
    return {str(path.relative_to(folder)) for path in files}


def test_the_index_lists_every_family() -> None:
    metafiles = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/*/metafile.yml"))
    assert yaml.safe_load((MIM / "model-index.yml").read_text())["Import"] == metafiles


def test_a_clone_has_the_folder_that_mim_looks_for() -> None:
    assert packaged(MIM / "configs") == packaged(ROOT / "configs")
    assert packaged(MIM / "tools") == packaged(ROOT / "tools")


@pytest.mark.slow
def test_a_wheel_has_configs_and_tools_and_no_tests(site: Path) -> None:
    for folder in ("configs", "tools"):
        assert packaged(site / "mmdeform" / ".mim" / folder) == packaged(ROOT / folder)
    assert (site / "mmdeform" / ".mim" / "model-index.yml").is_file()
    assert (site / "mmdeform" / "_C_cpu.so").is_file()
    assert not [path for path in packaged(site) if "test" in Path(path).parts[0]]
    code = "import mmdeform.compat; print(mmdeform.compat.CONFIGS)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    output = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)
    assert output.stdout.strip() == str(site / "mmdeform" / ".mim" / "configs"), output.stderr


@pytest.mark.slow
def test_a_source_distribution_can_be_built(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    environment = {**os.environ, "MMDEFORM_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{name}" for name in packaged(ROOT / "csrc")} <= names
    assert {f"mmdeform/.mim/configs/{name}" for name in packaged(ROOT / "configs")} <= names
    assert {"setup.py", "pyproject.toml", "mmdeform/.mim/tools/train.py"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_configs_can_be_inherited(tmp_path: Path, path: Path) -> None:
    config = tmp_path / "own.py"
    config.write_text(f"_base_ = 'mmdeform::{path}'\nlr = 0.5\n")
    inherited = Config.fromfile(config, import_custom_modules=False)
    assert inherited.pop("lr") == 0.5
    original = Config.fromfile(ROOT / "configs" / path, import_custom_modules=False)
    assert without_scopes(inherited.to_dict()) == without_scopes(original.to_dict())


def without_scopes(node: object) -> object:
    if isinstance(node, dict):
        return {key: without_scopes(node[key]) for key in node if key != "_scope_"}
    return [without_scopes(item) for item in node] if isinstance(node, (list, tuple)) else node


def test_types_of_an_inherited_config_are_mmdets(tmp_path: Path) -> None:
    # Whatever the default scope of the project that inherits it.
    config = tmp_path / "own.py"
    config.write_text(f"_base_ = 'mmdeform::{SMALL}'\ndefault_scope = 'orchard'\n")
    assert Config.fromfile(config).model._scope_ == "mmdet"


def test_a_config_can_bring_mmdeform_along(tmp_path: Path) -> None:
    # For scripts that read the config before anything imports mmdeform.
    config = tmp_path / "own.py"
    config.write_text(f"_base_ = __import__('mmdeform') and 'mmdeform::{SMALL}'\n")
    code = (
        "import sys; from mmengine.config import Config; assert 'mmdeform' not in sys.modules;"
        "print(Config.fromfile(sys.argv[1]).model.backbone.dcn.type)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "mmdeform.DCNv2", result.stderr


def test_a_missing_config_is_told_with_what_is_there(tmp_path: Path) -> None:
    config = tmp_path / "own.py"
    config.write_text("_base_ = 'mmdeform::dcnv3/nothing.py'\n")
    with pytest.raises(FileNotFoundError, match=r"dcnv3/faster-rcnn.*but got 'dcnv3/nothing\.py'"):
        Config.fromfile(config)
    config.write_text("_base_ = 'mmdeform::dcn5/nothing.py'\n")
    with pytest.raises(FileNotFoundError, match=r"'dcn/.*'dcnv2/.*'deformable_detr/"):
        Config.fromfile(config)


def test_other_projects_are_found_as_before(tmp_path: Path) -> None:
    config = tmp_path / "own.py"
    config.write_text("_base_ = 'mmdet::dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py'\n")
    assert Config.fromfile(config).model.type == "FasterRCNN"
    config.write_text("_base_ = 'nobody::dcn/nothing.py'\n")
    with pytest.raises(AssertionError, match="nobody"):
        Config.fromfile(config)


def test_the_repair_can_be_applied_again() -> None:
    importlib.reload(compat)
    assert not hasattr(Config._get_cfg_path.__wrapped__, "__wrapped__")
