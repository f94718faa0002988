"""Files that are written whole: beside their place first, and then moved there."""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path


class NotWritten(OSError):
    """Says which file could not be written, and why."""


def write_whole(path, write):
    """Call write(file) on a file beside path, which then takes its place.

    NotWritten, an OSError: it could not be written, and path is as it was before.
    """
    beside = f"{path}.tmp"
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            length = file.tell()
        arrived = os.path.getsize(beside)
        if arrived != length:
            raise OSError(f"{arrived} of {length} bytes arrived")
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, NotWritten):  # another file, that write() wrote
            raise
        # torch's writer turns what interrupts it into an error of its own: the system's, but also
        # the death of a loader's process, which may show anywhere
        of_the_writer = isinstance(error, OSError) or "inline_container" in str(error)
        if not of_the_writer or "DataLoader" in f"{error} {error.__context__}":
            raise
        reason = str(error).splitlines()[0]
        full = " (is the disk full?)" if is_full(error) else ""
        line = f"cannot write {path}{full}: {reason}; what was there before stands"
        raise NotWritten(line) from None
    finally:
        with contextlib.suppress(OSError):  # it has been moved
            os.unlink(beside)
    if os.name == "posix":
        folder = os.open(Path(path).parent, os.O_RDONLY)
        os.fsync(folder)  # the move itself
        os.close(folder)


def is_full(error):
    """Whether an error says that no more can be written: torch's writer hides the number."""
    number = getattr(error, "errno", None) or getattr(error.__context__, "errno", None)
    return number in (None, errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextlib.contextmanager
def whole_folder(path):
    """Yield a folder whose files are moved into path at the end, or none of them on an error.

    Files of other names that are in path stay. OSError: path cannot be written.
    """
    path = Path(path)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    inside = Path(tempfile.mkdtemp(prefix=".", dir=path))  # on the same disk
    try:
        yield inside
        for file in inside.iterdir():
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(inside, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # it holds files
                path.rmdir()
