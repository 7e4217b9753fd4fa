"""Temporary folders and processes that are killed."""

import os
import signal
import stat
import subprocess
import sys
import tempfile

import pytest

from entropi.private.wire import tunnel
from entropi.temporary import swept_folder

HOLD = """
import sys, time
from entropi.private.wire import tunnel
from entropi.temporary import swept_folder
with swept_folder("entropi-test-") as folder:
    (folder / "weights").write_text("secret")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def holder(base):
    """Another process with such a folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=environment)
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()


def test_a_folder_is_its_users_alone_and_goes(base):
    with swept_folder("entropi-test-") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "file").write_text("x")
        with swept_folder("entropi-test-") as other:
            assert other != folder
        assert (folder / "file").exists()
    with pytest.raises(RuntimeError), swept_folder("entropi-test-"):
        raise RuntimeError
    assert list(base.iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_a_living_one_holds_stays(base, holder):
    process, theirs = holder
    with swept_folder("entropi-test-"):
        assert os.path.exists(f"{theirs}/weights")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.path.exists(f"{theirs}/weights")  # a killed process cleans nothing up
    with swept_folder("entropi-test-") as own:
        assert list(base.iterdir()) == [own]


def test_nothing_else_is_removed(base):
    (base / "entropi-test-file").write_text("x")
    (base / "entropi-other-x").mkdir()
    (base / "elsewhere").mkdir()
    (base / "elsewhere" / "kept").write_text("x")
    (base / "entropi-test-link").symlink_to(base / "elsewhere")
    with swept_folder("entropi-test-"):
        pass
    left = sorted(path.name for path in base.iterdir())
    assert left == ["elsewhere", "entropi-other-x", "entropi-test-file", "entropi-test-link"]
    assert (base / "elsewhere" / "kept").exists()


def test_a_folder_elsewhere_is_swept_there(base, tmp_path):
    other = tmp_path / "other"
    (other / "entropi-test-left").mkdir(parents=True)
    (base / "entropi-test-stays").mkdir()
    with swept_folder("entropi-test-", other) as folder:
        assert [path.name for path in other.iterdir()] == [folder.name]
    assert list(other.iterdir()) == []
    assert (base / "entropi-test-stays").exists()


def test_folders_of_links_are_swept(base, monkeypatch):
    """They hold parts of prepared material for a moment."""
    monkeypatch.setattr(tunnel, "_LONGEST_FOLDER", 1000)
    left = base / "entropi-tunnel-left"
    left.mkdir()
    (left / "part-0.safetensors").write_text("secret")
    with tunnel.link_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert not left.exists()
    assert list(base.iterdir()) == []
