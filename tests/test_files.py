"""A file is there as a whole or not at all, and where Stable-Baselines3 would put it."""

import errno
import io
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3 import PPO

from sb3_safe import SAFE


def made(algorithm: Any = SAFE) -> Any:
    return algorithm("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, seed=0)


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mode for path in folder.rglob("*")}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_cannot_be_written_leaves_the_one_before_and_no_part_of_itself(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made()
    model.save(tmp_path / "model")
    before = (tmp_path / "model.zip").read_bytes()

    def fails(value: Any, file: Any) -> None:
        file.write(b"some of it")
        raise error

    monkeypatch.setattr(th, "save", fails)
    for name in ("model", "another"):
        with pytest.raises(type(error)):
            model.save(tmp_path / name)
    assert list(files(tmp_path)) == ["model.zip"]
    assert (tmp_path / "model.zip").read_bytes() == before


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    "name", ["model", "model.zip", "model.v2", "new/folders/model", "folder.zip", "folder", "link", "readable.zip"]
)
def test_files_are_where_those_of_stable_baselines_are(name: str, kind: Any, tmp_path: Path) -> None:
    """With their permissions, and with its warnings."""
    found = []
    for algorithm in (SAFE, PPO):
        folder = tmp_path / algorithm.__name__
        (folder / "folder").mkdir(parents=True)
        (folder / "folder.zip").mkdir()
        (folder / "target").touch()
        (folder / "link.zip").symlink_to(folder / "target")
        (folder / "readable.zip").touch()
        (folder / "readable.zip").chmod(0o640)
        model = made(algorithm)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.save(kind(folder / name))
        said = [str(warning.message).replace(str(folder), "") for warning in caught]
        empty = {path for path in folder.rglob("*") if path.is_file() and path.stat().st_size == 0}
        found.append((files(folder), said, {str(path.relative_to(folder)) for path in empty}))
        assert (folder / "link.zip").is_symlink()
    assert found[0] == found[1]


def test_a_new_file_may_be_read_by_whom_the_user_lets_read(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    made().save(tmp_path / "model")
    assert stat.filemode((tmp_path / "model.zip").stat().st_mode) == stat.filemode((tmp_path / "plain").stat().st_mode)


def test_what_is_no_path_is_written_to_and_left_open() -> None:
    model, file = made(), io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = SAFE.load(file)
    assert all(th.equal(a, b) for a, b in zip(loaded.policy.parameters(), model.policy.parameters(), strict=True))
