"""Where does a job write? One fresh folder, measured while it runs and removed whatever was left in it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile


def fresh(root: str) -> str:
    """A new empty folder below `root`."""
    return tempfile.mkdtemp(prefix="job-", dir=root)


def over(folder: str, max_bytes: int, max_files: int) -> bool:
    """Whether the folder holds more than it may, or cannot be measured, which no honest job brings about."""
    queue, count, size = [folder], 0, 0
    while queue:
        try:
            with os.scandir(queue.pop()) as entries:
                for entry in entries:
                    count += 1
                    status = entry.stat(follow_symlinks=False)
                    size += status.st_blocks * 512
                    if count > max_files or size > max_bytes:
                        return True
                    if stat.S_ISDIR(status.st_mode):
                        queue.append(entry.path)
        except FileNotFoundError:
            continue  # removed while it was measured
        except OSError:
            return True
    return False


def remove(folder: str) -> None:
    """Remove the folder without following a link, however deep it is and whatever its modes are."""
    try:
        os.rmdir(folder)  # nearly every job leaves it empty
        return
    except OSError:
        pass
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        subprocess.run(["chmod", "-R", "u+rwx", folder], check=False, capture_output=True)
        subprocess.run(["rm", "-rf", "--", folder], check=False, capture_output=True)
