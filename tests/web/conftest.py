"""The fixtures of `web_page`, for every test in this folder."""

from __future__ import annotations

from web_page import browser, page, start_page

__all__ = ["browser", "page", "start_page"]
