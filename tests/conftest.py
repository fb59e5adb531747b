"""What all tests share."""

import os

# Ray runs its workers at niceness 15, where whatever else runs beside them starves them.
os.environ.setdefault("RAY_worker_niceness", "0")
