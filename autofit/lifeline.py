"""A worker's main. It ends with its parent, also in the seconds in which it loads torch.

python -m autofit.lifeline CONNECTION_FD LIFE_FD
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    threading.Thread(target=_die_with_parent, args=(int(sys.argv[2]),), daemon=True).start()
    from autofit.trial import worker

    worker.serve(connection)


def _die_with_parent(life: int) -> None:
    """The parent holds the other end; when it is gone, however it went, this read returns. The
    compilers that this process may have started go with it."""
    os.read(life, 1)
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
