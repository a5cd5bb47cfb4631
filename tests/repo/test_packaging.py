"""backends/ and kernels/ install as parts of cortexstream, and a wheel holds the whole package and nothing else.

Why links and a package list both: docs/architecture.md. The builds here use no network (`build --no-isolation`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.repo.tree import LINKS, ROOT, ROOTS, module_name, sources, walk

DATA_SUFFIXES = {".json", ".jinja", ".model", ".safetensors", ".metal", ".typed"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building writes into its folder, and must not see what an earlier build left."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in sources():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    for name in LINKS:
        (copy / "cortexstream" / name).symlink_to(Path("..") / name)
    return copy


def build(checkout: Path, out: Path, *options: str) -> Path:
    """Run `python -m build` and return the folder of the results."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def wheel_files(folder: Path) -> set[str]:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def from_sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and the wheel made from it, which is what a release uploads."""
    return build(checkout, tmp_path_factory.mktemp("from_sdist"))


@pytest.fixture(scope="module")
def wheel(from_sdist: Path) -> set[str]:
    return wheel_files(from_sdist)


def packaged_files() -> set[str]:
    """Every source file that an installed package must have, by its path in site-packages."""
    found = set()
    for name, folder in ROOTS.items():
        for path in walk(folder):
            if path.suffix in DATA_SUFFIXES | {".py"}:
                inside = path.relative_to(folder).as_posix()
                found.add(f"cortexstream/{inside}" if name == "cortexstream" else f"cortexstream/{name}/{inside}")
    return found


@pytest.mark.parametrize("name", LINKS)
def test_link_leads_to_the_folder_beside(name: str) -> None:
    link = ROOT / "cortexstream" / name
    assert link.is_symlink(), f"{link} is no symbolic link; clone with core.symlinks=true"
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", LINKS)
def test_no_init_directly_in_the_two_roots(name: str) -> None:
    """With one, `import kernels` from the checkout would hide Hugging Face's package of that name."""
    assert not (ROOT / name / "__init__.py").exists()


def test_package_list_is_the_tree(project: dict[str, Any]) -> None:
    listed = project["tool"]["setuptools"]["packages"]
    files = [path for folder in ROOTS.values() for path in walk(folder) if path.suffix in DATA_SUFFIXES | {".py"}]
    folders = {module_name(path.parent / "__init__.py") for path in files}
    expected = folders | {"cortexstream.backends", "cortexstream.kernels"}  # no file of their own
    assert len(listed) == len(set(listed))
    assert set(listed) == expected


def test_every_listed_package_but_the_two_roots_has_an_init(project: dict[str, Any]) -> None:
    for name in project["tool"]["setuptools"]["packages"]:
        if name not in ("cortexstream.backends", "cortexstream.kernels"):
            assert (ROOT / name.replace(".", "/") / "__init__.py").is_file(), name


def test_version_has_one_source(project: dict[str, Any], from_sdist: Path) -> None:
    import cortexstream

    assert "version" not in project["project"]
    (built,) = from_sdist.glob("*.whl")
    assert built.name.split("-")[1] == cortexstream.__version__


def test_wheel_has_one_top_level_package(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"cortexstream"}


def test_wheel_has_every_file_and_no_other(wheel: set[str]) -> None:
    assert {name for name in wheel if ".dist-info/" not in name} == packaged_files()


def test_wheel_has_the_embedded_model(wheel: set[str]) -> None:
    names = {name.rsplit("/", 1)[1] for name in wheel if name.startswith("cortexstream/models/tiny/")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"} <= names


def test_wheel_has_licence_and_command(wheel: set[str], from_sdist: Path) -> None:
    (info,) = {name.split("/")[0] for name in wheel if ".dist-info/" in name}
    assert f"{info}/licenses/LICENSE" in wheel
    (built,) = from_sdist.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert "cortexstream = cortexstream.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_wheel_from_sdist_equals_wheel_from_checkout(checkout: Path, wheel: set[str], tmp_path: Path) -> None:
    assert wheel_files(build(checkout, tmp_path, "--wheel")) == wheel


def test_wheel_is_right_where_links_did_not_survive(from_sdist: Path, wheel: set[str], tmp_path: Path) -> None:
    """A clone with core.symlinks=false, or GitHub's zip: each link is a text file that holds its target."""
    (sdist,) = from_sdist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    for name in LINKS:
        link = source / "cortexstream" / name
        if link.is_symlink():
            link.unlink()
        elif link.is_dir():
            shutil.rmtree(link)
        link.write_text(f"../{name}")
    assert wheel_files(build(source, tmp_path / "out", "--wheel")) == wheel
