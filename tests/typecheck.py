"""The run-time type checker of the test run: beartype, with PEP 484's rule that an int is welcome as a float."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

__all__ = ["checked"]

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
