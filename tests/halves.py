"""The command `python -m tests.halves [PYTEST OPTIONS]`: two processes, each with half of the test files.

Nearly every test computes on one core, and there are two. What the first half says is shown as it comes, the
second's once both are done.
"""

import os
import subprocess
import sys
import tempfile

_NO_TESTS = 5  # pytest's exit status where nothing is selected: a half may be empty


def main() -> int:
    """Runs both; the exit status is 0 where both passed."""
    command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryFile() as said:
        quiet = ["-p", "no:cacheprovider"]  # one cache has one writer
        other = [*command, "--half", "2", *quiet]
        with subprocess.Popen(other, stdout=said, stderr=subprocess.STDOUT) as second:
            first = subprocess.run([*command, "--half", "1"], check=False).returncode
        said.seek(0)
        sys.stdout.buffer.write(said.read())
        sys.stdout.flush()
    return next((s for s in (first, second.returncode) if s not in (0, _NO_TESTS)), 0)


if __name__ == "__main__":
    sys.exit(main())
