"""Signals as a terminal leaves them: a runner in the background ignores SIGINT, which every process that a test starts would inherit."""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
